"""Errors of the pack. Each message is one line: subject, value, remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class GuardError(RuntimeError):
    """The guard stopped something: a LoRA that does not apply whole, a refused path, a run that fell short."""


class LoraFileError(GuardError):
    """A LoRA file that cannot be read safely or is not a LoRA that the guard understands."""


class HandleError(GuardError, AttributeError):
    """A guarded model was used as something else; an AttributeError too, so that hasattr() keeps its meaning."""


@contextmanager
def writing(what: object, kind: type[GuardError] = GuardError) -> Iterator[None]:
    """Around the writing of a file or folder: an OSError becomes a ``kind`` that names ``what`` and a remedy."""
    try:
        yield
    except OSError as error:
        reason = plain(str(error.strerror or error))
        raise kind(f"{what}: cannot be written ({reason}): check the folder and the free space on its disk.") from error


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
