"""Products of thin factors, dW = scale * up @ down: Gram matrices and what follows from them, of many weights at once.

Gram matrices of small factors are in fp64, those of large ones in fp32; what is summed from them is in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..files.formats import LoraLayer

SMALL = 2**12  # entries of a factor; up to there products are in fp64
ZERO_ENERGY = 1e-14  # of ‖U‖²‖D‖²: what rounding leaves of factors that cancel


@dataclass(frozen=True, eq=False)
class Factor:
    """dW = scale * up @ down of one weight, without strength."""

    up: Tensor  # out r
    down: Tensor  # r in, a conv kernel flattened
    scale: float = 1.0  # alpha / rank

    @classmethod
    def of(cls, layer: LoraLayer) -> Factor:
        """A file's layer by itself, in float32."""
        return cls(layer.up.float().flatten(1), layer.down.float().flatten(1), layer.scale)

    @cached_property
    def energy(self) -> float:
        """‖dW‖²; 0 where the factors cancel to rounding. ``measure`` works out many at once."""
        measure([self])
        return self.energy

    @cached_property
    def magnitude(self) -> float:
        """Σᵢ |uᵢ||dᵢ|: ‖dW‖ if no term cancelled another; infinite where a term is."""
        measure([self])
        return self.magnitude

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """R (r r) with R Rᵀ the pseudo-inverse of UᵀU, and of D Dᵀ."""
        up, down = ready(self)
        return _root(product(up, up).double(), _exact(up)), _root(product(down, down).double(), _exact(down))

    @property
    def span(self) -> float:
        """r / in: the row overlap that chance gives."""
        return self.down.shape[0] / self.down.shape[1]


Grams: TypeAlias = "tuple[Tensor, Tensor]"  # UᵀU' and D D'ᵀ of L pairs of factors (L r r', fp64 each)


def measure(changes: Iterable[object]) -> None:
    """Work out the energies of all factors among ``changes`` that do not know theirs; those of one rank together."""
    alike: dict[int, list[Factor]] = {}
    for item in changes:
        if isinstance(item, Factor) and not {"energy", "magnitude"} <= vars(item).keys():
            alike.setdefault(item.down.shape[0], []).append(item)
    for factors in alike.values():
        note_energies(factors, grams([factors], [(0, 0)])[0, 0])


def note_energies(factors: Sequence[Factor], alone: Grams) -> None:
    """Let factors know energy and magnitude by their products with themselves: what the properties would keep."""
    columns, rows = alone
    sizes = (columns.diagonal(dim1=1, dim2=2) * rows.diagonal(dim1=1, dim2=2)).sqrt().sum(1)  # Σ |u||d|, L
    energies, bounds = (columns * rows).sum((1, 2)), trace(columns) * trace(rows)  # ‖UD‖² and ‖U‖²‖D‖², L
    table = zip(factors, energies.tolist(), bounds.tolist(), sizes.tolist(), strict=True)
    for item, energy, bound, size in table:
        if energy < 1e-3 * bound and not (_exact(item.up) and _exact(item.down)):
            energy = float((_square(item.up.double().T) * _square(item.down.double())).sum())
        vars(item)["energy"] = item.scale**2 * energy if energy > ZERO_ENERGY * bound else 0.0
        vars(item)["magnitude"] = abs(item.scale) * size


def inners(a: Sequence[Factor], b: Sequence[Factor], crossed: Grams) -> Tensor:
    """<dW_a, dW_b> of every two (L)."""
    scales = column([one.scale * other.scale for one, other in zip(a, b, strict=True)])
    return scales * (crossed[0] * crossed[1]).sum((1, 2))


def grams(members: Sequence[Sequence[Factor]], pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Grams]:
    """The products of members i and j for every pair (i, j); each has L factors, of one rank, of the same weights."""
    found: dict[tuple[int, int], tuple[list, list]] = {pair: ([], []) for pair in pairs}
    for factors in zip(*members, strict=True):
        made = [ready(item) for item in factors]  # not kept: the next weight's take their place in the cache
        for (i, j), (columns, rows) in found.items():
            columns.append(product(made[i][0], made[j][0]))
            rows.append(product(made[i][1], made[j][1]))
    return {pair: (_stack(columns), _stack(rows)) for pair, (columns, rows) in found.items()}


def ready(a: Factor) -> tuple[Tensor, Tensor]:
    """Uᵀ (r out) and D (r in) in fp32, or fp64 where they are."""
    return _at_least_single(a.up.T), _at_least_single(a.down)


def _at_least_single(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ (r_a r_b), in fp64 where both are small or one of them is in fp64, else in fp32."""
    return a @ b.T if a.dtype == b.dtype and not (_exact(a) and _exact(b)) else a.double() @ b.double().T


def _square(a: Tensor) -> Tensor:
    return a @ a.T


def _stack(matrices: list[Tensor]) -> Tensor:
    """As one tensor (L r r, fp64)."""
    if len({matrix.dtype for matrix in matrices}) > 1:
        matrices = [matrix.double() for matrix in matrices]
    return torch.stack(matrices).double()


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)  # L


def trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)  # L


def _exact(a: Tensor) -> bool:
    """Whether products of a factor are in fp64."""
    return a.numel() <= SMALL or a.dtype == torch.float64


def _root(gram: Tensor, exact: bool) -> Tensor:
    """R (r r) with R Rᵀ the pseudo-inverse of a Gram matrix (r r): 0 in columns for what is below rounding."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > (1e-12 if exact else 1e-6) * values[-1].clamp(min=0)
    return vectors * torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
