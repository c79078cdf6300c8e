"""How much task LoRAs and a safety LoRA overlap, and what is left of the safety LoRA's strength."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import GuardError
from .comparing import Changes, Compared, compare

SHARED_ROWS = 0.5
SMALL_SPAN = 0.25  # r_s / in; above it, chance alone shares many rows
LEAST_DEVIATION = 1e-4  # of cosines: half-precision files tell no less


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
    likeness: tuple[float, ...] = ()  # of each task LoRA: cosine of both changes over all weights that both change


def interference(safety: Changes, s: float, others: Sequence[tuple[str, Changes, float]], floor: float) -> Interference:
    """Compare a safety LoRA at strength `s` with task LoRAs, each (name, changes, strength).

    Net strength is s + Σ_t strength_t·<dW_t, dW_s>/‖dW_s‖², per weight and in all (sums of inner products over sums
    of squared norms; weights that no task LoRA changes count with s). Whether a net strength below `floor` stops the
    run is the caller's decision (sentence: `cancelled`). Raises GuardError for a safety LoRA without any effect.
    """
    if not safety:
        raise GuardError(
            "safety LoRA: has 0 matched layers, nothing to compare: use a LoRA made for this base",
            code="guard.nothing-to-compare",
        )
    compared = compare(safety, [changes for _, changes, _ in others])
    found = {p.layer: p for group in compared for p in group.pairs([strength for _, _, strength in others])}
    pairs = [found[key] for key in safety]
    net = {p.layer: s + p.inner / p.safety_energy for p in pairs}
    shared = [p for p in pairs if p.task_energy > 0]
    cosines = [p.cosine for p in shared]
    lowest = min(net.items(), key=lambda item: item[1])
    below = sum(value < floor for value in net.values())
    marks = [sentence for index, (name, _, _) in enumerate(others) for sentence in _marks(name, index, compared)]
    return Interference(
        layers=tuple(
            LayerInterference(p.layer, p.cosine, p.projected_energy / p.task_energy, p.row_overlap, net[p.layer])
            for p in shared
        ),
        mean_cosine=_mean(cosines),
        cosine_z=_z(cosines),
        energy_overlap=math.fsum(p.projected_energy for p in shared)
        / max(math.fsum(p.task_energy for p in shared), 1e-300),
        row_overlap=_mean([p.row_overlap for p in shared]),
        net_strength=s + math.fsum(p.inner for p in pairs) / math.fsum(p.safety_energy for p in pairs),
        lowest_net=lowest,
        layers_below_floor=below,
        shared_layers=len(shared),
        warnings=(*marks, *_weakened(below, len(net), lowest, floor)),
        likeness=tuple(_likeness(index, compared) for index in range(len(others))),
    )


def cancelled(result: Interference, s: float, floor: float, subject: str) -> str:
    """One line for a safety LoRA (`subject`) whose net strength is below the floor."""
    layer, value = result.lowest_net
    left = f"a net strength of {result.net_strength:.2f} is left of {s:.2f}, below the floor of {floor:.2f}"
    return f"{subject}: {left} (lowest {value:.2f} in {layer}): lower the strength of the task LoRAs or leave them out"


def _likeness(index: int, compared: Sequence[Compared]) -> float:
    """<dW_t, dW_s> / ‖dW_t‖‖dW_s‖ of one task LoRA over the weights that both change; 0 where there is none."""
    pairs = [pair for group in compared for pair in group.alone(index)]
    sizes = math.fsum(p.task_energy for p in pairs) * math.fsum(p.safety_energy for p in pairs)
    return math.fsum(p.inner for p in pairs) / math.sqrt(sizes) if sizes > 0 else 0.0


def _marks(name: str, index: int, compared: Sequence[Compared]) -> list[str]:
    """Sentences on how one task LoRA was made; its strength plays no part."""
    pairs = [pair for group in compared for pair in group.alone(index)]
    cosines = [pair.cosine for pair in pairs]
    small = [(pair.span, pair.row_overlap) for pair in pairs if pair.span < SMALL_SPAN]
    rows = _mean([overlap for _, overlap in small])
    sentences = []
    if _mean(cosines) < -0.01 and _z(cosines) < -3:
        what = f"{name}: mean cosine to the safety LoRA is {_mean(cosines):.3f} (z {_z(cosines):.1f})"
        why = "the mark of a task LoRA trained on top of a safety-tuned model (arXiv 2412.00357)"
        sentences.append(f"{what}, {why}: retrain it on the original base W0")
    if rows > SHARED_ROWS:
        expected = _mean([span for span, _ in small])
        what = f"{name}: shares {rows:.2f} of its rows with the safety LoRA, {expected:.2f} expected"
        why = "the mark of one random initialisation (same seed), a projection would delete most of it"
        sentences.append(f"{what}, {why}: retrain it with another seed")
    return sentences


def _weakened(below: int, total: int, lowest: tuple[str, float], floor: float) -> Iterator[str]:
    if below:
        what = f"{below} of {total} layers keep a net safety strength below {floor:.2f}"
        yield f"{what}, lowest {lowest[1]:.2f} in {lowest[0]}: lower the strength of the task LoRAs"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _z(values: Sequence[float]) -> float:
    """Mean over its standard error; 0 for fewer than two values, which say nothing of spread."""
    if len(values) < 2:
        return 0.0
    return _mean(values) / (max(statistics.stdev(values), LEAST_DEVIATION) / math.sqrt(len(values)))
