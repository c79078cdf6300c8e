"""Factors whose product is a change of a weight, as LoRA, LoHa and LoKr have them: a @ b, or in Tucker form.

A product is of a (out r) and b (r in·k·k); in Tucker form of a (r out), b (r in) and a kernel between them (r r k k).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Shapes, check_rank, demand, has_values


def check_product(shapes: Shapes, left: str, right: str, tucker: str | None) -> tuple[int, ...]:
    """The shape of a product by the roles of its factors; ValueError where they do not multiply."""
    a, b, t = shapes[left], shapes[right], shapes.get(tucker or "")
    what = f"{left} {list(a)}, {right} {list(b)}" + (f" and {tucker} {list(t)}" if t else "")
    demand(len(a) == len(b) == 2, f"{what} are not matrices")
    if t is None:
        demand(a[1] == b[0], f"{what} do not multiply")
        check_rank(b[0])
        return a[0], b[1]
    demand(len(t) == 4 and t[:2] == (a[0], b[0]), f"{what} do not multiply")
    check_rank(max(t[:2]))
    return a[1], b[1], *t[2:]


class Product(NamedTuple):
    """Two factors, and the kernel between them in Tucker form."""

    a: Tensor
    b: Tensor
    middle: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.middle is None:
            return (self.a.shape[0], *self.b.shape[1:])
        return (self.a.shape[1], self.b.shape[1], *self.middle.shape[2:])

    @property
    def is_zero(self) -> bool:
        """Whether it has no component with a non-zero column and a non-zero row; in Tucker form, a factor of zeros."""
        if self.middle is not None:
            return not all(map(has_values, (self.middle, self.a, self.b)))
        if self.a.flatten()[0].item() != 0 and self.b.flatten()[0].item() != 0:
            return False
        columns = (self.a.flatten(1).float() != 0).any(0)  # r
        rows = (self.b.flatten(1).float() != 0).any(1)  # r
        return not bool((columns & rows).any())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Either form as a product of two factors (out r, r in·k·k; fp32)."""
        a, b = self.a.float(), self.b.float()
        if self.middle is None:
            return a, b.flatten(1)
        return a.t(), torch.einsum("ij...,jn->in...", self.middle.float(), b).flatten(1)
