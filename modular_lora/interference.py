"""How much task LoRAs and a safety LoRA overlap, and what is left of the safety LoRA's strength.

Everything follows from Gram matrices of the factors (r by r): <U1 D1, U2 D2> = sum((U1ᵀU2) ⊙ (D1 D2ᵀ)); no dense
product of up and down is ever formed. All sums are in fp64.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GuardError
from .files import LoraFile, LoraLayer
from .matching import Match, Target, slice_shape

PINV_RTOL = 1e-12  # of eigenvalues: directions below 1e-6 of a factor's largest singular value span nothing
ZERO_ENERGY = 1e-14  # of ‖U‖²‖D‖²: what rounding leaves of factors that cancel
SHARED_ROWS = 0.5
SMALL_SPAN = 0.25  # r_s / in; above it, chance alone shares many rows
LEAST_DEVIATION = 1e-4  # of cosines: half-precision files tell no less

Factors = Mapping[str, "Factor"]  # weight key -> factor


@dataclass(frozen=True, eq=False)
class Factor:
    """dW = scale * up @ down of one weight, without strength."""

    up: Tensor  # out r
    down: Tensor  # r in, a conv kernel flattened
    scale: float = 1.0  # alpha / rank


@dataclass(frozen=True)
class LayerInterference:
    """Task LoRAs (summed with their strengths) against the safety LoRA on one weight."""

    layer: str
    cosine: float
    energy_overlap: float  # share of ‖dW_t‖² inside the column space of U_s and the row space of D_s
    row_overlap: float  # share of ‖D_t‖² inside the row space of D_s; r_s / in for independent LoRAs
    net_strength: float  # s + Σ strength·<dW_t, dW_s> / ‖dW_s‖²


@dataclass(frozen=True)
class Interference:
    """All weights that both change, and the net strength over all weights of the safety LoRA."""

    layers: tuple[LayerInterference, ...]
    mean_cosine: float
    cosine_z: float  # mean / (deviation / √L)
    energy_overlap: float  # weighted by ‖dW_t‖²
    row_overlap: float
    net_strength: float
    lowest_net: tuple[str, float]
    layers_below_floor: int
    shared_layers: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
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


def factor(layer: LoraLayer, target: Target, shape: tuple[int, ...]) -> Factor:
    """A file's layer as factors of the whole weight of `shape`: kernel flattened, a slice embedded in zeros; fp32."""
    part = slice_shape(target, shape)
    up = layer.up.float().reshape(part[0], layer.rank)  # out r
    down = layer.down.float().reshape(layer.rank, *part[1:])  # r in [k k]
    if target.offset is not None:
        dim, start, length = target.offset
        whole = up.new_zeros(shape[0], layer.rank) if dim == 0 else down.new_zeros(layer.rank, *shape[1:])
        whole.narrow(dim, start, length).copy_(up if dim == 0 else down)
        up, down = (whole, down) if dim == 0 else (up, whole)
    return Factor(up, down.flatten(1), layer.scale)


def factors(lora: LoraFile, match: Match, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factor]:
    """All matched layers of a file by weight key; slices of one weight are joined into one factor."""
    found: dict[str, list[tuple[Factor, float]]] = {}
    for name, target in match.targets.items():
        found.setdefault(target.key, []).append((factor(lora.layers[name], target, tuple(shapes[target.key])), 1.0))
    return {key: terms[0][0] if len(terms) == 1 else join(terms) for key, terms in found.items()}


def join(terms: Sequence[tuple[Factor, float]]) -> Factor:
    """Σ strength·dW of several factors of one weight as one factor (ranks concatenated, scale 1)."""
    up = torch.cat([strength * f.scale * f.up.double() for f, strength in terms], 1)  # out R
    down = torch.cat([f.down.double() for f, _ in terms])  # R in
    return Factor(up, down)


def inner(a: Factor, b: Factor) -> float:
    """<dW_a, dW_b> by the Gram trace; fp64."""
    return a.scale * b.scale * float((_gram(a.up.T, b.up.T) * _gram(a.down, b.down)).sum())


def norm(a: Factor) -> float:
    """Frobenius norm of dW by the Gram trace; 0 where the factors cancel to rounding."""
    return math.sqrt(_energy(_gram(a.up.T, a.up.T), _gram(a.down, a.down))) * abs(a.scale)


def interference(safety: Factors, s: float, others: Sequence[tuple[str, Factors, float]], floor: float) -> Interference:
    """Compare a safety LoRA at strength `s` with task LoRAs, each (name, factors, strength).

    Net strength is s + Σ_t strength_t·<dW_t, dW_s>/‖dW_s‖², per weight and in all (sums of inner products over sums
    of squared norms; weights that no task LoRA changes count with s). Whether a net strength below `floor` stops the
    run is the caller's decision (sentence: `cancelled`). Raises GuardError for a safety LoRA without any effect.
    """
    if not safety:
        raise GuardError("safety LoRA: has 0 matched layers, nothing to compare: use a LoRA made for this base")
    bases = {key: _Base(key, a) for key, a in safety.items()}
    pairs = [base.pair(_terms(key, others)) for key, base in bases.items()]
    net = {p.layer: s + p.st / p.ss for p in pairs}
    shared = [p for p in pairs if p.tt > 0]
    cosines = [p.cosine for p in shared]
    lowest = min(net.items(), key=lambda item: item[1])
    below = sum(value < floor for value in net.values())
    marks = [sentence for name, task, _ in others for sentence in _marks(name, bases, task)]
    return Interference(
        layers=tuple(
            LayerInterference(p.layer, p.cosine, p.inside / p.tt, p.row_overlap, net[p.layer]) for p in shared
        ),
        mean_cosine=_mean(cosines),
        cosine_z=_z(cosines),
        energy_overlap=math.fsum(p.inside for p in shared) / max(math.fsum(p.tt for p in shared), 1e-300),
        row_overlap=_mean([p.row_overlap for p in shared]),
        net_strength=s + math.fsum(p.st for p in pairs) / math.fsum(p.ss for p in pairs),
        lowest_net=lowest,
        layers_below_floor=below,
        shared_layers=len(shared),
        warnings=(*marks, *_weakened(below, len(net), lowest, floor)),
    )


