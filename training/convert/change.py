"""The change of one weight as two factors: its rank where it has one below the rounding of the file, else as many
singular values as a limit asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-3  # ‖rest‖ / ‖ΔW‖ below which a change counts as one of that rank, where the file's rounding is finer
THIN = 4  # an exact rank is at most 1 / THIN of the smaller side
NOISE = 1.2  # of the expected norm of the rounding, up to which the rest counts as rounding
EDGE = 1.25  # of the largest singular value that rounding alone is expected to have; its steps differ from row to row
SPARE = 0.98  # of the limit: the factors are rounded afterwards


@dataclass(frozen=True)
class Rounding:
    """The rounding of a weight's entries to a type.

    Attributes:
        error: its root mean square. An entry in [2^e, 2^(e+1)) is rounded to a multiple of eps · 2^e, with an error
            that is spread evenly over one of them.
    """

    error: float

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> Rounding:
        info = torch.finfo(dtype)
        _, exponent = torch.frexp(weight.double())
        step = (info.eps * (exponent - 1).double().exp2()).clamp_min(info.smallest_normal * info.eps)
        return cls(float(step.square().mean().sqrt()) / math.sqrt(12) if weight.numel() else 0.0)


@dataclass(frozen=True)
class Factored:
    """ΔW ≈ up · down (out r, r in; float64).

    Attributes:
        up, down: the factors; None where a full difference is smaller.
        rank: of them; of the change where it is written whole.
        exact: whether the rest is rounding, or below `EXACT`.
        low: whether the change has a low rank of its own, larger than this one perhaps.
    """

    up: Tensor | None
    down: Tensor | None
    rank: int
    exact: bool
    low: bool


def outside(change: Tensor) -> float:
    """Energy of a change (out in) beyond the first quarter of its singular values: what a low rank leaves."""
    values = torch.linalg.eigvalsh(_gram(change)).clamp_min(0)  # from the smallest on
    return float(values[: len(values) - len(values) // THIN].sum())


def factored(change: Tensor, rounding: Sequence[Rounding], limit: float, most: int) -> Factored:
    """The factors of a change, by the eigenvectors of its smaller Gram matrix.

    Args:
        change: ΔW (out in), float64.
        rounding: what may lie on ΔW besides the eraser's change, the finest first.
        limit: largest ‖rest‖ / ‖ΔW‖ where the change has no exact rank.
        most: largest rank; 0: any.
    """
    small, (out, width) = min(change.shape), change.shape
    values, vectors = torch.linalg.eigh(_gram(change))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    energy = values.flip(0).cumsum(0).flip(0)  # energy[r]: of the rest beyond rank r
    rank = _exact_rank(change, values, energy, rounding)
    low = exact = rank is not None
    if rank is None:
        rank = int((energy > (SPARE * limit) ** 2 * energy[0]).sum())
    if most and rank > most:
        rank, exact = most, False
    rank = max(1, rank)
    if rank * (out + width) >= out * width:
        return Factored(None, None, small, True, low)
    vectors = vectors[:, :rank]
    root = values[:rank].sqrt().clamp_min(1e-30).sqrt()
    if out <= width:
        return Factored(vectors * root, (vectors.T @ change) / root[:, None], rank, exact, low)
    return Factored((change @ vectors) / root, vectors.T * root[:, None], rank, exact, low)


def _exact_rank(change: Tensor, values: Tensor, energy: Tensor, rounding: Sequence[Rounding]) -> int | None:
    """The rank of a change that has a low one, but for rounding or next to nothing; else None."""
    out, width = change.shape
    most = min(out, width) // THIN
    for one in rounding:
        noise = one.error * math.sqrt(out * width)
        rank = int((values.sqrt() > EDGE * one.error * (math.sqrt(out) + math.sqrt(width))).sum())
        rest = math.sqrt(float(energy[rank])) if rank < len(energy) else 0.0
        if 0 < rank <= most and rest <= NOISE * noise:
            return rank
        rank = int((energy > EXACT**2 * energy[0]).sum())
        if rank <= most and noise <= EXACT * math.sqrt(float(energy[0])):
            return rank
    return None


def _gram(change: Tensor) -> Tensor:
    """ΔW ΔWᵀ or ΔWᵀ ΔW, whichever is smaller."""
    return change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change
