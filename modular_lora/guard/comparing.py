"""One weight's change by one LoRA against another's: norms, inner products, and what lies in the other's spaces.

For LoRAs everything follows from Gram matrices of the factors (r by r): <U1 D1, U2 D2> = sum((U1ᵀU2) ⊙ (D1 D2ᵀ)), and
no dense product is formed. What is no product of thin factors (LoKr, DoRA, OFT, full differences) goes in exactly, by
products with thin matrices where that is enough, else by one dense matrix a layer that is dropped again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..branches.changes import LowRank, Part, energy
from ..branches.layer_spec import LayerSpec
from ..errors import GuardError
from ..files.formats import LoraLayer
from ..files.matching import Match
from ..files.reader import LoraFile
from ..files.target import Place, Target
from .grams import ZERO_ENERGY, Factor, Grams, column, grams, inners, measure, note_energies, product, ready, trace


class Whole:
    """dW = Σ scale·part of one weight that is no product of thin factors, without strength.

    The dense matrix is made where nothing else will do, and not kept.
    """

    span = 1.0

    def __init__(self, parts: Sequence[tuple[Part, float]], W0: Callable[[], Tensor]):
        self.parts, self.W0 = tuple(parts), W0

    def dense(self) -> Tensor:
        """dW (out in, fp32)."""
        (part, scale), *others = self.parts
        matrix = part.dense(self.W0) if scale == 1 else scale * part.dense(self.W0)
        for part, scale in others:
            matrix = torch.add(matrix, part.dense(self.W0), alpha=scale)
        return matrix

    def times(self, x: Tensor) -> Tensor:
        """dW·x (in n -> out n)."""
        return _total(scale * part.times(self.W0, x.float()) for part, scale in self.parts)

    @cached_property
    def energy(self) -> float:
        """‖dW‖²: of thin parts and one other by their inner products, unless they cancel to rounding."""
        thin = [(part, scale) for part, scale in self.parts if isinstance(part, LowRank)]
        others = [(part, scale) for part, scale in self.parts if not isinstance(part, LowRank)]
        if len(others) == 1 and len(thin) <= 1:
            ((part, scale),) = others
            values = [scale**2 * part.energy(self.W0)]
            for pair, size in thin:
                values.append(Factor(pair.up, pair.down, size).energy)
                values.append(2 * size * scale * _dot(part.times(self.W0, pair.down.float().T), pair.up.float()))
            if math.fsum(values) > 1e-3 * math.fsum(map(abs, values)):
                return math.fsum(values)
        return energy(self.dense())

    @cached_property
    def magnitude(self) -> float:
        """Σ over the parts of what each would be if none cancelled another, of pairs Σᵢ |uᵢ||dᵢ| (Factor.magnitude)."""
        sizes = []
        for part, scale in self.parts:
            thin = part.thin
            sizes.append(Factor(*thin, scale).magnitude if thin else abs(scale) * math.sqrt(part.energy(self.W0)))
        return math.fsum(sizes)


Change: TypeAlias = "Factor | Whole"
Changes: TypeAlias = "Mapping[str, Change]"  # weight key -> what one LoRA does to it


def factor(layer: LoraLayer, target: Target, shape: tuple[int, ...]) -> Factor:
    """A file's layer as factors of the whole weight of `shape`: kernel flattened, a slice embedded in zeros; fp32."""
    place = Place(target, LayerSpec("", tuple(shape)), _unasked)
    part = cast(LowRank, place.weight(layer.additive(place.shape)))
    return Factor(part.up.float(), part.down.float(), layer.scale)


def factors(lora: LoraFile, match: Match, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factor]:
    """All matched layers of a LoRA file by weight key; slices of one weight are joined into one factor."""
    found: dict[str, list[tuple[Factor, float]]] = {}
    for name, target in match.targets.items():
        found.setdefault(target.key, []).append((factor(lora.plain[name], target, shapes[target.key]), 1.0))
    return {key: terms[0][0] if len(terms) == 1 else join(terms) for key, terms in found.items()}


def change(parts: Sequence[tuple[Part, float]], W0: Callable[[], Tensor]) -> Change:
    """Σ scale·part of one weight, or of one bias, as a change to compare; ``W0`` as in changes.dense."""
    thin = [(Factor(*pair, scale), 1.0) for part, scale in parts if (pair := part.thin)]
    if len(thin) < len(parts):
        return Whole(parts, W0)
    return thin[0][0] if len(thin) == 1 else join(thin)


def _unasked(key: str) -> Tensor:
    raise TypeError(f"a LoRA is no function of {key}")


