"""Where the errors of a command end: one sentence and an exit code, never a traceback on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .console import RunError
from .paths import LOGS


def contained(
    work: Callable[[], int],
    say: Callable[[str], None],
    *,
    expected: tuple[type[Exception], ...] = (),
    interrupted: str,
) -> int:
    """The exit code of ``work``, or of what ended it.

    Args:
        say: Takes the sentence.
        expected: Errors whose message is such a sentence, beside RunError.
        interrupted: What is said at Ctrl+C.

    Returns:
        What ``work`` gives; 1 after an error; 130 after Ctrl+C.
    """
    try:
        return work()
    except (RunError, *expected) as error:
        say(str(error))
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read our output has enough
    except OSError as error:
        say(of_system(error))
    except Exception as error:
        say(_unexpected(error))
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


def ensure_writable(folder: Path, what: str) -> None:
    """Make ``folder`` and a file in it, before hours of work go into it; RunError where that cannot be."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{what} {folder} cannot be written to ({error.strerror}): choose another folder.") from error


def _unexpected(error: Exception) -> str:
    """One line; the traceback goes to a file for whoever mends it, or to stderr where none can be written."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    first = (str(error).strip().splitlines() or ["no message"])[0]
    place = LOGS / "unexpected-error.log"
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
