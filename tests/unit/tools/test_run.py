"""The bootstrap behind run.py: which ComfyUI, which interpreter, what is installed, how failures read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from modular_lora_guard import version
from modular_lora_guard.modular_lora.options import tomllib
from modular_lora_guard.modular_lora.util import atomic
from modular_lora_guard.tools.bootstrap import browser, check, comfyui, environment, front_end, links, paths, process
from modular_lora_guard.tools.bootstrap.console import RunError
from modular_lora_guard.tools.demo import base, server
from modular_lora_guard.tools.world import DETECTOR_ONNX
from support.errors import refuses

RUN = Path(__file__).resolve().parents[3] / "run.py"


def make_comfyui(folder: Path, version: str = "0.3.75") -> Path:
    for name in ("comfy", "comfy_api"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=120, env=settings, check=False
    )


def test_help_names_the_commands() -> None:
    answer = run("--help")
    assert answer.returncode == 0
    assert all(
        f"run.py {command}" in answer.stdout
        for command in ("demo", "check", "test", "comfy", "lora", "audit", "operator")
    )


@pytest.mark.parametrize("command", ["lora", "audit", "operator"])
def test_what_follows_a_command_with_a_line_of_its_own_goes_there_as_it_is(command: str) -> None:
    code = "import sys, run; options, rest = run.parse(sys.argv[1:]); print(options.command, options.bundled, rest)"
    given = [command, "--bundled", "run", "--config", "x.toml", "--help"]
    answer = subprocess.run([sys.executable, "-c", code, *given], cwd=RUN.parent, capture_output=True, text=True)
    assert answer.stdout.strip() == f"{command} True ['run', '--config', 'x.toml', '--help']"


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ([], True),
        (["-k", "guard", "tests"], True),
        (["tests/unit/tools/test_run.py", "-k", "cores"], False),
        (["tests/unit/tools/test_run.py::test_help_names_the_commands"], False),
    ],
)
def test_whole_runs_are_spread_over_the_cores_and_named_files_are_not(given: list[str], spread: bool) -> None:
    code = "import sys, run; print(*run.spread_over_cores(sys.argv[1:]))"
    answer = subprocess.run([sys.executable, "-c", code, *given], cwd=RUN.parent, capture_output=True, text=True)
    assert answer.returncode == 0
    assert ("loadfile" in answer.stdout.split()) == spread
    assert spread or not answer.stdout.strip()


@pytest.mark.parametrize(
    ("processors", "gibibytes", "workers"),
    [(2, 24, 3), (16, 62.8, 3), (2, 7.7, 2), (2, 15.6, 3), (1, 16, 2), (4, 1.9, 1)],
)
def test_there_are_as_many_workers_as_processors_and_memory_serve(processors, gibibytes, workers, monkeypatch) -> None:
    known = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gibibytes * 2**30) // 4096}
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(os, "sysconf", known.__getitem__, raising=False)
    assert environment.spread()[:2] == ("-n", str(workers))


def test_an_unknown_option_of_the_demo_is_refused() -> None:
    answer = run("demo", "--step", "3", COMFYUI_PATH=os.devnull)
    assert answer.returncode == 2
    assert "--step" in answer.stderr


def test_a_wrong_comfyui_path_ends_with_one_line_that_names_it(tmp_path: Path) -> None:
    answer = run("demo", COMFYUI_PATH=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stdout.count("\n") == 1
    assert str(tmp_path) in answer.stdout
    assert "Traceback" not in answer.stderr


def test_an_interpreter_without_torch_is_named_with_the_remedy(tmp_path: Path) -> None:
    host = make_comfyui(tmp_path / "ComfyUI")
    empty = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    variables = {"COMFYUI_PATH": str(host), "COMFYUI_PYTHON": str(environment.python_of(empty))}
    with refuses("command", "No module named 'torch'", "COMFYUI_PYTHON"):
        comfyui.existing(variables)


def test_an_existing_comfyui_is_used_with_its_own_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "NEEDED", "")
    host = make_comfyui(tmp_path / "ComfyUI", "0.33.0")
    own = environment.python_of(host / ".venv")
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    found = comfyui.existing({"COMFYUI_PATH": str(host)})
    assert found == comfyui.Host(host, own, "COMFYUI_PATH", bundled=False)
    assert found.version == "0.33.0"


def test_an_empty_comfyui_path_asks_for_the_bundled_one(tmp_path: Path) -> None:
    assert comfyui.existing({"COMFYUI_PATH": "", "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("platform", "variable", "place"),
    [
        ("linux", "HOME", ".config/comfy-cli/config.ini"),
        ("darwin", "HOME", "Library/Application Support/comfy-cli/config.ini"),
        ("win32", "USERPROFILE", "AppData/Local/comfy-cli/config.ini"),
    ],
)
def test_comfy_cli_settings_lie_where_comfy_cli_puts_them(
    platform: str, variable: str, place: str, tmp_path: Path
) -> None:
    assert comfyui.comfy_cli_config({variable: str(tmp_path)}, platform) == tmp_path / place


def test_the_default_workspace_of_comfy_cli_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "NEEDED", "")
    home, host = tmp_path / "home", make_comfyui(tmp_path / "100%")
    config = comfyui.comfy_cli_config({"HOME": str(home)}, "linux")
    config.parent.mkdir(parents=True)
    config.write_text(f"[DEFAULT]\nenable_tracking = False\ndefault_workspace = {host}\n")
    assert comfyui.comfy_cli_workspace(config) == host


@pytest.mark.parametrize("text", ["", "[DEFAULT]\n", "[DEFAULT]\ndefault_workspace = /nowhere\n", "no ini file"])
def test_a_comfy_cli_without_a_usable_workspace_changes_nothing(text: str, tmp_path: Path) -> None:
    config = tmp_path / "config.ini"
    config.write_text(text)
    assert comfyui.comfy_cli_workspace(config) is None


def test_requirements_keep_all_but_the_torch_family() -> None:
    theirs = "torch\ntorchsde\n torchvision>=1\nTorchAudio\n\n#non essential:\nkornia>=0.7.1\nmy_pkg[x]~=2.0\n"
    assert environment.without_torch(theirs).split() == ["torchsde", "kornia>=0.7.1", "my_pkg[x]~=2.0"]


def test_a_changed_requirement_changes_the_stamp(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("a==1\n")
    before = environment.fingerprint(file)
    stamp = tmp_path / "stamp"
    atomic.write(stamp, before)
    assert environment.is_current(stamp, environment.fingerprint(file))
    file.write_text("a==2\n")
    assert not environment.is_current(stamp, environment.fingerprint(file))


def test_comfyui_is_copied_without_foreign_path_settings(tmp_path: Path) -> None:
    source = make_comfyui(tmp_path / "wheel")
    (source / "extra_model_paths.yaml").write_text("horde: {}\n")
    destination = tmp_path / "copy"
    environment.ensure_copy(source, destination, "one")
    assert (destination / "main.py").exists()
    assert not (destination / "extra_model_paths.yaml").exists()
    (destination / "main.py").unlink()
    environment.ensure_copy(source, destination, "one")
    assert not (destination / "main.py").exists(), "a current copy is left alone"
    environment.ensure_copy(source, destination, "two")
    assert (destination / "main.py").exists()


def test_a_failing_step_shows_its_last_lines_and_the_remedy(tmp_path: Path) -> None:
    script = "import sys; print('the reason'); sys.exit(3)"
    with refuses("command.exit-code", "step", "3", "the reason\nDo this."):
        process.run_logged([sys.executable, "-c", script], title="step", log=tmp_path / "log", remedy="Do this.")


KILLS_ITSELF = "import os, signal; os.kill(os.getpid(), signal.{})"
BY_SIGNAL = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that end a process")


@BY_SIGNAL
@pytest.mark.parametrize(
    ("name", "blamed", "memory"), [("SIGTERM", False, False), ("SIGKILL", False, True), ("SIGSEGV", True, False)]
)
def test_a_step_that_a_signal_ended_names_it_and_blames_no_file(
    tmp_path: Path, name: str, blamed: bool, memory: bool
) -> None:
    command = [sys.executable, "-c", KILLS_ITSELF.format(name)]
    for run_step in (
        lambda: process.run_logged(command, title="step", log=tmp_path / "log", remedy="Delete the folder."),
        lambda: process.output_of(command, subject="step", remedy="Delete the folder."),
    ):
        with pytest.raises(RunError) as caught:
            run_step()
        assert name in str(caught.value)
        assert ("Delete the folder." in str(caught.value)) == blamed, "only a crash is a fault of the step's own"
        assert ("memory" in str(caught.value)) == memory


@BY_SIGNAL
def test_a_child_on_the_terminal_that_a_signal_ended_is_told_as_shells_do(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", KILLS_ITSELF.format("SIGKILL")]
    assert process.run_attached(command, environment=os.environ) == 128 + 9
    assert "SIGKILL" in capsys.readouterr().out
    assert process.run_attached([sys.executable, "-c", "exit(3)"], environment=os.environ) == 3
    assert capsys.readouterr().out == "", "who ends by himself has said why"


def test_a_command_that_cannot_start_names_itself(tmp_path: Path) -> None:
    with refuses("command.not-started", "no-such-program", "Do this."):
        process.run_logged([tmp_path / "no-such-program"], title="step", log=tmp_path / "log", remedy="Do this.")


def test_children_leave_a_core_free_and_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    settings = process.child_environment()
    assert 1 <= int(settings["OMP_NUM_THREADS"]) <= max(1, process.physical_cores() - 1)
    assert settings["OMP_WAIT_POLICY"] == "PASSIVE"
    assert settings["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in settings


def test_a_child_that_ignores_the_request_to_end_is_killed() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    process.stop(child, patience=0.2)
    assert child.poll() is not None


def test_a_base_directory_can_be_prepared_again(tmp_path: Path) -> None:
    pack, files = tmp_path / "pack", tmp_path / "files"
    for folder in (pack, files):
        folder.mkdir()
    (pack / "__init__.py").touch()
    checkpoint, safety, task = (
        files / name for name in ("model.safetensors", "safety.safetensors", "task.safetensors")
    )
    for file in (checkpoint, safety, task):
        file.write_text(file.name)
    for _ in range(2):
        base.prepare(tmp_path / "base", checkpoint=checkpoint, loras=[safety, task], safety=safety, pack=pack)
    assert (tmp_path / "base/custom_nodes" / paths.PACK_NAME / "__init__.py").exists()
    replacement = files / "new"
    replacement.write_text("changed")
    replacement.replace(task)
    base.prepare(tmp_path / "base", checkpoint=checkpoint, loras=[safety, task], safety=safety, pack=pack)
    assert (tmp_path / "base/models/loras/task.safetensors").read_text() == "changed"
    assert (tmp_path / "base/models/safety_loras/safety.safetensors").read_text() == "safety.safetensors"
    assert (tmp_path / "base/models/modular_lora_detectors" / DETECTOR_ONNX).exists()


def test_the_link_to_the_pack_is_removed_without_the_pack(tmp_path: Path) -> None:
    pack, link = tmp_path / "pack", tmp_path / "link"
    pack.mkdir()
    (pack / "kept").touch()
    links.link_folder(pack, link)
    links.remove(link)
    assert not link.exists()
    assert (pack / "kept").exists()


def test_the_server_stays_on_the_loopback_and_out_of_a_foreign_comfyui(tmp_path: Path) -> None:
    comfy = tmp_path / "ComfyUI/comfy"
    comfy.mkdir(parents=True)
    flags = ("--listen", "--port", "--base-directory", "--database-url", "--disable-auto-launch", "--cpu")
    (comfy / "cli_args.py").write_text("\n".join(f'parser.add_argument("{flag}")' for flag in flags))
    found = server.Server(
        comfy.parent, sys.executable, tmp_path / "base", log=tmp_path / "log", cpu=True, extra=["--x"]
    )
    assert found.arguments[:2] == ["--listen", "127.0.0.1"]
    assert found.arguments[-2:] == ["--cpu", "--x"]
    assert "--disable-api-nodes" not in found.arguments, "an older ComfyUI does not know it"
    assert f"sqlite:///{(tmp_path / 'base/user/comfyui.db').as_posix()}" in found.arguments


def _running(tmp_path: Path, main: str) -> server.Server:
    """A server of a ComfyUI that does what ``main`` says; to be started."""
    comfy = tmp_path / "ComfyUI/comfy"
    comfy.mkdir(parents=True)
    (comfy / "cli_args.py").touch()
    (comfy.parent / "main.py").write_text(main)
    return server.Server(comfy.parent, sys.executable, tmp_path, log=tmp_path / "log", cpu=True)


def test_a_server_that_ends_at_once_shows_its_last_lines(tmp_path: Path) -> None:
    failing = _running(tmp_path, "raise SystemExit('broken on purpose')")
    with refuses("command.server-ended", "1", "broken on purpose"):
        failing.start(timeout=60)


@BY_SIGNAL
@pytest.mark.parametrize(("last", "named"), [(KILLS_ITSELF.format("SIGTERM"), "SIGTERM"), ("", "exit code 0")])
def test_a_server_that_was_ended_from_outside_is_not_called_broken(tmp_path: Path, last: str, named: str) -> None:
    ended = _running(tmp_path, last)
    with refuses("command.server-ended", named) as caught:
        ended.start(timeout=60)
    assert "package" not in str(caught.value)


@BY_SIGNAL
def test_a_server_that_ends_later_by_a_signal_ends_the_command_with_its_name(tmp_path: Path) -> None:
    with _binding(tmp_path, lost=0) as started:
        assert started._child is not None
        started._child.kill()
        with refuses("command.server-ended", "SIGKILL", "memory"):
            started.wait()


def test_a_missing_package_of_an_own_comfyui_is_not_looked_for_in_ours(tmp_path: Path) -> None:
    failing = _running(tmp_path, "import no_such_package")
    with refuses("command.server-ended", "no_such_package", sys.executable) as caught:
        failing.start(timeout=60)
    assert f"delete {paths.RUN}" not in str(caught.value)


BINDING = """
import asyncio, sys
from pathlib import Path

