"""`run.py --comfyui-git REF`: a ComfyUI out of a git repository, here a local one, beside the pinned one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from modular_lora_guard.tools.bootstrap import comfyui, environment, from_git, paths
from modular_lora_guard.tools.bootstrap.console import RunError
from support.errors import refuses

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": "a@example" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.check_output(command, text=True, env={**os.environ, **who}).strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """ComfyUI's repository with two releases; the second asks for more."""
    made = tmp_path / "repository"
    (made / "comfy").mkdir(parents=True)
    (made / "comfy" / "sd.py").touch()
    (made / "main.py").touch()
    git(made, "init", "-q", "-b", "master")
    for version, requirements in (("0.33.0", "torch\naiohttp\n"), ("0.99.0", "torch\ntorchaudio\naiohttp>=3\n")):
        (made / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        (made / "requirements.txt").write_text(requirements)
        git(made, "add", "-A")
        git(made, "commit", "-q", "-m", version)
        git(made, "tag", f"v{version}")
    return made


def bare(interpreter: Path, folder: Path) -> None:
    """An environment without pip, which is asked for nothing here and takes long to put there."""
    subprocess.run([str(interpreter), "-m", "venv", "--without-pip", str(folder)], check=True)


@pytest.fixture
def asked(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is asked of pip; the pinned ComfyUI is there, and this interpreter stands for its environment."""
    run = tmp_path / "clone" / ".run"
    for name, place in {"RUN": run, "LOGS": run / "logs", "FROM_GIT": run / "from-git"}.items():
        monkeypatch.setattr(paths, name, place)
    (run / "comfyui").mkdir(parents=True)
    (run / "comfyui" / "main.py").write_text("pinned")
    monkeypatch.setattr(environment, "ensure_bundled", lambda: Path(sys.executable))
    monkeypatch.setattr(environment, "_lock", None)
    monkeypatch.setattr(environment, "_new_venv", bare)
    monkeypatch.setenv(from_git.VARIABLE, str(repository))
    found: list[list[str]] = []
    monkeypatch.setattr(environment, "pip", lambda python, title, given: found.append([*map(str, given)]))
    return found


def test_a_newer_comfyui_comes_beside_the_pinned_one_with_what_it_asks_for(
    asked: list[list[str]], repository: Path
) -> None:
    host = comfyui.find(bundled=False, ref="v0.99.0")
    assert host.version == "0.99.0"
    assert git(repository, "rev-parse", "v0.99.0")[:10] in host.origin
    packages, audio = asked
    assert Path(packages[1]).read_text().split() == ["aiohttp>=3"], "PyTorch stays the pinned environment's"
    assert packages[3] == str(paths.ROOT / "requirements.txt")
    assert audio == ["--no-deps", "torchaudio"]
    seen = subprocess.check_output([host.python, "-c", "import pytest, sys; print(sys.prefix)"], text=True).strip()
    assert Path(seen) == paths.FROM_GIT / "v0.99.0" / "venv" != Path(sys.prefix)
    assert (paths.RUN / "comfyui" / "main.py").read_text() == "pinned"
    assert not paths.COMFYUI.is_relative_to(paths.FROM_GIT)


def test_what_was_fetched_stays_and_needs_no_repository_again(asked: list[list[str]], repository: Path) -> None:
    first = comfyui.find(bundled=False, ref="master")
    count = len(asked)
    shutil.rmtree(repository)
    assert comfyui.find(bundled=False, ref="master") == first
    assert len(asked) == count


def test_every_name_has_a_folder_and_an_environment_of_its_own(asked: list[list[str]]) -> None:
    hosts = [comfyui.find(bundled=False, ref=ref) for ref in ("v0.33.0", "v0.99.0", "master")]
    assert [host.version for host in hosts] == ["0.33.0", "0.99.0", "0.99.0"]
    assert len({host.folder for host in hosts}) == len({host.python for host in hosts}) == 3
    assert all(host.bundled for host in hosts), "test tools may go into its environment"
    assert [given for given in asked if "torchaudio" in given] == [["--no-deps", "torchaudio"]] * 2


def test_a_whole_commit_is_a_name_too(asked: list[list[str]], repository: Path) -> None:
    commit = git(repository, "rev-parse", "v0.33.0")
    assert comfyui.find(bundled=False, ref=commit).version == "0.33.0"


@pytest.mark.parametrize(
    ("ref", "source", "code", "named"),
    [
        ("v9.9.9", None, "command.exit-code", "git fetch"),
        ("master", "nowhere", "command.exit-code", "COMFYUI_GIT"),
        ("--upload-pack=x", None, "command.git-ref", ""),
        ("../up", None, "command.git-ref", ""),
    ],
)
def test_what_cannot_be_had_is_named_with_a_remedy_and_leaves_nothing(
    ref: str,
    source: str | None,
    code: str,
    named: str,
    asked: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if source:
        monkeypatch.setenv(from_git.VARIABLE, str(tmp_path / source))
    with refuses(code, ref, named):
        comfyui.find(bundled=False, ref=ref)
    assert not list(paths.FROM_GIT.glob("*/comfyui*"))
    assert not asked


def test_another_repository_is_no_comfyui(asked: list[list[str]], repository: Path) -> None:
    git(repository, "rm", "-q", "-r", "comfy")
    git(repository, "commit", "-q", "-m", "something else")
    with refuses("command.no-comfyui", "comfy"):
        comfyui.find(bundled=False, ref="master")


def test_without_git_the_remedy_is_another_way(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_git.shutil, "which", lambda name: None)
    with refuses("command.no-git", "COMFYUI_PATH"):
        comfyui.find(bundled=False, ref="master")


def test_a_comfyui_without_torchaudio_to_be_had_is_installed_all_the_same(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def pip(python: Path, title: str, given: list[str]) -> None:
        if "torchaudio" in given:
            raise RunError("torchaudio: exit code 1.\nlines")

    monkeypatch.setattr(environment, "pip", pip)
    assert comfyui.find(bundled=False, ref="v0.99.0").version == "0.99.0"
    assert "A ComfyUI that imports it at the start does not start." in capsys.readouterr().out
