"""Fused operations of newer versions of ComfyUI, which have no gradient, as plain ones while a training runs.

ComfyUI 0.33.0 rotates positions and normalizes by operations of the library comfy-kitchen that take the forward pass
alone. Where ComfyUI knows of a training (``in_training``) it uses its own in their place, as in Flux; where it does
not, as in Cosmos and JoyImage, the functions of the same name of comfy-kitchen's eager backend, plain PyTorch, stand in
theirs.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import comfy.model_management

FUSED = ("apply_rope", "rms_rope", "adaln", "rms_adaln")  # how the names begin
Change = tuple[ModuleType, str, object]  # a module, the name of what it has there, and what is to stand in its place


def with_gradients() -> list[Change]:
    """What is to be changed while a training runs, so that models compute by operations that have gradients."""
    known = comfy.model_management
    changes: list[Change] = [(known, "in_training", True)] if hasattr(known, "in_training") else []
    try:
        kitchen = importlib.import_module("comfy_kitchen")
        eager = importlib.import_module("comfy_kitchen.backends.eager")
    except ImportError:
        return changes
    names = [name for name in vars(eager) if name.startswith(FUSED) and hasattr(kitchen, name)]
    return [*changes, *((kitchen, name, getattr(eager, name)) for name in names)]