async def answer(reader, writer):
    writer.write(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
    await writer.drain()
    writer.close()

async def serve():
    port = int(sys.argv[sys.argv.index("--port") + 1])
    seen = Path("ports")
    before = seen.read_text() if seen.exists() else ""
    seen.write_text(f"{before}{port}\\n")
    if before.count("\\n") < LOST:  # another program has got it meanwhile
        other = await asyncio.start_server(answer, "127.0.0.1", port)
    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        await server.serve_forever()

asyncio.run(serve())
"""


def _binding(folder: Path, lost: int, port: int | None = None) -> server.Server:
    comfy = folder / "ComfyUI/comfy"
    comfy.mkdir(parents=True)
    (comfy / "cli_args.py").write_text('parser.add_argument("--port")')
    (comfy.parent / "main.py").write_text(BINDING.replace("LOST", str(lost)))
    return server.Server(comfy.parent, sys.executable, folder, log=folder / "log", cpu=True, port=port)


def test_a_port_that_another_program_takes_while_the_server_starts_is_left_to_it(tmp_path: Path) -> None:
    with _binding(tmp_path, lost=1) as started:
        tried = [int(line) for line in (tmp_path / "ports").read_text().split()]
        assert len(set(tried)) == 2
        assert started.port == tried[-1]
        assert started.url.endswith(f":{tried[-1]}")


def test_the_port_that_was_asked_for_is_not_exchanged_and_no_server_is_started_for_ever(tmp_path: Path) -> None:
    asked = server.free_port()
    with refuses("command.server-ended", asked):
        _binding(tmp_path / "asked", lost=9, port=asked).start(timeout=60)
    with refuses("command.server-ended"):
        _binding(tmp_path / "any", lost=9).start(timeout=60)
    assert len((tmp_path / "any" / "ports").read_text().split()) == server.MOST_PORTS


def test_a_missing_browser_gives_a_reason_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "find_chromium", lambda: None)
    monkeypatch.setattr(browser.sys, "platform", "darwin")
    assert "chromium not found" in browser.ensure()["MODULAR_LORA_NO_BROWSER"]


def test_the_second_front_end_lies_in_a_folder_of_its_own_and_is_installed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "pip", lambda python, title, given: asked.append([*map(str, given)]))
    monkeypatch.setattr(paths, "RUN", tmp_path)
    monkeypatch.setattr(paths, "FRONT_ENDS", tmp_path / "front-ends")
    for _ in range(2):
        found = front_end.ensure(Path("python"))
    folder = tmp_path / "front-ends" / front_end.VERSION
    wanted = f"comfyui-frontend-package=={front_end.VERSION}"
    assert asked == [["--no-deps", "--target", str(folder), wanted]]
    assert found == {"MODULAR_LORA_FRONT_END": str(folder / "comfyui_frontend_package" / "static")}


def test_a_second_front_end_that_cannot_be_had_gives_a_reason_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(python: Path, title: str, given: list[str]) -> None:
        raise RunError("front end: exit code 1.\nlines")

    monkeypatch.setattr(environment, "pip", pip)
    monkeypatch.setattr(paths, "RUN", tmp_path)
    monkeypatch.setattr(paths, "FRONT_ENDS", tmp_path / "front-ends")
    (reason,) = front_end.ensure(Path("python")).values()
    assert "exit code 1. The browser's tests run on ComfyUI's own front end alone" in reason
    assert front_end.ensure(Path("python")).keys() == {"MODULAR_LORA_NO_FRONT_END"}


def test_every_comfyui_has_a_base_directory_of_its_own(tmp_path: Path) -> None:
    places = [paths.base_of(folder) for folder in (paths.COMFYUI, tmp_path / "one", tmp_path / "two")]
    assert len(set(places)) == 3
    assert all(place.parent == paths.RUN for place in places)


def bare_environment(folder: Path) -> Path:
    """The interpreter of an environment without a package in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return environment.python_of(folder)


def test_check_without_pytorch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = bare_environment(tmp_path / "bare")
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setattr(paths, "VENV", tmp_path / "none")
    with pytest.raises(RunError) as found:
        check.interpreter()
    assert f"{bare} -m pip install torch" in str(found.value)
    assert "\n" not in str(found.value)


def test_check_takes_this_interpreter_and_else_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "VENV", tmp_path / "venv")
    assert check.interpreter() == Path(sys.executable)
    own, bare = environment.python_of(paths.VENV), bare_environment(tmp_path / "bare")
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setattr(check, "has_torch", lambda python: python == own)
    assert check.interpreter() == own


