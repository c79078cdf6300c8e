"""DoRA: a LoRA, LoHa or LoKr with the lengths that the rows or columns of the changed weight shall have.

The reference is ComfyUI's own merge, its choices included: ``dora_scale`` on the output axis is divided by the lengths
of W0's rows, PEFT's magnitude vector by those of the changed weight's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..changes import Additive, Dense, Gain, LowRank, Parts
from ..target import Place
from .base import Adapter, Beside, Scaled, Shapes, check_not_zero, demand, is_rounding

EPS = torch.finfo(torch.float32).eps  # what ComfyUI adds to the lengths that it divides by


@dataclass(frozen=True, eq=False)
class DoraLayer(Beside):
    """W0 + ΔW, its rows (or columns) brought to the length ``magnitude``."""

    base: Scaled
    magnitude: Tensor  # out 1 [1 1], or 1 in [1 1]; out where of_sum
    of_sum: bool  # lengths are those of W0 + ΔW (PEFT's magnitude vector); else W0's rows, as ComfyUI reads dora_scale

    reads = ("DoRA",)
    endings = {
        "dora_scale": "dora_scale",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
    }
    patterns = ((re.compile(r"(?P<layer>.+)\.lora_magnitude_vector\.(?P<adapter>[^.]+)(?:\.weight)?"), "magnitude"),)

    @classmethod
    def check_beside(cls, shapes: Shapes, out: int | None) -> None:
        if (scale := shapes.get("dora_scale")) is not None:
            long = [i for i, size in enumerate(scale) if size > 1]
            fits = len(scale) >= 2 and long in ([], [0], [1]) and (long != [0] or scale[0] == out)
            demand(fits, f"dora_scale {list(scale)} is neither a number an output ({out}) nor a number an input")
        elif (found := shapes.get("magnitude")) is not None:
            fits = math.prod(found) == max(found, default=0) == out
            demand(fits, f"magnitude {list(found)} is not a number an output ({out})")

    @classmethod
    def around(cls, base: Adapter, parts: dict[str, Tensor]) -> Adapter:
        for role, of_sum in (("dora_scale", False), ("magnitude", True)):
            if (lengths := parts.pop(role, None)) is not None and isinstance(base, Scaled):
                check_not_zero(role, lengths)
                return cls(base.name, base, lengths.flatten() if of_sum else lengths, of_sum)
        return base

    @property
    def kind(self) -> str:
        return f"DoRA over {self.base.kind}"

    @property
    def is_zero(self) -> bool:
        """False: what the lengths change, only W0 tells."""
        return False

    def does_nothing(self, parts: Parts, W0: Callable[[], Tensor]) -> bool:
        return self.base.is_zero and is_rounding(parts, W0, self.magnitude.dtype)

    def fits(self, wanted: tuple[int, ...]) -> bool:
        lengths = {wanted[0]} if self.of_sum else {wanted[0], *wanted[1:2]}
        return len(wanted) > 1 and self.base.fits(wanted) and self.magnitude.numel() in lengths

    def change(self, place: Place) -> Parts:
        """(W0 + ΔW)·m/n − W0, n the lengths of W0's rows, of the rows of the sum (PEFT), or of its columns."""
        part, scale = self.base.additive(place.shape), self.base.scale
        part = LowRank(part.down.float(), part.up.float()) if isinstance(part, LowRank) else part
        magnitude = self.magnitude.float()
        by_output = self.of_sum or magnitude.shape[0] == place.shape[0]
        if by_output and not (place.target.offset and place.target.offset[0] == 1):
            return self._by_output(part, magnitude.flatten(), place)
        W0 = place.original()  # out in·k·k
        total = W0 + scale * place.arranged(part.matrix())
        if by_output:
            gain = magnitude.flatten()[:, None] / ((total if self.of_sum else W0).norm(dim=1, keepdim=True) + EPS)
            return ((place.weight(Dense(gain * total - W0), arrange=False), 1.0),)
        columns = total.reshape(place.shape[0], place.shape[1], -1)  # out in k·k
        gain = magnitude.flatten() / (columns.norm(dim=(0, 2)) + EPS)  # in
        change = (columns * gain[:, None]).flatten(1) - W0
        return ((place.weight(Dense(change), arrange=False), 1.0),)

    def _by_output(self, part: Additive, magnitude: Tensor, place: Place) -> Parts:
        """c·ΔW, and c − 1 as a gain on W0·x: both touch W0 only through the lengths of its rows."""
        scale, change = self.base.scale, part.moved(place.arranged, _unmoved)
        lengths = place.original()
        if self.of_sum:
            lengths = lengths + scale * change.matrix()
        c = magnitude / (lengths.norm(dim=1) + EPS)  # out
        change = change.moved(lambda rows: c[:, None] * rows, _unmoved)
        gain = Gain(place.on_outputs(c - 1), place.original_bias())
        return ((place.weight(change, arrange=False), scale), (gain, 1.0))


def _unmoved(columns: Tensor) -> Tensor:
    return columns
