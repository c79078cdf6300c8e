"""Errors of the pack. Each message is one line: subject, value, remedy."""

from __future__ import annotations

import reprlib


class GuardError(RuntimeError):
    """The guard stopped something: a LoRA that does not apply whole, a refused path, a run that fell short."""


class LoraFileError(GuardError):
    """A LoRA file that cannot be read safely or is not a LoRA that the guard understands."""


class HandleError(GuardError, AttributeError):
    """A guarded model was used as something else; an AttributeError too, so that hasattr() keeps its meaning."""


def shown(value: object) -> str:
    """A value out of a file on one printable line of bounded length; a file may nest it deeper than repr() can go."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 3, 120
    try:
        return short.repr(value)
    except ValueError:  # more digits than Python turns into a text
        return "a number too long to print"


def plain(text: str) -> str:
    """Text out of a file on one printable line of bounded length, without quotes."""
    return "".join(c if c.isprintable() else "?" for c in text[:120])