@pytest.mark.slow
def test_check_sees_the_packages_of_the_interpreter_and_installs_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "pip", lambda python, title, arguments: asked.append(list(map(str, arguments))))
    for name in ("RUN", "LOGS", "CHECK"):
        monkeypatch.setattr(paths, name, tmp_path / "run" / name.lower())
    for _ in range(2):
        python = environment.ensure_check(Path(sys.executable))
    assert len(asked) == 1, "what is current is not installed again"
    assert asked[0][1::2][:2] == [str(paths.ROOT / name) for name in ("requirements.txt", "requirements-check.txt")]
    code = "import pytest, torch, sys; print(sys.prefix, sys.base_prefix, pytest.__file__, sep='\\n')"
    prefix, base, seen = subprocess.check_output([python, "-c", code], text=True).splitlines()
    assert Path(prefix) == tmp_path / "run" / "check" != Path(base)
    assert seen == pytest.__file__


def test_check_runs_every_step_and_fails_if_one_does(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[list[str]] = []

    def attached(command, *, environment, cwd) -> int:
        asked.append(list(map(str, command[1:])))
        assert not {"MODULAR_LORA_COMFYUI", "PYTHONDONTWRITEBYTECODE"} & set(environment)
        assert paths.RUN in Path(environment["PYTHONPYCACHEPREFIX"]).parents, "nothing is compiled into other folders"
        return 3 if "mypy" in command else 0

    monkeypatch.setenv("MODULAR_LORA_COMFYUI", "somewhere")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(environment, "ensure_check", lambda python: python)
    monkeypatch.setattr(check, "run_attached", attached)
    assert check.run_check("entry", ["-k", "some"]) == 3
    assert [command[1] for command in asked] == ["ruff", "ruff", "mypy", "entry"]
    types = tomllib.loads((paths.ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    for package in types["packages"]:
        assert (paths.ROOT / types["mypy_path"] / package.replace(".", "/") / "__init__.py").is_file(), package
    assert asked[-1][-len(check.UNIT_TESTS) - 2 :] == [*check.UNIT_TESTS, "-k", "some"]
    assert "failed" in (last := capsys.readouterr().out.splitlines()[-1])
    assert "types" in last


def test_what_tests_compile_is_kept_whatever_the_machine_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(paths, "BYTECODE", tmp_path / "kept")
    (module := tmp_path / "compiled_once.py").write_text("", encoding="utf-8")
    command = [sys.executable, "-c", "import compiled_once"]
    subprocess.run(command, cwd=tmp_path, env=check.test_environment({}), check=True)
    assert [path.name.partition(".")[0] for path in (tmp_path / "kept").rglob("*.pyc")].count(module.stem) == 1
    assert not list(tmp_path.glob("__pycache__")), "nothing is compiled into other folders"


def test_a_test_without_a_fixture_of_comfyui_is_a_unit_test(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("unit")
    assert not [
        item for item in request.session.items if item.get_closest_marker("unit") and "comfy" in item.fixturenames
    ]


def test_the_version_is_that_of_the_project_file() -> None:
    stated = re.findall(
        r'^version = "(.+)"$', (paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert stated == [version.VERSION]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.VERSION), "what ComfyUI's registry takes"


def requirements(file: str) -> list[str]:
    lines = (paths.ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line.replace('"', "'") for line in lines if line and not line.startswith(("#", "-r"))]


def test_requirement_files_and_project_file_name_the_same_packages() -> None:
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    parts = [project["dependencies"], *(extras[name] for name in ("training", "gate", "audit"))]
    assert requirements("requirements.txt") == list(dict.fromkeys(line for part in parts for line in part))
    assert set(extras["dev"]) <= set(requirements("requirements-check.txt"))
    assert {*extras["operators"], *extras["credentials"]} == set(environment.SIGNATURES)
    assert set(extras["credentials"]) <= set(requirements("requirements-test.txt"))


def test_the_project_file_names_every_package_of_the_pack() -> None:
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join(("modular_lora_guard", *file.relative_to(paths.ROOT).parts[:-1]))
        for file in paths.ROOT.glob("*/**/__init__.py")
        if file.relative_to(paths.ROOT).parts[0] not in (".run", "tests", "benchmarks")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == {"modular_lora_guard", *found}
