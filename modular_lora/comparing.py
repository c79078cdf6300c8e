"""One weight's change by one LoRA against another's: norms, inner products, and what lies in the other's spaces.

For LoRAs everything follows from Gram matrices of the factors (r by r): <U1 D1, U2 D2> = sum((U1ᵀU2) ⊙ (D1 D2ᵀ)), and
no dense product is formed. What is no product of thin factors (LoKr, DoRA, OFT, full differences) goes in exactly, by
products with thin matrices where that is enough, else by one dense matrix a layer that is dropped again. Sums are in
fp64; products of large factors are in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from .adapters import LoraLayer
from .changes import Bias, Dense, Gain, Kron, LowRank, Part, dense, times
from .errors import GuardError
from .files import LoraFile
from .layers import LayerSpec
from .matching import Match, Target
from .resolve import resolve

SMALL = 2**14  # entries of a factor; up to there products are in fp64
ZERO_ENERGY = 1e-14  # of ‖U‖²‖D‖²: what rounding leaves of factors that cancel


@dataclass(frozen=True, eq=False)
class Factor:
    """dW = scale * up @ down of one weight, without strength."""

    up: Tensor  # out r
    down: Tensor  # r in, a conv kernel flattened
    scale: float = 1.0  # alpha / rank

    @cached_property
    def rows(self) -> Tensor:
        """D Dᵀ (r r)."""
        return _gram(self.down, self.down)

    @cached_property
    def columns(self) -> Tensor:
        """UᵀU (r r)."""
        return _gram(self.up.T, self.up.T)

    @cached_property
    def energy(self) -> float:
        """‖dW‖²; 0 where the factors cancel to rounding."""
        rows, columns = self.rows, self.columns
        if not (_exact(self.up) and _exact(self.down)) and float((columns * rows).sum()) < 1e-3 * _bound(columns, rows):
            rows, columns = _gram(self.down.double(), self.down.double()), _gram(self.up.double().T, self.up.double().T)
        energy = float((columns * rows).sum())
        return self.scale**2 * energy if energy > ZERO_ENERGY * _bound(columns, rows) else 0.0

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """R (r n) with R Rᵀ the pseudo-inverse of UᵀU, and of D Dᵀ."""
        return tuple(
            _root(gram, 1e-12 if _exact(f) else 1e-6) for gram, f in ((self.columns, self.up), (self.rows, self.down))
        )

    @property
    def span(self) -> float:
        """r / in: the row overlap that chance gives."""
        return self.down.shape[0] / self.down.shape[1]


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
        matrix = dense(part, self.W0) if scale == 1 else scale * dense(part, self.W0)
        for part, scale in others:
            matrix = torch.add(matrix, dense(part, self.W0), alpha=scale)
        return matrix

    def times(self, x: Tensor) -> Tensor:
        """dW·x (in n -> out n)."""
        return sum(scale * times(part, self.W0, x.float()) for part, scale in self.parts)

    @cached_property
    def energy(self) -> float:
        """‖dW‖²: of thin parts and one other by their inner products, unless they cancel to rounding."""
        thin = [(part, scale) for part, scale in self.parts if isinstance(part, LowRank)]
        others = [(part, scale) for part, scale in self.parts if not isinstance(part, LowRank)]
        if len(others) == 1 and len(thin) <= 1:
            ((part, scale),) = others
            values = [scale**2 * self._energy(part)]
            for pair, size in thin:
                values.append(Factor(pair.up, pair.down, size).energy)
                values.append(2 * size * scale * _dot(times(part, self.W0, pair.down.float().T), pair.up.float()))
            if math.fsum(values) > 1e-3 * math.fsum(map(abs, values)):
                return math.fsum(values)
        return _energy(self.dense())

    def _energy(self, part: Part) -> float:
        if isinstance(part, Kron):
            return _energy(part.w1.float()) * _energy(part.w2.float().flatten(1))
        if isinstance(part, Gain):
            return _energy(part.gain.float()[:, None] * self.W0().float().flatten(1).norm(dim=1, keepdim=True))
        return _energy(dense(part, self.W0))


Change: TypeAlias = "Factor | Whole"
Changes: TypeAlias = "Mapping[str, Change]"  # weight key -> what one LoRA does to it


def factor(layer: LoraLayer, target: Target, shape: tuple[int, ...]) -> Factor:
    """A file's layer as factors of the whole weight of `shape`: kernel flattened, a slice embedded in zeros; fp32."""
    ((part, scale),) = resolve(layer, target, LayerSpec("", tuple(shape)), _unasked)
    return Factor(part.up, part.down, scale)


