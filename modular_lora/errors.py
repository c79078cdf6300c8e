"""Errors of the pack. Each message is one line: subject, value, remedy. Each error has a code besides, which stays when
its sentence is worded better: programs and tests tell errors apart by class and code, people read the sentence.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class GuardError(RuntimeError):
    """The guard stopped something: a LoRA that does not apply whole, a refused path, a run that fell short.

    Args:
        message: One line: subject, value, remedy.
        code: What happened, in lower case, by subject and kind ("file.not-a-lora"); the class's own where nobody tells
            this error from others of its class.
    """

    code: str = "guard"

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class LoraFileError(GuardError):
    """A LoRA file that cannot be read safely or is not a LoRA that the guard understands."""

    code = "file"


class HandleError(GuardError, AttributeError):
    """A guarded model was used as something else; an AttributeError too, so that hasattr() keeps its meaning."""

    code = "handle"


@contextmanager
def writing(what: object, kind: type[GuardError] = GuardError) -> Iterator[None]:
    """Around the writing of a file or folder: an OSError becomes a ``kind`` that names ``what`` and a remedy.

    The code is the kind's own and ``.not-written``.
    """
    try:
        yield
    except OSError as error:
        reason = plain(str(error.strerror or error))
        said = f"{what}: cannot be written ({reason}): check the folder and the free space on its disk."
        raise kind(said, code=f"{kind.code}.not-written") from error


def shown(value: object) -> str:
    """A value out of a file on one printable line of bounded length; a file may nest it deeper than repr() can go."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 3, 120
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python turns into a text
        return "a number too long to print"


def plain(text: str, limit: int = 120) -> str:
    """Text out of a file on one printable line of bounded length, without quotes."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def one_line(error: object) -> str:
    """An error of another library on one printable line of bounded length; its class where it says nothing."""
    return plain(" ".join(str(error).split()) or type(error).__name__, 300)
