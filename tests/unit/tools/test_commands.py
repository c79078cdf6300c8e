"""How commands end: one sentence for what is wrong, before the work begins; a help text installs nothing."""

from __future__ import annotations

import argparse
import errno
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from modular_lora_guard import run as run_py
from modular_lora_guard.audit import cli as audit
from modular_lora_guard.modular_lora import command
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.util import atomic, boundary
from modular_lora_guard.operators import cli as operators
from modular_lora_guard.tools import usage as tools_usage
from modular_lora_guard.tools.bootstrap import environment, paths, usage
from modular_lora_guard.tools.bootstrap.console import RunError
from modular_lora_guard.tools.demo import server
from modular_lora_guard.tools.world import ASSETS, evidence
from modular_lora_guard.tools.world.equal import command as evidence_equal
from modular_lora_guard.training import cli as training
from support.errors import refuses

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What run.py needs before anything is installed, in a clone of its own."""
    made = tmp_path / "clone"
    for folder in ("importable", "modular_lora", "tools/bootstrap"):
        shutil.copytree(ROOT / folder, made / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("run.py", "tools/__init__.py"):
        shutil.copyfile(ROOT / file, made / file)
    return made


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "COMFYUI_PATH": "", "PYTHONUTF8": "1"}
    command = [sys.executable, "-I", "-S", str(clone / "run.py"), *arguments]  # Python's own library alone
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=settings, check=False)


def lines(parser: argparse.ArgumentParser, *before: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """A command and all commands below it, with their parsers."""
    yield before, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from lines(inner, *before, name)


def own_lines(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every command of run.py with options of its own: the parser that reads them once everything is installed."""
    found = {}
    for name, parser in tools_usage.PARSERS.items():
        monkeypatch.setenv(boundary.TYPED, f"run.py {name}")
        found |= dict(lines(parser(), name))
    return found