def join(terms: Sequence[tuple[Factor, float]]) -> Factor:
    """Σ strength·dW of several factors of one weight as one factor (ranks concatenated, scale 1)."""
    up = torch.cat([strength * f.scale * f.up.double() for f, strength in terms], 1)  # out R
    down = torch.cat([f.down.double() for f, _ in terms])  # R in
    return Factor(up, down)


def inner(a: Change, b: Change) -> float:
    """<dW_a, dW_b>."""
    return _inner(a, None, b, None)


def norm(a: Change) -> float:
    """Frobenius norm of dW."""
    return math.sqrt(a.energy)


@dataclass(frozen=True)
class LayerPair:
    """One weight's change by the safety LoRA (dW_s) and by task LoRAs (dW_t, 0 where none of them changes it)."""

    layer: str
    safety_energy: float  # ‖dW_s‖²
    task_energy: float  # ‖dW_t‖²
    inner: float  # <dW_s, dW_t>
    projected_energy: float  # ‖P_U dW_t P_D‖²: what lies in the column and row spaces of dW_s
    row_overlap: float
    span: float  # of dW_s

    @property
    def cosine(self) -> float:
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.safety_energy * self.task_energy)))


@dataclass(frozen=True, eq=False)
class Seen:
    """One task LoRA's changes of L weights, at strength 1, as the safety LoRA's changes see them."""

    energy: Tensor  # ‖dW_t‖², L
    inner: Tensor  # <dW_s, dW_t>, L
    within: Tensor | None  # L r_s r_s: P_U dW_t P_D in orthonormal bases of the two spaces; None: dW_t is all inside
    rows: tuple[Tensor, Tensor]  # L each: energy of its rows inside the row space of D_s, and in all


@dataclass(frozen=True, eq=False)
class Compared:
    """Weights that the safety LoRA and the same others change: L weights whose changes have the same ranks, or one."""

    layers: tuple[str, ...]
    changes: tuple[Change, ...]  # the safety LoRA's
    seen: Mapping[int, Seen]  # by the number of the other
    crosses: Mapping[tuple[int, int], Tensor]  # L: <dW_i, dW_j> of every two others

    def pairs(self, strengths: Sequence[float]) -> list[LayerPair]:
        """Against Σ strength·dW_t, weight by weight."""
        seen = {index: one for index, one in self.seen.items() if strengths[index]}
        if not seen:
            nothing = torch.zeros(len(self.layers))
            return self._pairs(nothing, nothing, nothing, nothing)
        alone = _total(strengths[index] ** 2 * one.energy for index, one in seen.items())
        pairs = [(i, j) for i, j in self.crosses if i in seen and j in seen]
        energy = alone + 2 * _total(strengths[i] * strengths[j] * self.crosses[i, j] for i, j in pairs)
        some = (energy > ZERO_ENERGY * alone) & (energy != 0)
        inner = _total(strengths[index] * one.inner for index, one in seen.items())
        projected = energy
        parts = [strengths[index] * one.within for index, one in seen.items() if one.within is not None]
        if parts:
            projected = torch.minimum(energy, _total(parts).square().sum((1, 2)))
        figures = (energy, inner, projected, _overlap(seen.values()))
        return self._pairs(*(torch.where(some, figure, 0.0) for figure in figures))

    def alone(self, index: int) -> list[LayerPair]:
        """Against one LoRA at strength 1, the weights that it changes."""
        if (one := self.seen.get(index)) is None:
            return []
        pairs = self._pairs(one.energy, one.inner, torch.zeros_like(one.energy), _overlap([one]))
        return [pair for pair in pairs if pair.task_energy]

    def _pairs(self, energy: Tensor, inner: Tensor, projected: Tensor, overlap: Tensor) -> list[LayerPair]:
        """By the task LoRAs' figures of every weight (L each)."""
        figures = zip(
            self.layers, self.changes, *(t.tolist() for t in (energy, inner, projected, overlap)), strict=True
        )
        return [
            LayerPair(layer, a.energy, task, product, inside, rows, a.span)
            for layer, a, task, product, inside, rows in figures
        ]


def _overlap(seen: Iterable[Seen]) -> Tensor:
    """Energy of the rows inside over that of all rows (L)."""
    inside, whole = (_total(energies) for energies in zip(*(one.rows for one in seen), strict=True))
    return (inside / whole.clamp(min=1e-300)).clamp(max=1.0)


def compare(safety: Changes, others: Sequence[Changes]) -> list[Compared]:
    """What every other LoRA does to the safety LoRA's weights; factors of the same ranks together.

    Raises GuardError where a change of the safety LoRA does nothing.
    """
    measure(safety.values())
    alike: dict[str | tuple[int, ...], list[tuple[str, Change, dict[int, Change]]]] = {}
    for layer, a in safety.items():
        if a.energy == 0:
            raise GuardError(
                f"safety LoRA: layer {layer} has norm 0, it protects nothing: train the LoRA again",
                code="lora.zero-layer",
            )
        changes = {index: found[layer] for index, found in enumerate(others) if layer in found}
        ranks = [item.down.shape[0] for item in (a, *changes.values()) if isinstance(item, Factor)]
        kind = (*ranks, *changes) if len(ranks) == 1 + len(changes) else layer
        alike.setdefault(kind, []).append((layer, a, changes))
    return [_of_wholes(*group[0]) if isinstance(kind, str) else _of_factors(group) for kind, group in alike.items()]


