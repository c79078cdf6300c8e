"""What ComfyUI computes in another way while a training runs: fused operations, and layers of another precision.

ComfyUI 0.33.0 rotates positions and normalizes by operations of the library comfy-kitchen that take the forward pass
alone. Where ComfyUI knows of a training (``in_training``) it uses its own in their place, as in Flux; where it does
not, as in Cosmos and JoyImage, the functions of the same name of comfy-kitchen's eager backend, plain PyTorch, stand in
theirs.

Some networks compute single layers in float32 whatever the precision of the others (where Wan embeds its patches), and
say so by what they give to the layer. While a training runs all weights have one precision, so the layer takes its
weights in the one that it is given, as ComfyUI does it where it computes in another precision than it stores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.ops

FUSED = ("apply_rope", "rms_rope", "adaln", "rms_adaln")  # how the names begin
LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
Change = tuple[Any, str, object]  # a module or class, the name of what it has, and what is to stand in its place


def with_gradients() -> list[Change]:
    """What is to be changed while a training runs, so that models compute by operations that have gradients."""
    known = comfy.model_management
    changes: list[Change] = [(known, "in_training", True)] if hasattr(known, "in_training") else []
    layers = (getattr(comfy.ops.disable_weight_init, name) for name in LAYERS)
    changes += [(layer, "forward", _in_the_inputs_precision(layer.forward)) for layer in layers]
    try:
        kitchen = importlib.import_module("comfy_kitchen")
        eager = importlib.import_module("comfy_kitchen.backends.eager")
    except ImportError:
        return changes
    names = [name for name in vars(eager) if name.startswith(FUSED) and hasattr(kitchen, name)]
    return [*changes, *((kitchen, name, getattr(eager, name)) for name in names)]


def _in_the_inputs_precision(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer of ComfyUI's, whose weights are taken in the precision of what it is given."""

    def forward(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        same = input.dtype == self.weight.dtype
        return (plain if same else type(self).forward_comfy_cast_weights)(self, input, *args, **kwargs)

    return forward
