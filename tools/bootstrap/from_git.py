"""A ComfyUI out of its git repository, for `--comfyui-git REF`: beside the pinned one, whose PyTorch it shares.

Source and environment have a folder of their own for every REF. What ComfyUI asks for in other versions is installed
there and goes first; nothing of the pinned environment is changed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ...modular_lora.util import atomic
from . import environment, paths
from .console import RunError, say
from .process import child_environment, output_of, run_logged

REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
VARIABLE = "COMFYUI_GIT"  # another repository: a mirror's address, or a folder
REF = re.compile(r"\w[\w./+-]*")  # a tag, a branch, a whole commit
AUDIO = "torchaudio"  # asks for PyTorch, which is there: installed without what it asks for
SOURCE, ENVIRONMENT, STAMP = "comfyui", "venv", "from-git.stamp"


def ensure(ref: str, variables: Mapping[str, str] = os.environ) -> tuple[Path, Path, str]:
    """Fetch ComfyUI at ``ref`` and install what it asks for, unless both are there.

    Args:
        ref: A tag, a branch or a whole commit; a branch stays at the commit that was fetched first.

    Returns:
        The interpreter, ComfyUI's folder and the commit.

    Raises:
        RunError: git is missing, the repository cannot be reached, it has no such ``ref``, or that is no ComfyUI.
    """
    if not REF.fullmatch(ref) or ".." in ref:
        raise RunError(
            f"--comfyui-git {ref!r}: is not the name of a tag, branch or commit: give one, for instance v0.33.0.",
            code="command.git-ref",
        )
    repository = variables.get(VARIABLE, "").strip() or REPOSITORY
    home = paths.FROM_GIT / re.sub(r"[^\w.+-]", "_", ref)
    source = home / SOURCE
    if not (source / ".git").is_dir():
        with environment.changing():
            _fetch(repository, ref, source)
    commit = output_of(["git", "-C", source, "rev-parse", "HEAD"], subject=str(source), remedy=_again(home))
    pinned = environment.ensure_bundled()
    python, requirements = environment.python_of(home / ENVIRONMENT), source / "requirements.txt"
    expected = f"{commit} {environment.fingerprint(requirements, paths.ROOT / 'requirements.txt')}"
    if not environment.is_current(home / ENVIRONMENT / STAMP, expected):
        with environment.changing():
            _install(pinned, home, requirements)
            atomic.write(home / ENVIRONMENT / STAMP, expected, parents=True)
    return python, source, commit


def _again(home: Path) -> str:
    return f"Delete {home} and run the same command again."


def _fetch(repository: str, ref: str, source: Path) -> None:
    """ComfyUI at ``ref`` in ``source``, whole or not at all."""
    git = shutil.which("git")
    if git is None:
        raise RunError(
            "--comfyui-git needs git, which is not installed here: install it, or set COMFYUI_PATH instead.",
            code="command.no-git",
        )
    remedy = (
        f"Look at the lines above: is the network there, and has {repository} a {ref}? {VARIABLE} may name another "
        "repository; COMFYUI_PATH takes a ComfyUI that you have."
    )
    settings = child_environment({"GIT_TERMINAL_PROMPT": "0"})
    with atomic.replacing_folder(source) as part:
        for step in (
            ("init", "--quiet"),
            ("fetch", "--quiet", "--depth", "1", repository, ref),
            ("checkout", "--quiet", "FETCH_HEAD"),
        ):
            run_logged(
                [git, "-C", part, *step],
                title=f"git {step[0]} (ComfyUI {ref})",
                log=paths.LOGS / "git.log",
                remedy=remedy,
                environment=settings,
            )
        missing = [name for name in ("main.py", "comfy", "requirements.txt") if not (part / name).exists()]
        if missing:
            raise RunError(
                f"{repository}, {ref}: no ComfyUI ({', '.join(missing)} not there). Name its repository.",
                code="command.no-comfyui",
            )


def _install(pinned: Path, home: Path, requirements: Path) -> None:
    """An environment that sees the pinned one's packages, with what ComfyUI asks for in other versions."""
    own = environment.new_environment_beside(pinned, home / ENVIRONMENT)
    text = requirements.read_text(encoding="utf-8")
    wanted = home / "requirements.txt"
    atomic.write(wanted, environment.without_torch(text), parents=True)
    environment.pip(own, "what this ComfyUI needs", ["-r", wanted, "-r", paths.ROOT / "requirements.txt", "requests"])
    if any(environment.requirement_name(line) == AUDIO for line in text.splitlines()):
        try:
            environment.pip(own, AUDIO, ["--no-deps", AUDIO])
        except RunError as error:
            say(f"  {AUDIO}: {str(error).splitlines()[0]} A ComfyUI that imports it at the start does not start.")
