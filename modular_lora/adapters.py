"""One layer of a LoRA file in the form that its format gives it; tensors on the CPU in the file's dtype.

Names and shapes are those of kohya-ss sd-scripts, LyCORIS and PEFT as ComfyUI reads them (comfy/weight_adapter).
Every form has ``kind``, its name as users know it; ``rank``, None where it has none; and ``is_zero``, whether it
changes nothing whatever the weight. ``is_zero`` looks at which entries are zero and forms no product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


def _any(tensor: Tensor) -> bool:
    """Whether a tensor has an entry that is not zero; the first one settles it in every trained file."""
    if tensor.flatten()[0].item() != 0:
        return True
    return bool(tensor.float().any())  # fp8 has no any()


def _product_is_zero(left: Tensor, right: Tensor) -> bool:
    """Whether left @ right (m r times r n) has no component with a non-zero column and a non-zero row."""
    if left.flatten()[0].item() != 0 and right.flatten()[0].item() != 0:
        return False
    columns = (left.flatten(1).float() != 0).any(0)  # r
    rows = (right.flatten(1).float() != 0).any(1)  # r
    return not bool((columns & rows).any())


class _Scaled:
    """What alpha makes of a form: alpha / rank; 1 where the file gives none, or there is no rank to divide it by."""

    alpha: float | None
    rank: int | None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class LoraLayer(_Scaled):
    """LoRA and LoCon, also in Tucker form: ΔW = scale * up @ down."""

    name: str  # the layer's name in the file, suffix removed
    down: Tensor  # r in [k k]
    up: Tensor  # out r [1 1]
    alpha: float | None

    kind = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_zero(self) -> bool:
        return self.alpha == 0 or _product_is_zero(self.up, self.down)


@dataclass(frozen=True, eq=False)
class WideLoraLayer(LoraLayer):
    """A LoRA of a Linear to which it gives more inputs, as if W0 had zeros there (the img_in of Flux control LoRAs)."""

    kind = "LoRA with more inputs"


@dataclass(frozen=True, eq=False)
class LohaLayer(_Scaled):
    """LoHa: ΔW = scale * (w1_a @ w1_b) ⊙ (w2_a @ w2_b); with t1, t2 each factor is a Tucker product."""

    name: str
    w1_a: Tensor  # out r, or r out with t1
    w1_b: Tensor  # r in·k·k, or r in with t1
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None  # r r k k
    t2: Tensor | None
    alpha: float | None

    kind = "LoHa"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def is_zero(self) -> bool:
        if self.t1 is not None and self.t2 is not None:
            zero = not all(map(_any, (self.t1, self.w1_a, self.w1_b, self.t2, self.w2_a, self.w2_b)))
        else:
            zero = _product_is_zero(self.w1_a, self.w1_b) or _product_is_zero(self.w2_a, self.w2_b)
        return self.alpha == 0 or zero


@dataclass(frozen=True, eq=False)
class LokrLayer(_Scaled):
    """LoKr: ΔW = scale * w1 ⊗ w2, each whole or as a product; scale = alpha / rank where one is a product, else 1."""

    name: str
    w1: Tensor | None  # o1 i1
    w1_a: Tensor | None  # o1 r
    w1_b: Tensor | None  # r i1
    w2: Tensor | None  # o2 i2 [k k]
    w2_a: Tensor | None  # o2 r, or r o2 with t2
    w2_b: Tensor | None  # r i2·k·k, or r i2 with t2
    t2: Tensor | None  # r r k k
    alpha: float | None

    kind = "LoKr"

    @property
    def rank(self) -> int | None:
        """Rank of the factor that alpha is divided by: the second one's, else the first one's, else none."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    @property
    def is_zero(self) -> bool:
        first = not _any(self.w1) if self.w1 is not None else _product_is_zero(self.w1_a, self.w1_b)
        if self.w2 is not None:
            second = not _any(self.w2)
        elif self.t2 is not None:
            second = not all(map(_any, (self.t2, self.w2_a, self.w2_b)))
        else:
            second = _product_is_zero(self.w2_a, self.w2_b)
        return self.scale == 0 or first or second


@dataclass(frozen=True, eq=False)
class DoraLayer:
    """DoRA over a LoRA, LoHa or LoKr: W0 + ΔW, its rows (or columns) brought to the length ``magnitude``."""

    name: str
    base: LoraLayer | LohaLayer | LokrLayer
    magnitude: Tensor  # out 1 [1 1], or 1 in [1 1]; out where of_sum
    of_sum: bool  # lengths are those of W0 + ΔW (PEFT's magnitude vector); else W0's rows, as ComfyUI reads dora_scale

    @property
    def kind(self) -> str:
        return f"DoRA over {self.base.kind}"

    @property
    def rank(self) -> int | None:
        return self.base.rank

    @property
    def is_zero(self) -> bool:
        """False: what the lengths change, only W0 tells."""
        return False


@dataclass(frozen=True, eq=False)
class OftLayer:
    """OFT in Cayley form: W0's output blocks rotated by R = (I + Q)(I - Q)⁻¹, Q = blocks - blocksᵀ."""

    name: str
    blocks: Tensor  # k n n, k·n = out
    alpha: float | None  # bound on ‖Q‖, None or 0 for none

    kind = "OFT"
    rank = None

    @property
    def is_zero(self) -> bool:
        blocks = self.blocks.float()
        return torch.equal(blocks, blocks.transpose(1, 2))


@dataclass(frozen=True, eq=False)
class DiffLayer:
    """A full difference of a weight and of its bias (diff, diff_b; w_norm, b_norm for norms); one may be absent."""

    name: str
    weight: Tensor | None
    bias: Tensor | None

    kind = "full difference"
    rank = None

    @property
    def is_zero(self) -> bool:
        return not any(_any(t) for t in (self.weight, self.bias) if t is not None)


@dataclass(frozen=True, eq=False)
class BiasedLayer:
    """Any change of a weight together with a full difference of the bias beside it (``diff_b``)."""

    name: str
    base: LoraLayer | LohaLayer | LokrLayer | DoraLayer | OftLayer
    bias: Tensor  # out

    @property
    def kind(self) -> str:
        return f"{self.base.kind} with a bias"

    @property
    def rank(self) -> int | None:
        return self.base.rank

    @property
    def is_zero(self) -> bool:
        return self.base.is_zero and not _any(self.bias)


@dataclass(frozen=True, eq=False)
class SetLayer:
    """A weight in place of W0 (``set_weight``, the norms of Flux control LoRAs): ΔW = weight − W0 at any strength."""

    name: str
    weight: Tensor

    kind = "replaced weight"
    rank = None

    @property
    def is_zero(self) -> bool:
        """False: whether it is W0, only W0 tells."""
        return False


Adapter: TypeAlias = LoraLayer | LohaLayer | LokrLayer | DoraLayer | OftLayer | DiffLayer | SetLayer | BiasedLayer