@pytest.mark.parametrize(
    "name", ["demo", "test", "check", "comfy", "lora", "audit", "operator", "evidence", "evidence-equal"]
)
def test_help_installs_nothing(name: str, clone: Path) -> None:
    answer = run(clone, name, "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"usage: run.py {name}" in answer.stdout
    assert not (clone / ".run").exists()


@pytest.mark.slow
def test_the_help_of_every_command_is_the_commands_own_before_anything_is_installed(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = own_lines(monkeypatch)
    assert ("lora", "train-task") in found
    assert ("operator", "record", "show") in found
    for names, parser in found.items():
        answer = run(clone, *names, "--help")
        parser.epilog = usage.EPILOG if len(names) == 1 else None
        assert answer.stdout == parser.format_help(), names
        assert (answer.returncode, answer.stderr) == (0, ""), names
    assert not (clone / ".run").exists()


def test_what_the_commands_take_is_written_down_as_it_is() -> None:
    said = json.loads(usage.FILE.read_text(encoding="utf-8"))
    assert said == json.loads(tools_usage.text()), "an option has changed: python -m tools.usage"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("lora",), "command"),
        (("lora", "train"), "train-task"),
        (("lora", "train-task"), "--checkpoint"),
        (("lora", "train-task", "--checkpoint", "a", "--network_dim", "many"), "--network_dim"),
        (("lora", "train-task", "--checkpoint", "a", "--max_token_length", "76"), "--max_token_length"),
        (("audit", "run", "--checkpoint", "a", "--engine", "cluster"), "--engine"),
        (("operator",), "command"),
        (("operator", "sign", "file"), "--key"),
        (("lora", "train-task", "--checkpoint", "a", "--max_train_stepz", "5"), "--max_train_stepz"),
        (("operator", "verify", "--foo", "a.png"), "--foo"),
        (("evidence", "--nonsense"), "--nonsense"),
        (("evidence", "--comfyui-gti", "a"), "--comfyui-gti"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_a_command_cannot_mean_is_refused_before_anything_is_installed(
    given: tuple[str, ...], word: str, clone: Path
) -> None:
    answer = run(clone, *given)
    assert answer.returncode == 2
    assert word in answer.stderr.splitlines()[-1]
    assert not (clone / ".run").exists()


@pytest.mark.parametrize(
    "given",
    [
        ("lora", "train-task", "--checkpoint", "a.safetensors", "--project", "--no-flip_aug", "--sample_prompts", "a"),
        ("lora", "train-safety", "--checkpoint", "a", "--engine", "kohya", "--an_option_of_sd_scripts", "1"),
        ("audit", "run", "--checkpoint", "a", "--img2img", "0.5", "0.7", "--devices", "0", "1"),
        ("operator", "record", "show", "folder", "--last", "0"),
        ("evidence", "--cpu", "--engine", "processes", "--workers", "2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_command_takes_is_not_refused_before_it_is_installed(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *rest = given
    theirs = tools_usage.PARSERS[command]().parse_known_args(rest)
    ours = usage.parser_of(command).parse_known_args(rest)
    assert ours[1] == theirs[1]
    assert vars(ours[0]).keys() >= vars(theirs[0]).keys() - {"run"}


@pytest.mark.parametrize("place", [0, 1, 3])
def test_which_comfyui_may_be_said_before_and_behind_a_commands_own_words(place: int) -> None:
    words = ["train-task", "--checkpoint", "a.safetensors"]
    options, rest = run_py.parse(["lora", *words[:place], "--comfyui-git", "v0.33.0", *words[place:]])
    assert (options.command, options.comfyui_git, options.bundled, rest) == ("lora", "v0.33.0", False, words)


@pytest.mark.parametrize(
    "given",
    [
        ("demo", "--steps", "0"),
        ("demo", "--steps", "many"),
        ("demo", "--seed", "-1"),
        ("comfy", "--port", "0"),
        ("comfy", "--port", "65536"),
        ("comfy", "--", "--port", "8188"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_before_anything_is_installed(given: tuple[str, ...], clone: Path) -> None:
    answer = run(clone, *given)
    assert answer.returncode == 2
    assert "usage: run.py" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (clone / ".run").exists()


def test_an_output_folder_that_cannot_be_written_is_found_out_before_anything_is_installed(clone: Path) -> None:
    (clone / "taken").touch()
    answer = run(clone, "demo", "--output", str(clone / "taken" / "report"))
    assert answer.returncode == 1
    assert answer.stdout.count("\n") == 1
    assert str(clone / "taken" / "report") in answer.stdout
    assert not answer.stderr
    assert not (clone / ".run").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RunError("said so"), "said so"),
        (GuardError("said so"), "said so"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.txt"), "gone.txt: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "kept.txt"), "kept.txt: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero. This is a fault of the program"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_every_error_ends_in_one_line(error: Exception, words: str, tmp_path: Path) -> None:
    said: list[str] = []
    expected = (RunError, GuardError)

    def work() -> int:
        raise error

    assert boundary.contained(work, said.append, expected=expected, interrupted="", logs=tmp_path) == 1
    (line,) = said
    assert words in line
    assert "\n" not in line
    unexpected = isinstance(error, ZeroDivisionError)
    assert (tmp_path / "unexpected-error.log").exists() == unexpected


def test_an_interrupt_says_what_to_do_next(tmp_path: Path) -> None:
    def work() -> int:
        raise KeyboardInterrupt

    said: list[str] = []
    assert boundary.contained(work, said.append, expected=(), interrupted="go on so", logs=tmp_path) == 130
    assert said == ["go on so"]


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1] + '/importable')\n"
        "from modular_lora_guard.modular_lora.util.boundary import contained\n"
        "def work():\n    while True: print('x' * 1000)\n"
        "sys.exit(contained(work, sys.stderr.write, expected=(), interrupted='', logs=None))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.wait(timeout=30) == 1
    assert child.stderr is not None
    assert child.stderr.read() == b""


@pytest.mark.parametrize(
    ("main", "given"),
    [
        (training.main, ["train-task", "--checkpoint", "GONE", "--train_data_dir", "GONE", "--output_dir", "OUT"]),
        (training.main, ["train-safety", "--config", "GONE", "--checkpoint", "GONE"]),
        (training.main, ["train-task", "--checkpoint", "FILE", "--vae", "GONE", "--output_dir", "OUT"]),
        (training.main, ["train-task", "--checkpoint", "FILE", "--output_dir", "FILE/below"]),
        (training.main, ["inspect", "GONE"]),
        (training.main, ["project", "GONE", "GONE", "--output", "OUT"]),
        (audit.main, ["run", "--checkpoint", "GONE", "--output_dir", "OUT"]),
        (audit.main, ["run", "--checkpoint", "FILE", "--safety", "GONE", "--output_dir", "OUT"]),
        (audit.main, ["run", "--checkpoint", "FILE", "--output_dir", "FILE/below"]),
        (audit.main, ["page", "GONE"]),
        (operators.main, ["sign", "GONE", "--key", "GONE"]),
        (operators.main, ["verify", "GONE", "--keys", "GONE"]),
        (operators.main, ["record", "show", "GONE"]),
        (operators.main, ["record", "verify", "GONE"]),
        (operators.main, ["policy", "check", "GONE"]),
        (evidence.main, ["--protocol", "GONE", "--loras", "OUT"]),
        (evidence_equal.main, ["--protocol", "GONE", "--results", "OUT"]),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else one.__module__.split(".")[-2],
)
def test_a_path_that_is_wrong_is_named_before_a_checkpoint_is_loaded(
    main, given: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LOGS", tmp_path / "logs")
    (tmp_path / "file").write_text("x")
    places = {"GONE": tmp_path / "gone", "FILE": tmp_path / "file", "OUT": tmp_path / "out"}
    made = [str(places[first] / rest) if (first := one.partition("/")[0]) in places and (rest := one.partition("/")[2])
            else str(places.get(one, one)) for one in given]  # fmt: skip
    for name in ("comfy", "comfy.sd"):
        monkeypatch.setitem(sys.modules, name, None)  # nothing of ComfyUI may be needed
    assert main(made) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "gone" in line or "file" in line
    assert "fault of the program" not in line
    assert "\n" not in line


@pytest.mark.parametrize("module", [training, audit, operators])
def test_usage_shows_what_was_typed(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(boundary.TYPED, "run.py this")
    assert module.parser().format_usage().startswith("usage: run.py this ")
    monkeypatch.delenv(boundary.TYPED)
    assert module.parser().format_usage().startswith(f"usage: python -m {module.__name__.split('.')[-2]} ")


def test_only_our_own_lines_and_warnings_reach_the_terminal() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1] + '/importable')\n"
        "import logging; from modular_lora_guard.modular_lora import command\n"
        "def work():\n"
        "    logging.info('Total VRAM'); logging.getLogger('modular_lora').info('step 1'); logging.warning('look')\n"
        "    return 'done'\n"
        "sys.exit(command.finish(work, ''))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "done\n"
    assert answer.stderr.split("\n")[:-1] == ["step 1", "look"]
    assert command.typed("training")


class _Other(http.server.BaseHTTPRequestHandler):
    """Another server, which answers everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def other() -> Iterator[int]:
    """The port of another server."""
    with http.server.ThreadingHTTPServer((server.HOST, 0), _Other) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def fake(tmp_path: Path, port: int) -> server.Server:
    """A ComfyUI that starts and listens nowhere."""
    (tmp_path / "comfyui" / "comfy").mkdir(parents=True)
    (tmp_path / "comfyui" / "comfy" / "cli_args.py").touch()
    (tmp_path / "comfyui" / "main.py").write_text("import time; time.sleep(60)")
    log = tmp_path / "log"
    return server.Server(tmp_path / "comfyui", sys.executable, tmp_path, log=log, cpu=True, port=port)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path, other: int) -> None:
    made = fake(tmp_path, other)
    with refuses("command.port", other):
        made.start()
    assert not made.log.exists()


@pytest.mark.slow
def test_a_server_that_was_not_started_by_us_is_never_announced_as_ours(
    tmp_path: Path, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ensure_free", lambda port: None)  # the other one came just after we had looked
    made = fake(tmp_path, other)
    assert made.answers()
    with refuses("command.no-answer"):
        made.start(timeout=3)


def test_a_port_beyond_all_ports_is_refused() -> None:
    with refuses("command.port", "70000"):
        server.ensure_free(70_000)
    with socket.socket() as one:
        one.bind((server.HOST, 0))
        free = one.getsockname()[1]
    server.ensure_free(free)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose `.run` is as it should be; what would install anew raises."""
    root = tmp_path / "clone"
    for name in ("requirements.txt", "constraints.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("a\n")
    at(root, monkeypatch)
    python = environment.python_of(root / ".run" / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    for stamp in (root / ".run" / "venv" / "comfyui.stamp", root / ".run" / "comfyui" / "copy.stamp"):
        atomic.write(stamp, environment._expected(), parents=True)
    atomic.write(root / ".run" / environment.MAKER, str(root))

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("installed anew")

    for name in ("_make_venv", "_install", "ensure_copy"):
        monkeypatch.setattr(environment, name, touched)
    return root


def at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the clone lay there, in a process of its own."""
    run = root / ".run"
    places = {"ROOT": root, "RUN": run, "VENV": run / "venv", "COMFYUI": run / "comfyui", "LOGS": run / "logs"}
    for name, place in places.items():
        monkeypatch.setattr(paths, name, place)
    if environment._lock is not None:
        os.close(environment._lock)
        environment._lock = None  # for good: monkeypatch would bring back the number of a closed file
    monkeypatch.setattr(environment, "_lock", None)


def second(installed: Path, monkeypatch: pytest.MonkeyPatch, requirements: str = "a\n") -> Path:
    """Another clone."""
    other = installed.parent / "other"
    other.mkdir()
    for name in ("requirements.txt", "constraints.txt"):
        (other / name).write_text(requirements if name == "requirements.txt" else "a\n")
    at(other, monkeypatch)
    return other


def test_a_run_folder_that_was_moved_is_used_as_it_is(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = installed.rename(installed.parent / "moved")
    at(moved, monkeypatch)
    assert environment.ensure_bundled() == environment.python_of(moved / ".run" / "venv")


def test_a_linked_run_folder_is_used_as_it_is(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = second(installed, monkeypatch)
    (other / ".run").symlink_to(installed / ".run")
    assert environment.ensure_bundled() == environment.python_of(other / ".run" / "venv")


def test_a_linked_run_folder_that_does_not_fit_is_refused_and_left_alone(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = second(installed, monkeypatch, "a\nb\n")
    (other / ".run").symlink_to(installed / ".run")
    with refuses("command.shared"):
        environment.ensure_bundled()
    assert (installed / ".run" / "comfyui" / "copy.stamp").exists()


def test_a_link_that_leads_nowhere_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = second(installed, monkeypatch)
    (other / ".run").symlink_to(installed / "gone")
    with refuses("command.link-to-nothing"):
        environment.ensure_bundled()


def test_a_run_folder_of_ones_own_is_not_changed_while_a_command_uses_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows itself keeps files that are in use")
    (installed / "requirements.txt").write_text("a\nb\n")
    user = os.open(installed / ".run" / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(user, fcntl.LOCK_SH)
        with refuses("command.in-use"):
            environment.ensure_bundled()
    finally:
        os.close(user)
    with pytest.raises(AssertionError, match="installed anew"):
        environment.ensure_bundled()


def collect(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", "-q", *arguments]
    settings = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_XDIST_WORKER")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=settings | variables)


@pytest.mark.slow
def test_without_a_browser_the_last_line_says_what_was_not_tested_and_ci_fails() -> None:
    given = ("tests/browser/test_browser_words.py", "-k", "pages")
    without = {"MODULAR_LORA_NO_BROWSER": "chromium not found", "MODULAR_LORA_COMFYUI": "x", "MODULAR_LORA_WORLD": "x"}
    answer = collect(*given, **without)
    assert answer.returncode == 0, answer.stdout
    last = answer.stdout.strip().splitlines()[-1]
    assert last.startswith("NOT TESTED: 2 tests")
    assert "chromium not found" in last
    assert collect(*given, CI="true", **without).returncode == 1
    assert collect(*given, CI="false", **without).returncode == 0


@pytest.mark.slow
def test_long_trials_are_samples_with_a_fixed_seed_unless_all_are_asked_for() -> None:
    given = ("tests/comfy/guard/test_mutations.py", "--collect-only")
    some, again, whole = collect(*given), collect(*given), collect(*given, "--all")
    groups = [
        [line for line in answer.stdout.splitlines() if "test_no_image_is_unguarded" in line]
        for answer in (some, again, whole)
    ]
    assert groups[0] == groups[1]
    assert 0 < len(groups[0]) < len(groups[2])
    assert ASSETS.is_dir()
