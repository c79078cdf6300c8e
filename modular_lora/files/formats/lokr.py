"""LoKr, of LyCORIS: a Kronecker product."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...branches.changes import Dense, Kron
from .base import Adapter, Scaled, Shapes, demand, has_values
from .products import Product, check_product

_ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True, eq=False)
class LokrLayer(Scaled):
    """ΔW = scale * w1 ⊗ w2, each whole or as a product; scale = alpha / rank where one is a product, else 1."""

    w1: Tensor | None  # o1 i1
    w1_a: Tensor | None  # o1 r
    w1_b: Tensor | None  # r i1
    w2: Tensor | None  # o2 i2 [k k]
    w2_a: Tensor | None  # o2 r, or r o2 with t2
    w2_b: Tensor | None  # r i2·k·k, or r i2 with t2
    t2: Tensor | None  # r r k k
    alpha: float | None

    form = "LoKr"
    reads = ("LoKr",)
    roles = _ROLES
    endings = {role: role for role in _ROLES}
    whole = tuple(
        first | second
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    )
    beside = frozenset(("dora_scale",))
    host = (
        "LoKrAdapter",
        ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
    )

    @classmethod
    def check(cls, shapes: Shapes) -> int:
        first, second = shapes.get("lokr_w1"), shapes.get("lokr_w2")
        first = check_product(shapes, "lokr_w1_a", "lokr_w1_b", None) if first is None else first
        second = check_product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2") if second is None else second
        fits = len(first) == 2 and 2 <= len(second) <= 5
        demand(fits, f"its factors {list(first)} and {list(second)} are those of no Linear or convolution")
        return first[0] * second[0]

    @classmethod
    def refuse_alpha(cls, alpha: float, roles: Set[str]) -> None:
        """Of whole factors it may be any number from 0 on: nothing is scaled by it."""
        if alpha < 0 or not {"lokr_w1", "lokr_w2"} <= roles:
            super().refuse_alpha(alpha, roles)

    @property
    def rank(self) -> int | None:
        """Rank of the factor that alpha is divided by: the second one's, else the first one's, else none."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    @property
    def _factors(self) -> tuple[Tensor | Product, Tensor | Product]:
        """Both, whole or as products."""
        return _factor(self.w1, self.w1_a, self.w1_b, None), _factor(self.w2, self.w2_a, self.w2_b, self.t2)

    @property
    def is_zero(self) -> bool:
        zero = (f.is_zero if isinstance(f, Product) else not has_values(f) for f in self._factors)
        return self.scale == 0 or any(zero)

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = (factor.shape for factor in self._factors)
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def rescaled(self, scale: float, bias: bool) -> Adapter:
        if self.w1 is None or self.rank is not None:
            return super().rescaled(scale, bias)
        return replace(self, w1=self.w1.float() * scale, alpha=None)

    def additive(self, shape: tuple[int, ...]) -> Kron | Dense:
        """w1 ⊗ w2; a factor that is a product is multiplied out."""
        w1, w2 = (_multiplied(factor) for factor in self._factors)  # o1 i1, o2 i2 [k k] or o2 i2·k·k
        kernel = shape[2:]
        inputs, rest = divmod(w2[0].numel(), torch.Size(kernel).numel())
        if rest == 0 and w1.shape[1] * inputs == shape[1]:
            return Kron(w1, w2.reshape(w2.shape[0], inputs, *kernel))
        return Dense(torch.kron(w1, w2.flatten(1)))  # a kernel that is split between the two


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, middle: Tensor | None) -> Tensor | Product:
    if whole is not None:
        return whole
    if a is None or b is None:
        raise TypeError("a factor is neither whole nor a product")
    return Product(a, b, middle)


def _multiplied(factor: Tensor | Product) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.float()
    a, b = factor.factors()
    return a @ b