def _of_factors(group: Sequence[tuple[str, Any, Mapping[int, Any]]]) -> Compared:
    """Weights whose changes are all factors, of the same ranks by the same LoRAs."""
    layers, own, changes = zip(*group, strict=True)
    numbers = tuple(changes[0])
    members = [own, *([found[number] for found in changes] for number in numbers)]
    places = range(1, len(members))
    several = list(combinations(places, 2))
    products = grams(members, [*((0, i) for i in places), *((i, i) for i in places), *several])
    seen = {numbers[i - 1]: _see(own, members[i], products[0, i], products[i, i]) for i in places}
    crosses = {(numbers[i - 1], numbers[j - 1]): inners(members[i], members[j], products[i, j]) for i, j in several}
    return Compared(layers, own, seen, crosses)


def _see(own: Sequence[Factor], others: Sequence[Factor], crossed: Grams, alone: Grams) -> Seen:
    """``others`` (b) by U_aᵀ dW_b D_aᵀ for ``own`` (a); ``crossed``: products of a with b, ``alone``: of b with b."""
    note_energies(others, alone)
    up, down = crossed  # L r_a r_b
    left, right = (torch.stack(roots).mT for roots in zip(*(a.roots for a in own), strict=True))
    rows = right @ down  # D_b in an orthonormal basis of D_a's rows
    within = column([b.scale for b in others])[:, None, None] * ((left @ up) @ rows.mT)
    energies = rows.square().sum((1, 2)), trace(alone[1])
    return Seen(column([b.energy for b in others]), inners(own, others, crossed), within, energies)


def _of_wholes(layer: str, a: Change, changes: Mapping[int, Change]) -> Compared:
    """One weight where the safety LoRA's change or another is no product of thin factors."""
    several = sum(isinstance(b, Whole) for b in (a, *changes.values())) > 1  # then one meets the other densely
    own = a.dense() if several and isinstance(a, Whole) else None
    matrices = {index: b.dense() if several and isinstance(b, Whole) else None for index, b in changes.items()}
    crosses = {
        (i, j): column([_inner(changes[i], matrices[i], changes[j], matrices[j])]) for i, j in combinations(changes, 2)
    }
    seen = {index: _seen(a, own, b, matrices[index]) for index, b in changes.items()}
    return Compared((layer,), (a,), seen, crosses)


def _seen(a: Change, own: Tensor | None, b: Change, matrix: Tensor | None) -> Seen:
    """One change by another; ``own`` and ``matrix`` where they are dense already."""
    energy = column([b.energy])
    if not isinstance(a, Factor):  # it spans everything: all of dW_b is inside
        return Seen(energy, column([_inner(a, own, b, matrix)]), None, (torch.ones(1), torch.ones(1)))
    if isinstance(b, Factor):
        return _see([a], [b], *grams([[a], [b]], [(0, 1), (1, 1)]).values())
    up, down = ready(a)
    change = _times(b, matrix, down.T)  # out r
    M = product(up, change.T).double()  # r r
    rows = (change.double() @ a.roots[1]).square().sum()
    return Seen(energy, a.scale * M.trace()[None], (a.roots[0].T @ M @ a.roots[1])[None], (rows[None], energy))


def _inner(a: Change, A: Tensor | None, b: Change, B: Tensor | None) -> float:
    """<dW_a, dW_b>; ``A`` and ``B`` where they are dense already."""
    if isinstance(a, Factor):
        if isinstance(b, Factor):
            return float(inners([a], [b], grams([[a], [b]], [(0, 1)])[0, 1]))
        return a.scale * _dot(_times(b, B, a.down.T), a.up)
    if isinstance(b, Factor):
        return _inner(b, B, a, A)
    return _dot(a.dense() if A is None else A, b.dense() if B is None else B)


def _times(b: Whole, matrix: Tensor | None, x: Tensor) -> Tensor:
    """dW_b·x (in r -> out r), by its dense matrix where there is one."""
    return b.times(x) if matrix is None else matrix @ x.to(matrix)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, torch.zeros(()))


def _dot(a: Tensor, b: Tensor) -> float:
    """Σ a ⊙ b: rows in their own precision, their sum in fp64."""
    return float((a * b.to(a)).sum(1).sum(dtype=torch.float64))
