"""LoHa, of LyCORIS: the product of two products, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...branches.changes import Dense, LowRank
from .base import Scaled, Shapes, demand
from .products import Product, check_product

_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


@dataclass(frozen=True, eq=False)
class LohaLayer(Scaled):
    """ΔW = scale * (w1_a @ w1_b) ⊙ (w2_a @ w2_b); with t1, t2 each factor is a Tucker product."""

    w1_a: Tensor  # out r, or r out with t1
    w1_b: Tensor  # r in·k·k, or r in with t1
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None  # r r k k
    t2: Tensor | None
    alpha: float | None

    form = "LoHa"
    reads = ("LoHa",)
    roles = _ROLES
    endings = {role: role for role in _ROLES}
    whole = (set(_ROLES[:4]), set(_ROLES))
    beside = frozenset(("dora_scale",))
    host = (
        "LoHaAdapter",
        ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    )

    @classmethod
    def check(cls, shapes: Shapes) -> int:
        first = check_product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
        second = check_product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
        demand(first == second, f"its two products are {list(first)} and {list(second)}")
        return first[0]

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def _products(self) -> tuple[Product, Product]:
        return Product(self.w1_a, self.w1_b, self.t1), Product(self.w2_a, self.w2_b, self.t2)

    @property
    def is_zero(self) -> bool:
        return self.alpha == 0 or any(product.is_zero for product in self._products)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._products[0].shape

    def additive(self, shape: tuple[int, ...]) -> LowRank | Dense:
        """(A₁·B₁) ⊙ (A₂·B₂) as one product of rank r₁·r₂, columns and rows multiplied in pairs; itself if smaller."""
        (a1, b1), (a2, b2) = (product.factors() for product in self._products)
        rank, (outputs, inputs) = a1.shape[1] * a2.shape[1], (shape[0], b1.shape[1])
        if rank * (outputs + inputs) >= outputs * inputs:
            return Dense((a1 @ b1) * (a2 @ b2))
        up = (a1[:, :, None] * a2[:, None]).flatten(1)  # out r1·r2
        down = (b1[:, None] * b2[None]).flatten(0, 1)  # r1·r2 in·k·k
        return LowRank(down, up)
