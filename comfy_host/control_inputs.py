"""Control latents of Flux: ComfyUI concatenates them only when the weight of img_in has enough input channels.

Flux.concat_cond reads that number from the weight. A control LoRA would widen the weight, but a
guarded model's weight stays W0, so for the time of that call the layer shows a weight of the shape that its LoRAs need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..modular_lora.branches.attachment import Branches

WEIGHT, CONCAT = "weight", "concat_cond"


def widen(patcher, branches: Branches) -> None:
    """Have ``patcher`` (a fresh clone) concatenate the channels that its LoRAs read (ModelPatcher.add_object_patch)."""
    for path in branches.wide:
        shape = branches.layers[path].spec.weight_shape
        drawn = _drawn(patcher.get_model_object(CONCAT), patcher.get_model_object(path), shape)
        patcher.add_object_patch(CONCAT, drawn)


def _drawn(concat_cond: Callable, layer: torch.nn.Module, shape: tuple[int, ...]) -> Callable:
    def drawn(**kwargs):
        layer.__dict__[WEIGHT] = torch.empty(shape, device="meta")  # found before the module's own, which stays
        try:
            return concat_cond(**kwargs)
        finally:
            del layer.__dict__[WEIGHT]

    return drawn
