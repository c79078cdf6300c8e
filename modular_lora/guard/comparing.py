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
from typing import TypeAlias, cast

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

    span = 1.0  # of the rows that chance gives inside its row space, as Factor.span: all of them

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
    raise TypeError(f"a LoRA is not a function of {key}")


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
    span: float  # of dW_s, see Factor.span

    @property
    def cosine(self) -> float:
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.safety_energy * self.task_energy)))


@dataclass(frozen=True, eq=False)
class TaskFigures:
    """One task LoRA's changes dW_t of L weights, at strength 1, beside the safety LoRA's changes dW_s of them."""

    energy: Tensor  # ‖dW_t‖², L
    inner: Tensor  # <dW_s, dW_t>, L
    projected: Tensor | None  # P_U dW_t P_D in orthonormal bases of both spaces, L r_s r_s; None: they hold all of dW_t
    rows_inside: Tensor  # energy of the rows of D_t inside the row space of D_s, L
    rows_energy: Tensor  # energy of all rows of D_t, L


@dataclass(frozen=True, eq=False)
class Compared:
    """Weights that the safety LoRA and the same others change: L weights whose changes have the same ranks, or one."""

    layers: tuple[str, ...]
    changes: tuple[Change, ...]  # the safety LoRA's
    figures: Mapping[int, TaskFigures]  # by the number of the other
    crosses: Mapping[tuple[int, int], Tensor]  # L: <dW_i, dW_j> of every two others

    def pairs(self, strengths: Sequence[float]) -> list[LayerPair]:
        """Against Σ strength·dW_t, weight by weight."""
        acting = {index: one for index, one in self.figures.items() if strengths[index]}
        if not acting:
            nothing = torch.zeros(len(self.layers))
            return self._pairs(energy=nothing, inner=nothing, projected=nothing, overlap=nothing)
        apart = _total(strengths[index] ** 2 * one.energy for index, one in acting.items())
        crossed = [(i, j) for i, j in self.crosses if i in acting and j in acting]
        energy = apart + 2 * _total(strengths[i] * strengths[j] * self.crosses[i, j] for i, j in crossed)
        inner = _total(strengths[index] * one.inner for index, one in acting.items())
        projected = energy
        parts = [strengths[index] * one.projected for index, one in acting.items() if one.projected is not None]
        if parts:
            projected = torch.minimum(energy, _total(parts).square().sum((1, 2)))
        changed = (energy > ZERO_ENERGY * apart) & (energy != 0)  # else the task LoRAs cancel to rounding
        return self._pairs(
            energy=torch.where(changed, energy, 0.0),
            inner=torch.where(changed, inner, 0.0),
            projected=torch.where(changed, projected, 0.0),
            overlap=torch.where(changed, _overlap(acting.values()), 0.0),
        )

    def alone(self, index: int) -> list[LayerPair]:
        """Against one LoRA at strength 1, the weights that it changes; what it has inside the spaces is not asked."""
        if (one := self.figures.get(index)) is None:
            return []
        nothing = torch.zeros_like(one.energy)
        pairs = self._pairs(energy=one.energy, inner=one.inner, projected=nothing, overlap=_overlap([one]))
        return [pair for pair in pairs if pair.task_energy]

    def _pairs(self, *, energy: Tensor, inner: Tensor, projected: Tensor, overlap: Tensor) -> list[LayerPair]:
        """By the task LoRAs' figures of every weight (L each)."""
        by_weight = zip(*(figure.tolist() for figure in (energy, inner, projected, overlap)), strict=True)
        return [
            LayerPair(
                layer=layer,
                safety_energy=change.energy,
                task_energy=task_energy,
                inner=product,
                projected_energy=inside,
                row_overlap=rows,
                span=change.span,
            )
            for layer, change, (task_energy, product, inside, rows) in zip(
                self.layers, self.changes, by_weight, strict=True
            )
        ]


def _overlap(figures: Iterable[TaskFigures]) -> Tensor:
    """Energy of the rows inside over that of all rows (L)."""
    some = tuple(figures)
    inside, whole = _total(one.rows_inside for one in some), _total(one.rows_energy for one in some)
    return (inside / whole.clamp(min=1e-300)).clamp(max=1.0)


def compare(safety: Changes, others: Sequence[Changes]) -> list[Compared]:
    """What every other LoRA does to the safety LoRA's weights; factors of the same ranks together.

    Raises GuardError where a change of the safety LoRA does nothing.
    """
    measure(safety.values())
    of_factors: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[str, Factor, dict[int, Factor]]]] = {}
    of_wholes: list[tuple[str, Change, dict[int, Change]]] = []
    for layer, own in safety.items():
        if own.energy == 0:
            raise GuardError(
                f"safety LoRA: layer {layer} has norm 0, it protects nothing: train the LoRA again",
                code="lora.zero-layer",
            )
        changes = {number: found[layer] for number, found in enumerate(others) if layer in found}
        factors = {number: change for number, change in changes.items() if isinstance(change, Factor)}
        if isinstance(own, Factor) and len(factors) == len(changes):
            ranks = tuple(one.down.shape[0] for one in (own, *factors.values()))
            of_factors.setdefault((ranks, tuple(factors)), []).append((layer, own, factors))
        else:
            of_wholes.append((layer, own, changes))
    return [*(_of_factors(group) for group in of_factors.values()), *(_of_wholes(*one) for one in of_wholes)]


