"""What each of several safety LoRAs still does to its own concept, to the others' and to what is kept, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....modular_lora.files.reader import LoraFile
from ....modular_lora.guard.build import SafetyLora
from ....modular_lora.guard.comparing import Factor
from .layers import TextInput
from .make import SAMPLED, TINY, TextModel
from .words import Encoded, distinct

LIMITS = (
    "Not claimed: that images show what these numbers say (audit the file); that words which are none of the concept "
    "prompts are answered as before, or as each LoRA alone would."
)


@dataclass(frozen=True, eq=False)
class Solved:
    """One input: what is known of it, and the new file's layers behind it."""

    input: TextInput
    C: list[Tensor]  # concept by concept, d n
    rows: Mapping[str, Encoded]
    factors: dict[str, tuple[Tensor, Tensor, float]]
    slices: dict[str, list[slice]]  # layer's name -> which of its ranks are whose


@dataclass(frozen=True, eq=False)
class Measured:
    """Over at most eight layers of every LoRA and input; LoRAs in their order.

    Attributes:
        alone: of LoRA i on the concept of j, tokens that i's own concept has too apart: ‖ΔW C‖ / ‖W C‖ as it was.
        combined: the same of its part in the new file.
        held: the share of what a LoRA did to its own concept alone that the file does: 1 − ‖ΔW* C − ΔW C‖ / ‖ΔW C‖.
        kept: by preserved prompt, the largest ‖ΔW* k‖ / ‖W k‖ of a token in a layer.
    """

    alone: tuple[tuple[float, ...], ...]
    combined: tuple[tuple[float, ...], ...]
    held: tuple[float, ...]
    kept: Mapping[str, float]


def measure(
    model: TextModel,
    changes: Sequence[Mapping[str, Factor]],
    solved: Sequence[Solved],
    lora: LoraFile,
    kept: Sequence[str],
) -> Measured:
    """What the file ``lora`` does, by its own factors.

    Args:
        model: What the LoRAs were made for.
        changes: What each LoRA alone does to each layer, by path, its strength in it.
        solved: The inputs that the file was made of.
        lora: The file as saved.
        kept: Prompts that were to be kept.
    """
    count = len(changes)
    alone, combined, answer = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
    rest, wanted = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    stay = dict.fromkeys(kept, 0.0)
    for one in solved:
        apart = [[_apart(C, one.C[i]) if i != j else C for j, C in enumerate(one.C)] for i in range(count)]
        for path in _some(one.input.layers, changes):
            W, parts = model.weight(path).double(), _parts(lora, one, model.name(path))
            total = _Sum(parts, len(W))
            for i, (up, down) in enumerate(parts):
                before = changes[i].get(path)
                for j, x in enumerate(apart[i]):
                    answer[i, j] += _energy(W @ x)
                    combined[i, j] += _energy(up @ (down @ x))
                    alone[i, j] += _energy(_times(before, x))
                asked = _times(before, one.C[i])
                wanted[i] += _energy(asked)
                rest[i] += _energy(total @ one.C[i] - asked)
            for text in kept:
                x = one.rows[text].rows.T
                moved = (total @ x).norm(dim=0) / (W @ x).norm(dim=0).clamp_min(TINY)
                stay[text] = max(stay[text], float(moved.max()))
    held = 1 - (rest / wanted.clamp_min(TINY)).sqrt()
    return Measured(_table(alone, answer), _table(combined, answer), tuple(held.tolist()), stay)


def _table(sums: Tensor, answer: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, (sums / answer.clamp_min(TINY)).sqrt().tolist()))


@dataclass(frozen=True, eq=False)
class _Sum:
    """ΔW* of one layer, as the sum of the LoRAs' parts."""

    parts: Sequence[tuple[Tensor, Tensor]]
    out: int

    def __matmul__(self, x: Tensor) -> Tensor:
        return sum((up @ (down @ x) for up, down in self.parts if len(down)), x.new_zeros(self.out, x.shape[1]))


def _some(layers: Sequence[str], changes: Sequence[Mapping[str, Factor]]) -> list[str]:
    """At most eight of an input's layers that each LoRA changes."""
    found: dict[str, None] = {}
    for each in changes:
        ours = [path for path in layers if path in each]
        found |= dict.fromkeys(ours[:: max(1, -(-len(ours) // SAMPLED))])
    return list(found)


def _parts(lora: LoraFile, one: Solved, name: str) -> list[tuple[Tensor, Tensor]]:
    """(up, down) of every LoRA's part in a layer of the file as saved; empty ones where it has none."""
    if (layer := lora.plain.get(name)) is None:  # it was zero, and left out
        none = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(0, one.input.width, dtype=torch.float64)
        return [none for _ in one.C]
    up, down = layer.scale * layer.up.double().flatten(1), layer.down.double().flatten(1)
    return [(up[:, ranks], down[ranks]) for ranks in one.slices[name]]


def _apart(C: Tensor, others: Tensor) -> Tensor:
    """The columns of C that are none of the others', compared as `distinct` does."""
    both = torch.cat([others, C], 1)
    return both[:, [i for i in distinct(both) if i >= others.shape[1]]]


def _times(factor: Factor | None, x: Tensor) -> Tensor:
    if factor is None:
        return x.new_zeros(1, x.shape[1])
    return factor.scale * factor.up.double() @ (factor.down.double() @ x)


def _energy(x: Tensor) -> float:
    return float(x.square().sum())


def still_does(safety: Sequence[SafetyLora], prompts: Sequence[Sequence[str]], measured: Measured) -> Iterator[str]:
    """A line for each safety LoRA: how much of what it did alone to its own concept is done now."""
    for one, texts, held in zip(safety, prompts, measured.held, strict=True):
        yield (
            f"{one.lora.name} (strength {one.strength:g}): does {100 * held:.1f} % of what it did alone to its own "
            f"concept ({len(texts)} prompt{'s' * (len(texts) != 1)}, first {texts[0]!r})"
        )


def report(
    lora: LoraFile,
    safety: Sequence[SafetyLora],
    prompts: Sequence[Sequence[str]],
    measured: Measured,
    calibrated: str,
    seconds: float,
) -> str:
    """What came out, and what is not claimed."""
    text, moved = max(measured.kept.items(), key=lambda item: item[1])
    lines = [
        f"{lora.name}: {len(safety)} safety LoRAs as one, {len(lora.layers)} layers, solved and saved in "
        f"{seconds:.2f} s; file SHA-256 {lora.sha256}, which is none of theirs: a policy that names files needs this "
        "one, and a signed file a signature of its own",
    ]
    for i, held in enumerate(still_does(safety, prompts, measured)):
        lines.append(held)
        lines += [
            f"  to the concept of {other.lora.name}: moved its answers by {measured.alone[i][j]:.1e} alone, by "
            f"{measured.combined[i][j]:.1e} now"
            for j, other in enumerate(safety)
            if i != j
        ]
    lines.append(f"kept tokens moved by at most {moved:.1e} of their answer ({text!r})")
    return "\n".join([*lines, calibrated, LIMITS])
