"""The noise ε that an image is mixed with: normal, and what is added to it so that large areas are trained as well.

* noise_offset: ε + strength · one number a channel.
* multires noise (pyramid noise): ε + Σ_i discount^i · U(ε_i), ε_i of a size r^i times smaller, r drawn between 2 and 4,
  U bilinear, until a side is 1; divided by the deviation of the batch. sd-scripts' form, with its options' names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options import TaskOptions


def drawn(shape: Sequence[int], options: TaskOptions, generator: torch.Generator) -> Tensor:
    """ε (b c [f] h w, float32) from the CPU generator of its step."""
    eps = torch.randn(*shape, generator=generator)
    if options.noise_offset:
        eps += options.noise_offset * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
    return _pyramid(eps, options, generator) if options.multires_noise_iterations else eps


def _pyramid(eps: Tensor, options: TaskOptions, generator: torch.Generator) -> Tensor:
    flat = eps.flatten(1, -3)  # b cf h w
    height, width = flat.shape[-2:]
    for i in range(options.multires_noise_iterations):
        ratio = (2 + 2 * torch.rand((), generator=generator).item()) ** i
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn(*flat.shape[:2], *size, generator=generator)
        flat = flat + F.interpolate(coarse, (height, width), mode="bilinear") * options.multires_noise_discount**i
        if 1 in size:
            break
    return (flat / flat.std()).view_as(eps)
