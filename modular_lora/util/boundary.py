"""Where the errors of a command end: one sentence and an exit code, never a traceback on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TYPED = "MODULAR_LORA_TYPED"  # variable: the command of run.py that started a module with a command line of its own


def contained(
    work: Callable[[], int],
    say: Callable[[str], None],
    *,
    expected: tuple[type[Exception], ...],
    interrupted: str,
    logs: Path,
) -> int:
    """The exit code of ``work``, or of what ended it.

    Args:
        say: Takes the sentence.
        expected: Errors whose message is such a sentence.
        interrupted: What is said at Ctrl+C.
        logs: Folder in which the traceback of any other error is kept.

    Returns:
        What ``work`` gives; 1 after an error; 130 after Ctrl+C.
    """
    try:
        return work()
    except expected as error:
        say(str(error))
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read our output has enough
    except OSError as error:
        say(of_system(error))
    except Exception as error:
        say(_unexpected(error, logs))
    return 1


def of_system(error: OSError) -> str:
    """What the operating system refused, with the file's name and what to look at."""
    files = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    remedies = {
        FileNotFoundError: "check the path",
        NotADirectoryError: "a part of this path is a file: name another folder",
        IsADirectoryError: "a file is needed here, not a folder",
        FileExistsError: "choose another name",
        PermissionError: "choose a place that you may write to, or change its permissions",
    }
    remedy = next((text for kind, text in remedies.items() if isinstance(error, kind)), "look at disk and network")
    return f"{files}: {reason}: {remedy}." if files else f"{reason}: {remedy}."


def _unexpected(error: Exception, logs: Path) -> str:
    """One line; the traceback goes to a file for whoever mends it, or to stderr where none can be written."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    first = (str(error).strip().splitlines() or ["no message"])[0]
    place = logs / "unexpected-error.log"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    except OSError:
        sys.stderr.write(text)
        return f"{type(error).__name__}: {first}. This is a fault of the program; the lines above say where."
    return f"{type(error).__name__}: {first}. This is a fault of the program; {place} says where."


def _drop_output() -> None:
    """Nothing more goes to standard output, also when Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
