"""A change of a weight of any format with a full difference of the bias beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..changes import Parts
from ..target import Place
from .base import Adapter, Beside, has_values
from .diff import DiffLayer


@dataclass(frozen=True, eq=False)
class BiasedLayer(Beside):
    """Any change of a weight together with a full difference of the bias (``diff_b``)."""

    bias: Tensor  # out

    @classmethod
    def around(cls, base: Adapter, parts: dict[str, Tensor]) -> Adapter:
        bias = parts.pop("diff_b", None)
        return base if bias is None else cls(base.name, base, bias)

    @property
    def kind(self) -> str:
        return f"{self.base.kind} with a bias"

    @property
    def is_zero(self) -> bool:
        return self.base.is_zero and not has_values(self.bias)

    def fits(self, wanted: tuple[int, ...]) -> bool:
        return self.base.fits(wanted) and self.bias.numel() == wanted[0]

    def split(self) -> tuple[Adapter, DiffLayer]:
        return self.base, DiffLayer(self.name, None, self.bias)

    def rescaled(self, scale: float, bias: bool) -> Adapter:
        return replace(
            self, base=self.base.rescaled(scale, bias), bias=self.bias.float() * scale if bias else self.bias
        )

    def change(self, place: Place) -> Parts:
        return (*self.base.change(place), (place.bias(self.bias), 1.0))
