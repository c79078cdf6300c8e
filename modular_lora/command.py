"""What the pack's command lines share: ComfyUI's folder, progress as lines of the log, and how an error ends them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .errors import GuardError
from .util.boundary import TYPED, contained

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".run" / "logs"  # where run.py keeps what its commands log
logger = logging.getLogger("modular_lora")


def finish(work: Callable[[], str], interrupted: str) -> int:
    """Say what ``work`` says. Exit code 0; 1 with one line for an error; 130 with ``interrupted`` for Ctrl+C."""
    # Our own lines and everybody's warnings: ComfyUI's start-up log stays out of the terminal.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)

    def told() -> int:
        sys.stdout.write(work() + "\n")
        sys.stdout.flush()
        return 0

    def say(text: str) -> None:
        logger.error("%s", text)

    interrupted = f"interrupted; {interrupted}"
    return contained(told, say, expected=(GuardError,), interrupted=interrupted, logs=LOGS)


def typed(module: str) -> str:
    """The command as it was typed, for usage lines: run.py's where that started us."""
    return os.environ.get(TYPED) or f"python -m {module}"


def find_comfyui(given: Path | None) -> Path:
    """ComfyUI's folder: the given one, else a named one, the one the pack is installed in, or run.py's own."""
    folder = next((path for path in _places(given) if (path / "comfy" / "sd.py").exists()), None)
    if folder is None:
        raise GuardError("ComfyUI was not found: name its folder with --comfyui, or set COMFYUI_PATH.")
    return folder


def _places(given: Path | None) -> list[Path]:
    if given:
        return [given]
    named = [os.environ.get(name) for name in ("MODULAR_LORA_COMFYUI", "COMFYUI_PATH")]
    return [*(Path(name) for name in named if name), ROOT.parent.parent, ROOT / ".run" / "comfyui"]


class Watch(Protocol):
    """What a host shows of work that takes long."""

    def check(self) -> None:
        """Raise to interrupt; what is finished is kept."""

    def stage(self, text: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done of what ``text`` names."""


class Lines:
    """A Watch: progress as lines of the log, ten a stage."""

    def __init__(self) -> None:
        self._said = ("", -1)  # stage, and tenths of it

    def check(self) -> None:
        """Ctrl+C raises by itself."""

    def stage(self, text: str, done: int, total: int) -> None:
        here = (text, 10 * done // max(1, total))
        if here != self._said:
            logger.info("%s: %d of %d", text, done, total)
        self._said = here
