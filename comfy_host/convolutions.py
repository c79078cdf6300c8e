"""3×3 convolutions of a few pixels as matrix products, for training on the CPU.

PyTorch's own CPU convolution rearranges a frozen layer's whole weight in every call; at the U-Net's lowest resolutions
that costs more than the sum itself. im2col and one product read the weight once: half the time at 8×8 and below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

FEW = 256  # pixels of the whole batch


@cache
def _product(base: type) -> type:
    """A subclass of a convolution's own class, so that whatever asks for its type still finds it."""

    class Product(base):
        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            b, _, h, w = x.shape
            other = x.dtype != self.weight.dtype or getattr(self, "weight_function", None)
            if b * h * w > FEW or other or not _plain(self):  # PEFT makes its adapters of the class it finds
                return super().forward(x, *args, **kwargs)
            columns = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)  # in·3·3 b·h·w
            y = self.weight.flatten(1) @ columns  # out b·h·w
            y = y if self.bias is None else y + self.bias[:, None]
            return y.view(-1, b, h, w).transpose(0, 1)  # b out h w

    Product.__name__ = f"Product{base.__name__}"
    return Product


@contextmanager
def small_as_products(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Every plain 3×3 convolution of ``network`` as a product wherever its input is small, while inside."""
    changed: list[tuple[nn.Module, type]] = []
    try:
        for module in network.modules() if wanted else ():
            if isinstance(module, nn.Conv2d) and _plain(module):
                changed.append((module, type(module)))
                own: type = type(module)
                module.__class__ = _product(own)
        yield
    finally:
        for module, before in reversed(changed):
            module.__class__ = before


def _plain(conv: nn.Conv2d) -> bool:
    ones = conv.stride == conv.dilation == conv.padding == (1, 1)
    return ones and conv.kernel_size == (3, 3) and conv.groups == 1 and conv.padding_mode == "zeros"
