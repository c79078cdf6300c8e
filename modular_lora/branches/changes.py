"""The change of one weight against W0 in the forms that adapters have, and whose it is; fusing.py sums many.

y = W0·x + b + Σᵢ strengthᵢ·(fᵢ(W0) − W0)·x. A part that is a function of W0 alone (a gain, a rotation) acts on
W0·x = y − b, never on another adapter's share, so no task adapter can rescale or rotate the safety LoRA's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .layer_spec import Conv

Role = Literal["safety", "task"]


Weight: TypeAlias = Callable[[], Tensor]  # gives the weight (out in [k k]) that a change is a function of


class Part(ABC):
    """One change of one weight."""

    @abstractmethod
    def dense(self, W0: Weight) -> Tensor:
        """ΔW (out in·k·k, fp32)."""

    @abstractmethod
    def times(self, W0: Weight, x: Tensor) -> Tensor:
        """ΔW·x (x in·k·k n -> out n, fp32) without making ΔW."""

    def energy(self, W0: Weight) -> float:
        """‖ΔW‖²."""
        return energy(self.dense(W0))

    @property
    def thin(self) -> tuple[Tensor, Tensor] | None:
        """As up (out r) and down (r in); vectors are columns. None where it is no thin product."""
        return None

    def compared(self, inputs: int, kept: bool) -> Part:
        """As two LoRAs are compared: on the inputs that W0 has; ``kept``: in fp32, for many others."""
        return self

    def as_weight(self, conv: Conv, W0: Weight) -> Part:
        """As it acts through a convolution that takes changes in the shape of its weight alone."""
        return self


class Additive(Part):
    """A change that is no function of W0."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """ΔW (out in·k·k, fp32)."""

    @abstractmethod
    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> LowRank | Dense:
        """With its rows (out n) and its columns (n in·k·k) put elsewhere."""

    def dense(self, W0: Weight) -> Tensor:
        return self.matrix()


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """ΔW = up·down: LoRA, LoCon, Tucker LoCon, LoHa of small rank."""

    down: Tensor  # r in·k·k
    up: Tensor  # out r

    def matrix(self) -> Tensor:
        return self.up.float() @ self.down.float()

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.up.float() @ (self.down.float() @ x)

    @property
    def thin(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def compared(self, inputs: int, kept: bool) -> LowRank:
        down = self.down[:, :inputs]  # the same where it has no more
        return LowRank(down.float(), self.up.float()) if kept else LowRank(down, self.up)

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> LowRank:
        return LowRank(columns(self.down), rows(self.up))


@dataclass(frozen=True, eq=False)
class Dense(Additive):
    """ΔW itself: a full difference, or factors that would be larger than it; for a norm the change of its weight."""

    weight: Tensor  # out in·k·k; out 1 for a norm

    def matrix(self) -> Tensor:
        return self.weight.float()

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.weight.float() @ x

    @property
    def thin(self) -> tuple[Tensor, Tensor] | None:
        return (self.weight, torch.ones(1, 1)) if self.weight.shape[1] == 1 else None

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(columns(rows(self.weight)))


@dataclass(frozen=True, eq=False)
class Kron(Additive):
    """ΔW = w1 ⊗ w2 (LoKr), w2 with the layer's kernel: out = o₁·o₂, in = i₁·i₂."""

    w1: Tensor  # o1 i1
    w2: Tensor  # o2 i2 [k k]

    def matrix(self) -> Tensor:
        w1 = self.w1.float().reshape(*self.w1.shape, *(1 for _ in self.w2.shape[2:]))
        return torch.kron(w1, self.w2.float()).flatten(1)

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        w1, w2 = self.w1.float(), self.w2.float().flatten(1)  # o1 i1, o2 i2·k·k
        h = w2 @ x.T.reshape(-1, w1.shape[1], w2.shape[1]).transpose(1, 2)  # n o2 i1
        return (h @ w1.T).transpose(1, 2).flatten(1).T  # n o1 o2

    def energy(self, W0: Weight) -> float:
        return energy(self.w1.float()) * energy(self.w2.float().flatten(1))

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(self.matrix()).moved(rows, columns)

    def as_weight(self, conv: Conv, W0: Weight) -> Dense:
        """A matrix: it acts on the layer's inputs in groups."""
        return Dense(self.matrix())


class OnRows(Part):
    """A change that makes rows over the outputs of W0's rows; ``bias`` is the layer's own, which it leaves alone."""

    bias: Tensor | None  # out

    @abstractmethod
    def on_rows(self, rows: Tensor) -> Tensor:
        """What it makes of rows over the outputs (out n): of W0 itself, of W0·x, of the bias."""

    def dense(self, W0: Weight) -> Tensor:
        return self.on_rows(W0().float().flatten(1))

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.on_rows(W0().float().flatten(1) @ x)

    def as_weight(self, conv: Conv, W0: Weight) -> Part:
        """A matrix in a transposed convolution: W0's rows are its inputs there."""
        return Dense(self.dense(W0)) if conv.transposed else self


@dataclass(frozen=True, eq=False)
class Gain(OnRows):
    """ΔW = diag(gain)·W0 (the W0 half of DoRA)."""

    gain: Tensor  # out
    bias: Tensor | None  # out

    def on_rows(self, rows: Tensor) -> Tensor:
        return self.gain.float()[:, None] * rows

    def energy(self, W0: Weight) -> float:
        return energy(self.on_rows(W0().float().flatten(1).norm(dim=1, keepdim=True)))


@dataclass(frozen=True, eq=False)
class Rotation(OnRows):
    """ΔW = diag(blocks)·W0 with blocks R − I (OFT)."""

    blocks: Tensor  # k n n, k·n = out: new row m of a block is Σ_n blocks[m, n]·row n
    bias: Tensor | None  # out

    def on_rows(self, rows: Tensor) -> Tensor:
        k, n, _ = self.blocks.shape
        return (self.blocks.float() @ rows.reshape(k, n, -1)).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Bias(Part):
    """A change of the layer's bias, which is compared as a column."""

    bias: Tensor  # out

    def dense(self, W0: Weight) -> Tensor:
        return self.bias.float()[:, None]

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.dense(W0) @ x

    @property
    def thin(self) -> tuple[Tensor, Tensor]:
        return self.bias[:, None], torch.ones(1, 1)


Parts: TypeAlias = "tuple[tuple[Part, float], ...]"  # parts and what each is multiplied by


def energy(matrix: Tensor) -> float:
    """‖matrix‖², rows in their own precision, their sum in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


@dataclass(frozen=True, eq=False)
class Term:
    """One part of one adapter on one layer; ``scale`` is its strength, alpha/rank folded in.

    ``owner`` tells several safety LoRAs apart (their SHA-256); task LoRAs are one sum and have none.
    """

    role: Role
    part: Part
    scale: float
    owner: str = ""


Owner: TypeAlias = "tuple[Role, str]"  # one safety LoRA, or ("task", "") for all task LoRAs together
TASKS: Owner = ("task", "")
