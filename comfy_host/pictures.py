"""Images, latents and masks among the values that nodes take and give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..modular_lora.provenance.edits import Kind

CONTAINERS = (list, tuple, Mapping)


def pictures(value: Any) -> Iterator[tuple[Kind, torch.Tensor]]:
    """Every image, latent and mask in a value: a batch each.

    ComfyUI tells them apart by form: a latent lies in a mapping under "samples", an image is b h w c, a mask has fewer
    dimensions. The frames of a video are images.
    """
    waiting, seen = [value], {}  # what was seen is kept, as the place of what is gone is given to the next
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            if one.is_floating_point():
                yield ("image" if one.ndim > 3 else "mask"), one
        elif isinstance(one, CONTAINERS) and id(one) not in seen:
            seen[id(one)] = one
            if isinstance(one, Mapping):
                if isinstance(samples := one.get("samples"), torch.Tensor) or getattr(samples, "is_nested", False):
                    yield "latent", samples
                waiting.extend(item for key, item in one.items() if key not in ("samples", "noise_mask"))
            else:
                waiting.extend(one)
        elif is_video(one):
            waiting.append(one.get_components().images)


def is_video(value: Any) -> bool:
    """Of ComfyUI's own classes, without a file behind it: one of a file holds what no run of this prompt made."""
    return type(value).__name__ == "VideoFromComponents" and type(value).__module__.startswith("comfy_api.")
