"""Errors of the pack. Each message is one line: subject, value, remedy."""

from __future__ import annotations


class GuardError(RuntimeError):
    """The guard stopped something: a LoRA that does not apply whole, a refused path, a run that fell short."""


class LoraFileError(GuardError):
    """A LoRA file that cannot be read safely or is not a LoRA that the guard understands."""


class HandleError(GuardError, AttributeError):
    """A guarded model was used as something else; an AttributeError too, so that hasattr() keeps its meaning."""