def factors(lora: LoraFile, match: Match, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factor]:
    """All matched layers of a LoRA file by weight key; slices of one weight are joined into one factor."""
    found: dict[str, list[tuple[Factor, float]]] = {}
    for name, target in match.targets.items():
        found.setdefault(target.key, []).append((factor(lora.layers[name], target, shapes[target.key]), 1.0))
    return {key: terms[0][0] if len(terms) == 1 else join(terms) for key, terms in found.items()}


def change(parts: Sequence[tuple[Part, float]], W0: Callable[[], Tensor]) -> Change:
    """Σ scale·part of one weight, or of one bias, as a change to compare; ``W0`` as in changes.dense."""
    pairs = [(_thin(part), scale) for part, scale in parts]
    if any(pair is None for pair, _ in pairs):
        return Whole(parts, W0)
    thin = [(Factor(*pair, scale), 1.0) for pair, scale in pairs]
    return thin[0][0] if len(thin) == 1 else join(thin)


def _thin(part: Part) -> tuple[Tensor, Tensor] | None:
    """A part as up (out r) and down (r in); vectors are columns. None where it is no thin product."""
    if isinstance(part, LowRank):
        return part.up, part.down
    if isinstance(part, Bias):
        return part.bias[:, None], torch.ones(1, 1)
    if isinstance(part, Dense) and part.weight.shape[1] == 1:
        return part.weight, torch.ones(1, 1)
    return None


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
class Pair:
    """Inner products of one weight's safety (s) and task (t) change; t is 0 where no task LoRA changes it."""

    layer: str
    ss: float
    tt: float
    st: float
    inside: float  # ‖P_U dW_t P_D‖²
    row_overlap: float

    @property
    def cosine(self) -> float:
        return max(-1.0, min(1.0, self.st / math.sqrt(self.ss * self.tt)))


@dataclass(frozen=True, eq=False)
class _Seen:
    """One task LoRA's change of a weight, at strength 1, as the safety LoRA's change sees it."""

    st: float
    within: Tensor | None  # r_s r_s: P_U dW_t P_D in orthonormal bases of the two spaces; None: all of dW_t is inside
    rows: tuple[float, float]  # energy of its rows inside the row space of D_s, and in all


class Compared:
    """The safety LoRA's change ``a`` of one weight and what every other LoRA does to that weight.

    Raises GuardError where ``a`` does nothing.
    """

    def __init__(self, layer: str, a: Change, others: Sequence[Changes]):
        self.layer, self.a = layer, a
        if a.energy == 0:
            raise GuardError(f"safety LoRA: layer {layer} has norm 0, it protects nothing: train the LoRA again")
        changes = {index: found[layer] for index, found in enumerate(others) if layer in found}
        several = sum(isinstance(b, Whole) for b in (a, *changes.values())) > 1  # then one meets the other densely
        own = a.dense() if several and isinstance(a, Whole) else None
        matrices = {index: b.dense() if several and isinstance(b, Whole) else None for index, b in changes.items()}
        self.energies = {index: b.energy for index, b in changes.items()}
        self.crosses = _crosses(changes, matrices)
        roots = a.roots if changes and isinstance(a, Factor) else None
        self.seen = {
            index: _seen_by_factor(a, roots, b, matrices[index])
            if roots
            else _seen_by_dense(a, own, b, matrices[index])
            for index, b in changes.items()
        }

    def pair(self, strengths: Sequence[float]) -> Pair:
        """Against Σ strength·dW_t."""
        strengths = {index: strength for index, strength in enumerate(strengths) if strength and index in self.seen}
        alone = math.fsum(strength**2 * self.energies[index] for index, strength in strengths.items())
        tt = alone + 2 * math.fsum(
            strengths[i] * strengths[j] * value
            for (i, j), value in self.crosses.items()
            if i in strengths and j in strengths
        )
        if tt <= ZERO_ENERGY * alone or tt == 0:
            return Pair(self.layer, self.a.energy, 0.0, 0.0, 0.0, 0.0)
        seen = [(self.seen[index], strength) for index, strength in strengths.items()]
        st = math.fsum(strength * one.st for one, strength in seen)
        within = None if seen[0][0].within is None else sum(strength * one.within for one, strength in seen)
        inside = tt if within is None else min(tt, float(within.square().sum()))
        rows = math.fsum(one.rows[0] for one, _ in seen) / max(math.fsum(one.rows[1] for one, _ in seen), 1e-300)
        return Pair(self.layer, self.a.energy, tt, st, inside, min(1.0, rows))

    def alone(self, index: int) -> Pair | None:
        """Against one LoRA at strength 1; None where it does not change the weight."""
        if index not in self.seen or self.energies[index] == 0:
            return None
        one, tt = self.seen[index], self.energies[index]
        return Pair(self.layer, self.a.energy, tt, one.st, 0.0, min(1.0, one.rows[0] / one.rows[1]))


