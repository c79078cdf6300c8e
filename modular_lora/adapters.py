"""One layer of a LoRA file in the form that its format gives it; tensors on the CPU in the file's dtype.

Names and shapes are those of kohya-ss sd-scripts, LyCORIS and PEFT as ComfyUI reads them (comfy/weight_adapter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """LoRA and LoCon, also in Tucker form: ΔW = scale * up @ down."""

    name: str  # the layer's name in the file, suffix removed
    down: Tensor  # r in [k k]
    up: Tensor  # out r [1 1]
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def is_zero(self) -> bool:
        """Whether no component of the layer has both a non-zero column of up and a non-zero row of down."""
        rows = self.down.flatten(1).float().abs().amax(1)  # r
        columns = self.up.flatten(1).float().abs().amax(0)  # r
        return self.alpha == 0 or not bool(((rows > 0) & (columns > 0)).any())


@dataclass(frozen=True, eq=False)
class LohaLayer:
    """LoHa: ΔW = scale * (w1_a @ w1_b) ⊙ (w2_a @ w2_b); with t1, t2 each factor is a Tucker product."""

    name: str
    w1_a: Tensor  # out r, or r out with t1
    w1_b: Tensor  # r in·k·k, or r in with t1
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None  # r r k k
    t2: Tensor | None
    alpha: float | None


@dataclass(frozen=True, eq=False)
class LokrLayer:
    """LoKr: ΔW = scale * w1 ⊗ w2, each whole or as a product; scale = alpha / rank where one is a product, else 1."""

    name: str
    w1: Tensor | None
    w1_a: Tensor | None
    w1_b: Tensor | None
    w2: Tensor | None
    w2_a: Tensor | None
    w2_b: Tensor | None
    t2: Tensor | None
    alpha: float | None


@dataclass(frozen=True, eq=False)
class DoraLayer:
    """DoRA over a LoRA, LoHa or LoKr: W0 + ΔW, its rows (or columns) brought to the length ``magnitude``."""

    name: str
    base: LoraLayer | LohaLayer | LokrLayer
    magnitude: Tensor  # out [1 1 1], or 1 in [1 1]
    of_sum: bool  # lengths are those of W0 + ΔW (PEFT's magnitude vector); else W0's rows, as ComfyUI reads dora_scale


@dataclass(frozen=True, eq=False)
class OftLayer:
    """OFT in Cayley form: W0's output blocks rotated by R = (I + Q)(I - Q)⁻¹, Q = blocks - blocksᵀ."""

    name: str
    blocks: Tensor  # k n n, k·n = out
    alpha: float | None  # bound on ‖Q‖, None or 0 for none


@dataclass(frozen=True, eq=False)
class DiffLayer:
    """A full difference of a weight and of its bias (diff, diff_b; w_norm, b_norm for norms); one may be absent."""

    name: str
    weight: Tensor | None
    bias: Tensor | None


Adapter: TypeAlias = LoraLayer | LohaLayer | LokrLayer | DoraLayer | OftLayer | DiffLayer
