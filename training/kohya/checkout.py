"""A checkout of sd-scripts on this machine: which one, which version, and the interpreter that runs it."""

from __future__ import annotations

import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ...modular_lora.errors import GuardError

NEEDED = ("train_network.py", "library/train_util.py", "networks/lora.py")
GET = "git clone https://github.com/kohya-ss/sd-scripts"


@dataclass(frozen=True)
class Engine:
    """sd-scripts, and how to start it."""

    checkout: Path
    python: str
    accelerate_config: str = ""  # accelerate's own file: several GPUs, several machines
    machine: int = 0  # which of several machines this is, as that file says; the first, 0, writes the LoRA
    version: str = ""  # a release; "0.10.3+": at or after it
    commit: str = ""  # "": the folder is no git checkout

    def __str__(self) -> str:
        return " ".join(filter(None, ["sd-scripts", self.version, self.commit[:12]]))

    def script(self, name: str) -> Path:
        """A training script of the checkout; GuardError where this version has none of that name."""
        path = self.checkout / name
        if not path.is_file():
            since = ": LECO came with 0.10.2" if "leco" in name else ""
            raise GuardError(
                f"{self} has no {name}{since}: update the checkout, or use the embedded engine.", code="kohya.no-script"
            )
        return path


def find_engine(checkout: str = "", python: str = "", accelerate_config: str = "") -> Engine:
    """The checkout at ``checkout`` or SD_SCRIPTS_PATH, and its interpreter; GuardError where something is missing.

    The interpreter is ``python``, SD_SCRIPTS_PYTHON, the checkout's own venv or .venv, or this one.
    """
    given = checkout or os.environ.get("SD_SCRIPTS_PATH", "")
    if not given:
        raise GuardError(
            f"sd-scripts: no checkout is named: give its folder or set SD_SCRIPTS_PATH ({GET}).",
            code="kohya.no-checkout",
        )
    folder = Path(given).expanduser().absolute()
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        inner = folder / "sd-scripts"  # as in kohya_ss, the graphical interface
        hint = f"it is in {inner}" if (inner / NEEDED[0]).is_file() else f"give the folder that {NEEDED[0]} is in"
        raise GuardError(
            f"{folder}: is not an sd-scripts checkout, {', '.join(missing)} missing: {hint}.", code="kohya.no-checkout"
        )
    config = str(Path(accelerate_config).expanduser().absolute()) if accelerate_config else ""
    if config and not Path(config).is_file():
        raise GuardError(
            f"accelerate_config {config}: no such file: make one with 'accelerate config'.", code="kohya.no-accelerate"
        )
    commit, tag = read_commit(folder)
    version = tag or _last_release(folder)
    return Engine(folder, _interpreter(folder, python), config, read_machine(config), version, commit)


def read_machine(config: str) -> int:
    """machine_rank of accelerate's configuration file, YAML or JSON; 0 where there is none."""
    text = Path(config).read_text(encoding="utf-8") if config else ""
    found = re.search(r"^[ {\"]*machine_rank\"?\s*:\s*\"?(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def read_commit(folder: Path) -> tuple[str, str]:
    """(commit, its release tag or "") as .git's files say, without running git; ("", "") where there are none."""
    git = folder / ".git"
    try:
        if git.is_file():  # a submodule or a worktree
            git = (folder / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        common = git / "commondir"
        shared = (git / common.read_text(encoding="utf-8").strip()).resolve() if common.is_file() else git
        packed = shared / "packed-refs"
        lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
        refs = {name: commit for commit, _, name in (line.partition(" ") for line in lines)}
        refs |= _loose_tags(shared)
        if head.startswith("ref:"):
            name = head.removeprefix("ref:").strip()
            loose = next((path for path in (git / name, shared / name) if path.is_file()), None)
            head = loose.read_text(encoding="utf-8").strip() if loose else refs.get(name, "")
    except (OSError, UnicodeDecodeError):
        return "", ""
    if not re.fullmatch(r"[0-9a-f]{40,64}", head):
        return "", ""
    peeled = {line.removeprefix("^"): name for name, line in _annotated(lines)}
    tags = [name for name, commit in refs.items() if name.startswith("refs/tags/") and commit == head]
    tag = peeled.get(head) or next(iter(tags), "")
    return head, tag.removeprefix("refs/tags/")


def _last_release(folder: Path) -> str:
    """The newest version in the README's change history, a "+" after it; "" where there is none."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    found = re.search(r"\bVersion (\d+(?:\.\d+)+)", text)
    return f"{found[1]}+" if found else ""


def _loose_tags(git: Path) -> dict[str, str]:
    folder = git / "refs" / "tags"
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {path.relative_to(git).as_posix(): path.read_text(encoding="utf-8").strip() for path in files}


def _annotated(lines: list[str]) -> list[tuple[str, str]]:
    """(tag, ^commit) of packed-refs: the line after an annotated tag names the commit that it stands on."""
    return [(above.partition(" ")[2], line) for above, line in itertools.pairwise(lines) if line[:1] == "^"]


def _interpreter(folder: Path, python: str) -> str:
    given = python or os.environ.get("SD_SCRIPTS_PYTHON", "")
    if given and not Path(given).expanduser().is_file():
        raise GuardError(
            f"python {given}: no such file: give the interpreter of sd-scripts' environment.", code="kohya.no-python"
        )
    own = [folder / env / place for env in ("venv", ".venv") for place in ("bin/python", "Scripts/python.exe")]
    found = next((str(path) for path in own if path.is_file()), sys.executable)
    return str(Path(given).expanduser().absolute()) if given else found
