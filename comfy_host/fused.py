"""Fused operations of newer versions of ComfyUI, which have no gradient, as plain ones while a training runs.

ComfyUI 0.33.0 rotates positions and normalizes by operations of the library comfy-kitchen that take the forward pass
alone. Where ComfyUI knows of a training (``in_training``) it uses its own in their place, as in Flux; where it does
not, as in Cosmos and JoyImage, the functions of the same name of comfy-kitchen's eager backend, plain PyTorch, stand in
theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import comfy.model_management

FUSED = ("apply_rope", "rms_rope", "adaln", "rms_adaln")  # how the names begin


def _plain() -> list[tuple[ModuleType, str, Callable]]:
    """comfy-kitchen, the names of its fused functions, and the plain ones for them; nothing without that library."""
    try:
        kitchen = importlib.import_module("comfy_kitchen")
        eager = importlib.import_module("comfy_kitchen.backends.eager")
    except ImportError:
        return []
    names = [name for name in vars(eager) if name.startswith(FUSED) and hasattr(kitchen, name)]
    return [(kitchen, name, getattr(eager, name)) for name in names]


@contextmanager
def with_gradients() -> Iterator[None]:
    """ComfyUI's models compute by operations that have gradients, while inside."""
    changes: list[tuple[ModuleType, str, object]] = [*_plain()]
    if hasattr(comfy.model_management, "in_training"):
        changes.append((comfy.model_management, "in_training", True))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
