"""LoRA and LoCon, also in Tucker form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...branches.changes import LowRank
from .base import Scaled, Shapes, Unread, check_rank, demand
from .products import Product

_DIMS = ((2, 2), (4, 4), (2, 4), (4, 2), (3, 3), (5, 5))  # of down and up


@dataclass(frozen=True, eq=False)
class LoraLayer(Scaled):
    """ΔW = scale * up @ down."""

    down: Tensor  # r in [k k]
    up: Tensor  # out r [1 1]
    alpha: float | None

    form = "LoRA"
    reads = ("LoRA", "LoCon")
    endings = {
        "lora_down.weight": "down",
        "lora_up.weight": "up",
        "lora_mid.weight": "mid",
        "lora_A.weight": "down",
        "lora_B.weight": "up",
        "lora_A": "down",  # Mochi
        "lora_B": "up",
    }
    patterns = (
        (re.compile(r"(?P<layer>.+)(?:[._]lora|\.lora_linear_layer)\.down\.weight"), "down"),
        (re.compile(r"(?P<layer>.+)(?:[._]lora|\.lora_linear_layer)\.up\.weight"), "up"),
        (re.compile(r"(?P<layer>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight"), "down"),
        (re.compile(r"(?P<layer>.+)\.lora_B\.(?P<adapter>[^.]+)\.weight"), "up"),
    )
    whole = ({"down", "up"}, {"down", "up", "mid"})
    beside = frozenset(("dora_scale", "magnitude"))
    host = ("LoRAAdapter", ("up", "down", "alpha", "mid", "dora_scale", "reshape"))

    @classmethod
    def check(cls, shapes: Shapes) -> int:
        down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
        if (len(down), len(up)) not in _DIMS or math.prod(up[2:]) != 1:
            raise Unread(f"down {list(down)} and up {list(up)} are not the pair of a Linear or convolution layer")
        demand(down[0] == up[1], f"rank is {down[0]} in down and {up[1]} in up")
        check_rank(down[0])
        if mid is not None:
            fits = len(mid) == 4 and mid[:2] == (down[0], down[0]) and math.prod(down[2:]) == 1
            demand(fits, f"mid {list(mid)} does not go between down {list(down)} and up {list(up)}")
        return up[0]

    @classmethod
    def expanded(cls, parts: Mapping[str, Tensor]) -> int:
        """Of the kernel that down and mid make."""
        return parts["down"].numel() * math.prod(parts["mid"].shape[2:]) if "mid" in parts else 0

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None, wide: bool) -> LoraLayer:
        down, mid = parts.pop("down"), parts.pop("mid", None)
        if mid is not None:  # down (r in [1 1]) and the kernel after it (mid, r r k k) as one kernel, r in k k in fp32
            down = torch.einsum("omkl,mi->oikl", mid.float(), down.float().flatten(1))
            if not down.isfinite().all():
                raise ValueError("its Tucker product overflows: train the LoRA again")
        return (WideLoraLayer if wide else LoraLayer)(name, down, parts.pop("up"), alpha)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_zero(self) -> bool:
        return self.alpha == 0 or Product(self.up, self.down).is_zero

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def additive(self, shape: tuple[int, ...]) -> LowRank:
        return LowRank(self.down.flatten(1), self.up.flatten(1))


@dataclass(frozen=True, eq=False)
class WideLoraLayer(LoraLayer):
    """A LoRA of a Linear to which it gives more inputs, as if W0 had zeros there (the img_in of Flux control LoRAs)."""

    kind = "LoRA with more inputs"

    def fits(self, wanted: tuple[int, ...]) -> bool:
        have = self.shape
        return have == wanted or (len(have) == len(wanted) == 2 and have[0] == wanted[0] and have[1] >= wanted[1])
