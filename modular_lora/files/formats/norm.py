"""Changes of a norm, as LyCORIS trains them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor

from .base import DAMAGED, Shapes, check_row
from .diff import DiffLayer


@dataclass(frozen=True, eq=False)
class NormLayer(DiffLayer):
    """A full difference of a norm's weight and of its bias."""

    form = "change of a norm"
    reads = ()
    kind = DiffLayer.form
    endings = {"w_norm": "w_norm", "b_norm": "b_norm"}
    patterns = ()
    whole = ({"w_norm"}, {"w_norm", "b_norm"})

    @classmethod
    def check_roles(cls, roles: Set[str]) -> None:
        if {"diff_b", "b_norm"} <= roles:
            raise ValueError("has two changes of the bias, diff_b and b_norm: keep one of them")
        if "alpha" in roles:
            raise ValueError(f"is a {cls.form} with an alpha, which no trainer makes: {DAMAGED}")

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        for role in ("diff_b", "w_norm", "b_norm"):
            check_row(role, shapes, None)

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None, wide: bool) -> NormLayer:
        return cls(name, parts.pop("w_norm"), parts.pop("b_norm" if "b_norm" in parts else "diff_b", None))
