"""The one place that writes to the terminal, and the error that ends a command."""

from __future__ import annotations

import sys

from ...modular_lora.util.terminal import HANDLER


class RunError(RuntimeError):
    """A command cannot go on; the message is what the user reads, the code tells what happened apart."""

    code: str = "command"

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


def say(text: str = "", *, end: str = "\n") -> None:
    """Write a line to standard output, even where the terminal cannot show every character."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write((text + end).encode(encoding, HANDLER).decode(encoding))
    sys.stdout.flush()


def is_terminal() -> bool:
    return sys.stdout.isatty()


def status(text: str, *, final: bool = False) -> None:
    """Show a line that later ones overwrite; a terminal sees each, a log file only the final one."""
    if is_terminal():
        say(f"\r\033[K{text}", end="\n" if final else "")
    elif final:
        say(text)