def _of_factors(weights: Sequence[tuple[str, Factor, Mapping[int, Factor]]]) -> Compared:
    """Weights whose changes are all factors, of the same ranks by the same LoRAs."""
    layers, safety, changes = zip(*weights, strict=True)
    tasks = {number: [found[number] for found in changes] for number in changes[0]}
    place = {number: 1 + i for i, number in enumerate(tasks)}  # among the members, of which the safety LoRA is 0
    two = list(combinations(tasks, 2))
    wanted = [pair for i in place.values() for pair in ((0, i), (i, i))]
    products = grams([safety, *tasks.values()], [*wanted, *((place[i], place[j]) for i, j in two)])
    return Compared(
        layers=layers,
        changes=safety,
        figures={n: _figures_of_factors(safety, tasks[n], products[0, i], products[i, i]) for n, i in place.items()},
        crosses={(i, j): inners(tasks[i], tasks[j], products[place[i], place[j]]) for i, j in two},
    )


def _figures_of_factors(safety: Sequence[Factor], task: Sequence[Factor], crossed: Grams, alone: Grams) -> TaskFigures:
    """L weights' dW_t by U_sᵀ dW_t D_sᵀ; ``crossed``: products of both, ``alone``: of the task LoRA with itself."""
    note_energies(task, alone)
    up, down = crossed  # U_sᵀU_t and D_s D_tᵀ, L r_s r_t
    left, right = (torch.stack(roots).mT for roots in zip(*(one.roots for one in safety), strict=True))  # L r_s r_s
    rows = right @ down  # D_t in an orthonormal basis of D_s's rows
    return TaskFigures(
        energy=column([one.energy for one in task]),
        inner=inners(safety, task, crossed),
        projected=column([one.scale for one in task])[:, None, None] * ((left @ up) @ rows.mT),
        rows_inside=rows.square().sum((1, 2)),
        rows_energy=trace(alone[1]),
    )


def _of_wholes(layer: str, own: Change, changes: Mapping[int, Change]) -> Compared:
    """One weight where the safety LoRA's change or another is no product of thin factors.

    A change that meets another of its kind is made dense once; one that meets factors alone is not.
    """
    several = sum(isinstance(one, Whole) for one in (own, *changes.values())) > 1
    own_dense = own.dense() if several and isinstance(own, Whole) else None
    dense = {n: one.dense() if several and isinstance(one, Whole) else None for n, one in changes.items()}
    return Compared(
        layers=(layer,),
        changes=(own,),
        figures={n: _figures_of_change(own, own_dense, one, dense[n]) for n, one in changes.items()},
        crosses={
            (i, j): column([_inner(changes[i], dense[i], changes[j], dense[j])]) for i, j in combinations(changes, 2)
        },
    )


def _figures_of_change(own: Change, own_dense: Tensor | None, task: Change, task_dense: Tensor | None) -> TaskFigures:
    """One weight's dW_t; the two matrices where they are made already."""
    energy = column([task.energy])
    if not isinstance(own, Factor):  # it spans everything: all of dW_t is inside
        inner = column([_inner(own, own_dense, task, task_dense)])
        return TaskFigures(energy, inner, projected=None, rows_inside=torch.ones(1), rows_energy=torch.ones(1))
    if isinstance(task, Factor):
        products = grams([[own], [task]], [(0, 1), (1, 1)])
        return _figures_of_factors([own], [task], products[0, 1], products[1, 1])
    up, down = ready(own)
    seen = _times(task, task_dense, down.T)  # dW_t D_sᵀ, out r_s
    within = product(up, seen.T).double()  # U_sᵀ dW_t D_sᵀ, r_s r_s
    left, right = own.roots
    return TaskFigures(
        energy=energy,
        inner=own.scale * within.trace()[None],
        projected=(left.T @ within @ right)[None],
        rows_inside=(seen.double() @ right).square().sum()[None],
        rows_energy=energy,
    )


def _inner(a: Change, a_dense: Tensor | None, b: Change, b_dense: Tensor | None) -> float:
    """<dW_a, dW_b>; the two matrices where they are made already."""
    if isinstance(a, Factor):
        if isinstance(b, Factor):
            return float(inners([a], [b], grams([[a], [b]], [(0, 1)])[0, 1]))
        return a.scale * _dot(_times(b, b_dense, a.down.T), a.up)
    if isinstance(b, Factor):
        return _inner(b, b_dense, a, a_dense)
    return _dot(a.dense() if a_dense is None else a_dense, b.dense() if b_dense is None else b_dense)


def _times(b: Whole, matrix: Tensor | None, x: Tensor) -> Tensor:
    """dW_b·x (in r -> out r), by its dense matrix where there is one."""
    return b.times(x) if matrix is None else matrix @ x.to(matrix)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, torch.zeros(()))


def _dot(a: Tensor, b: Tensor) -> float:
    """Σ a ⊙ b: rows in their own precision, their sum in fp64."""
    return float((a * b.to(a)).sum(1).sum(dtype=torch.float64))