def cancelled(result: Interference, s: float, floor: float, subject: str) -> str:
    """One line for a safety LoRA (`subject`) whose net strength is below the floor."""
    layer, value = result.lowest_net
    left = f"a net strength of {result.net_strength:.2f} is left of {s:.2f}, below the floor of {floor:.2f}"
    return f"{subject}: {left} (lowest {value:.2f} in {layer}): lower the strength of the task LoRAs or leave them out"


class _Base:
    """The safety LoRA's part of every comparison on one weight, computed once."""

    def __init__(self, layer: str, a: Factor) -> None:
        self.layer = layer
        self.factor = a
        rows = _gram(a.down, a.down)  # r r
        columns = _gram(a.up.T, a.up.T)  # r r
        self.energy = a.scale**2 * _energy(columns, rows)
        if self.energy == 0:
            raise GuardError(f"safety LoRA: layer {layer} has norm 0, it protects nothing: train the LoRA again")
        self.row_inverse = torch.linalg.pinv(rows, rtol=PINV_RTOL, hermitian=True)  # r r
        self.column_inverse = torch.linalg.pinv(columns, rtol=PINV_RTOL, hermitian=True)  # r r

    def pair(self, terms: Sequence[tuple[Factor, float]]) -> _Pair:
        """Compare with Σ strength·dW_t."""
        if not terms:
            return _Pair(self.layer, self.energy, 0.0, 0.0, 0.0, 0.0)
        a, t = self.factor, join(terms)
        B, T = _gram(t.down, a.down), _gram(t.down, t.down)  # r_t r_s, r_t r_t
        A, V = _gram(t.up.T, a.up.T), _gram(t.up.T, t.up.T)  # r_t r_s, r_t r_t
        tt = _energy(V, T)
        if tt == 0:
            return _Pair(self.layer, self.energy, 0.0, 0.0, 0.0, 0.0)
        K = B @ self.row_inverse @ B.T  # D_t P D_tᵀ, P on the rows of D_s
        C = A @ self.column_inverse @ A.T  # U_tᵀ P U_t, P on the columns of U_s
        inside = min(tt, max(0.0, float((C * K).sum())))
        row_overlap = min(1.0, float(K.trace() / T.trace()))
        return _Pair(self.layer, self.energy, tt, a.scale * float((A * B).sum()), inside, row_overlap)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().T  # r_a r_b


def _energy(columns: Tensor, rows: Tensor) -> float:
    """‖U D‖² from UᵀU and D Dᵀ (r r); 0 where only rounding is left."""
    energy = float((columns * rows).sum())
    return energy if energy > ZERO_ENERGY * float(columns.trace() * rows.trace()) else 0.0


def _terms(key: str, others: Iterable[tuple[str, Factors, float]]) -> list[tuple[Factor, float]]:
    return [(found[key], strength) for _, found, strength in others if strength and key in found]


def _marks(name: str, bases: Mapping[str, _Base], task: Factors) -> list[str]:
    """Sentences on how one task LoRA was made; its strength plays no part."""
    pairs = [base.pair([(task[key], 1.0)]) for key, base in bases.items() if key in task]
    cosines = [p.cosine for p in pairs if p.tt > 0]
    small = [p for p in pairs if p.tt > 0 and _span(bases[p.layer].factor) < SMALL_SPAN]
    rows = _mean([p.row_overlap for p in small])
    sentences = []
    if _mean(cosines) < -0.01 and _z(cosines) < -3:
        what = f"{name}: mean cosine to the safety LoRA is {_mean(cosines):.3f} (z {_z(cosines):.1f})"
        why = "the mark of a task LoRA trained on top of a safety-tuned model (arXiv 2412.00357)"
        sentences.append(f"{what}, {why}: retrain it on the original base W0")
    if rows > SHARED_ROWS:
        expected = _mean([_span(bases[p.layer].factor) for p in small])
        what = f"{name}: shares {rows:.2f} of its rows with the safety LoRA, {expected:.2f} expected"
        why = "the mark of one random initialisation (same seed), a projection would delete most of it"
        sentences.append(f"{what}, {why}: retrain it with another seed")
    return sentences


def _weakened(below: int, total: int, lowest: tuple[str, float], floor: float) -> Iterator[str]:
    if below:
        what = f"{below} of {total} layers keep a net safety strength below {floor:.2f}"
        yield f"{what}, lowest {lowest[1]:.2f} in {lowest[0]}: lower the strength of the task LoRAs"


def _span(a: Factor) -> float:
    """r / in: the row overlap that chance gives."""
    return a.down.shape[0] / a.down.shape[1]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _z(values: Sequence[float]) -> float:
    """Mean over its standard error; 0 for fewer than two values, which say nothing of spread."""
    if len(values) < 2:
        return 0.0
    return _mean(values) / (max(statistics.stdev(values), LEAST_DEVIATION) / math.sqrt(len(values)))
