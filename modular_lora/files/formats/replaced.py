"""Weights that take the place of W0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...branches.changes import Bias, Dense, Parts
from ..target import Place
from .base import Adapter, Shapes, check_not_zero, demand, is_rounding


@dataclass(frozen=True, eq=False)
class SetLayer(Adapter):
    """A weight in place of W0 (``set_weight``, the norms of Flux control LoRAs): ΔW = weight − W0 at any strength."""

    weight: Tensor

    form = "replaced weight"
    endings = {"set_weight": "set"}
    whole = ({"set"},)
    alpha_counts = False
    on_norms = True
    power = 0

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        fits = len(shapes) == 1 and len(shapes["set"]) > 0
        demand(fits, f"set_weight {list(shapes['set'])} is not a weight by itself")

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None, wide: bool) -> SetLayer:
        check_not_zero("set", parts["set"])
        return cls(name, parts.pop("set"))

    @property
    def is_zero(self) -> bool:
        """False: whether it is W0, only W0 tells."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def does_nothing(self, parts: Parts, W0: Callable[[], Tensor]) -> bool:
        return is_rounding(parts, W0, self.weight.dtype)

    def change(self, place: Place) -> Parts:
        """The difference of the stored weight to W0."""
        rows = self.weight.float()
        change = place.arranged(rows.reshape(rows.shape[0], -1)) - place.original()
        part = Bias(change.flatten()) if place.is_bias else place.weight(Dense(change), arrange=False)
        return ((part, 1.0),)
