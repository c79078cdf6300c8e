"""Full differences of a weight and of its bias."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...branches.changes import Dense, Part, Parts
from ..target import Place
from .base import Adapter, Shapes, demand, has_values, same


@dataclass(frozen=True, eq=False)
class DiffLayer(Adapter):
    """A full difference of a weight and of its bias; one may be absent."""

    weight: Tensor | None
    bias: Tensor | None

    form = "full difference"
    reads: ClassVar[tuple[str, ...]] = ("full differences",)
    roles: ClassVar[tuple[str, ...]] = ("diff", "diff_b")
    endings = {"diff": "diff", "diff_b": "diff_b"}
    patterns: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = (  # PEFT's lora_bias
        (re.compile(r"(?P<layer>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias"), "diff_b"),
    )
    whole: ClassVar[tuple[Set[str], ...]] = ({"diff"},)
    alpha_counts = False
    on_norms = True

    @classmethod
    def check(cls, shapes: Shapes) -> int | None:
        diff = shapes.get("diff")
        demand(diff is None or len(diff) > 0, f"diff has shape {list(diff or ())}, a weight's is needed")
        return None

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.weight, self.bias) if tensor is not None)

    @property
    def is_zero(self) -> bool:
        return not any(map(has_values, self._held))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._held[0].shape)

    def fits(self, wanted: tuple[int, ...]) -> bool:
        bias = self.bias is None or self.bias.numel() == wanted[0]
        return bias and (self.weight is None or same(tuple(self.weight.shape), wanted))

    def split(self) -> tuple[DiffLayer | None, DiffLayer | None]:
        weight = None if self.weight is None else DiffLayer(self.name, self.weight, None)
        return weight, None if self.bias is None else DiffLayer(self.name, None, self.bias)

    def change(self, place: Place) -> Parts:
        parts: list[Part] = []
        if self.weight is not None and place.is_bias:
            parts.append(place.bias(self.weight))
        elif self.weight is not None:
            change = self.weight.float()
            parts.append(place.weight(Dense(change.reshape(change.shape[0], -1))))
        if self.bias is not None:
            parts.append(place.bias(self.bias))
        return tuple((part, 1.0) for part in parts)

    def content(self, digest: Callable[[Tensor], str]) -> str:
        return f"difference {' '.join(map(digest, self._held))}"