def _crosses(changes: Mapping[int, Change], matrices: Mapping[int, Tensor | None]) -> dict[tuple[int, int], float]:
    """<dW_i, dW_j> of every two LoRAs; ``matrices`` holds the dense ones."""
    return {(i, j): _inner(changes[i], matrices[i], changes[j], matrices[j]) for i, j in combinations(changes, 2)}


def _inner(a: Change, A: Tensor | None, b: Change, B: Tensor | None) -> float:
    """<dW_a, dW_b>; ``A`` and ``B`` where they are dense already."""
    if isinstance(a, Factor) and isinstance(b, Factor):
        return a.scale * b.scale * float((_gram(a.up.T, b.up.T) * _gram(a.down, b.down)).sum())
    if isinstance(b, Factor):
        a, A, b, B = b, B, a, A
    if isinstance(a, Factor):
        return a.scale * _dot(_times(b, B, a.down.T), a.up)
    return _dot(a.dense() if A is None else A, b.dense() if B is None else B)


def _times(b: Whole, matrix: Tensor | None, x: Tensor) -> Tensor:
    """dW_b·x (in r -> out r), by its dense matrix where there is one."""
    return b.times(x) if matrix is None else matrix @ x.to(matrix)


def _seen_by_factor(a: Factor, roots: tuple[Tensor, Tensor], b: Change, matrix: Tensor | None) -> _Seen:
    """dW_b (``matrix`` where it is dense) by M = U_aᵀ dW_b D_aᵀ (r r)."""
    if isinstance(b, Factor):
        B = _gram(b.down, a.down)  # r_b r_a
        M = b.scale * _gram(a.up.T, b.up.T) @ B
        rows = float((B @ roots[1]).square().sum()), float(b.rows.trace())
    else:
        seen = _times(b, matrix, a.down.T)  # out r
        M = _gram(a.up.T, seen.T)
        rows = float((seen.double() @ roots[1]).square().sum()), b.energy
    return _Seen(a.scale * float(M.trace()), roots[0].T @ M @ roots[1], rows)


def _seen_by_dense(a: Whole, own: Tensor | None, b: Change, matrix: Tensor | None) -> _Seen:
    """A dense safety change spans everything: all of dW_b is inside."""
    return _Seen(_inner(a, own, b, matrix), None, (1.0, 1.0))


def _dot(a: Tensor, b: Tensor) -> float:
    """Σ a ⊙ b: rows in their own precision, their sum in fp64."""
    return float((a * b.to(a)).sum(1).sum(dtype=torch.float64))


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ (r_a r_b, fp64)."""
    if _exact(a) and _exact(b):
        return a.double() @ b.double().T
    return (a @ b.T).double()


def _exact(a: Tensor) -> bool:
    """Whether products of a factor are in fp64."""
    return a.numel() <= SMALL or a.dtype == torch.float64


def _bound(columns: Tensor, rows: Tensor) -> float:
    """‖U‖²‖D‖² from the Gram matrices."""
    return float(columns.trace() * rows.trace())


def _root(gram: Tensor, exact: bool) -> Tensor:
    """R (r n) with R Rᵀ the pseudo-inverse of a Gram matrix (r r); what is below rounding spans nothing."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > (1e-12 if exact else 1e-6) * values[-1].clamp(min=0)
    return vectors[:, kept] / values[kept].sqrt()
