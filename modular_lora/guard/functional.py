"""Functional strength: how much of what a safety LoRA does to the network's predictions is left beside other LoRAs.

For one safety LoRA s among all LoRAs of a combination, on s's own concept prompts (concept.py):

    ⟨e_all − e_without, e_alone − e_base⟩ / ‖e_alone − e_base‖²

with e the model's predictions of one prompt at a few noise levels: e_base of W0, e_alone of W0 and s, e_all of
everything, e_without of everything but s. With one safety LoRA e_without is e_task. 1: s does all that it does alone;
0: nothing of it is left. The figure is that of the prompt where it is lowest: what cancels s on some of its prompts
leaves it whole on others. It is of the whole network's outputs, where net strength (interference.py) is of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..errors import GuardError
from ..files.reader import LoraFile
from . import concept

LEAST_SHARE = 1e-3  # of ‖e_base‖²: below it, ‖e_alone − e_base‖² is too near to the rounding of half precision
PROMPTS = 4  # of a file that are evaluated, spread over its list
NO_PROMPTS = "its file has no concept prompts"

Arm: TypeAlias = frozenset[str]  # SHA-256 of the LoRAs that act
Request: TypeAlias = tuple[Arm, tuple[str, ...]]  # who acts, on which prompts
Evaluate: TypeAlias = Callable[[Sequence[Request]], Sequence[Tensor]]  # predictions of a request: prompts ...


@dataclass(frozen=True)
class Figure:
    """Functional strength of one safety LoRA on one prompt. ``share``: ‖e_alone − e_base‖² / ‖e_base‖²."""

    strength: float
    share: float
    prompt: str


@dataclass(frozen=True)
class Functional:
    """What is known of a combination, by the SHA-256 of each safety LoRA: a figure, or why there is none."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0  # of the network that were evaluated for it; 0 where all were known
    seconds: float = 0.0

    @property
    def strengths(self) -> dict[str, float]:
        return {sha256: figure.strength for sha256, figure in self.figures.items()}


def chosen(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts that are evaluated: at most `PROMPTS`, evenly over the list, its first and last among them."""
    last = len(prompts) - 1
    if last < PROMPTS:
        return tuple(prompts)
    return tuple(prompts[round(i * last / (PROMPTS - 1))] for i in range(PROMPTS))


def unmeasured(safety: Iterable[LoraFile], why: str) -> Functional:
    """No figure for any of these; where a file has no prompts, that is said of it. LoraFileError as `concept.read`."""
    return Functional(unmeasured={s.sha256: why if concept.read(s) else NO_PROMPTS for s in safety})


def measure(safety: Sequence[LoraFile], others: Iterable[LoraFile], evaluate: Evaluate) -> Functional:
    """The functional strength of each safety LoRA among ``safety`` and ``others``, which all act.

    Raises:
        LoraFileError: concept prompts that are malformed.
        GuardError: a prediction that is not finite.
    """
    prompts = {s.sha256: chosen(concept.read(s)) for s in safety}
    everything = frozenset((*prompts, *(lora.sha256 for lora in others)))
    requests: dict[Request, None] = {}
    for sha256, texts in prompts.items():
        if texts:
            requests |= dict.fromkeys((arm, texts) for arm in _arms(sha256, everything))
    found = dict(zip(requests, evaluate(list(requests)), strict=True)) if requests else {}
    figures, without = {}, {sha256: NO_PROMPTS for sha256, texts in prompts.items() if not texts}
    for lora in safety:
        if texts := prompts[lora.sha256]:
            each = [
                _figure(lora.name, prompt, *predictions)
                for prompt, *predictions in zip(
                    texts, *(found[arm, texts] for arm in _arms(lora.sha256, everything)), strict=True
                )
            ]
            if judged := [figure for figure in each if figure.share >= LEAST_SHARE]:
                figures[lora.sha256] = min(judged, key=lambda figure: figure.strength)
            else:
                without[lora.sha256] = (
                    f"on its concept prompts it changes the prediction by {max(f.share for f in each):.2g} of its "
                    f"energy, less than {LEAST_SHARE:g}"
                )
    return Functional(figures, without)


def check(functional: Functional, names: Mapping[str, str], floor: float) -> None:
    """GuardError for the safety LoRA whose functional strength is lowest, where it is below ``floor``."""
    for sha256, figure in functional.figures.items():
        if not figure.strength >= floor:
            raise GuardError(
                f"Safety LoRA {names[sha256]}: functional strength is {figure.strength:.3f}, below the floor of "
                f"{floor:g}, on its concept prompt {figure.prompt[:60]!r}: the other LoRAs undo what it does to the "
                "model's predictions; take them out, or lower their strengths.",
                code="guard.functional-strength",
            )


def _arms(sha256: str, everything: Arm) -> tuple[Arm, Arm, Arm, Arm]:
    """Base, the safety LoRA alone, all but it, all."""
    return frozenset(), frozenset((sha256,)), everything - {sha256}, everything


def _figure(name: str, prompt: str, base: Tensor, alone: Tensor, without: Tensor, everything: Tensor) -> Figure:
    base, alone, without, everything = (e.double().flatten() for e in (base, alone, without, everything))
    own = alone - base
    energy, whole = float(own @ own), float(base @ base)
    inner = float((everything - without) @ own)
    if not all(map(math.isfinite, (energy, whole, inner))):
        raise GuardError(
            f"Safety LoRA {name}: the model's predictions on its concept prompts are not finite with these LoRAs: take "
            "out the one that breaks the model, or lower the strengths.",
            code="functional.not-finite",
        )
    return Figure(inner / energy if energy else math.nan, energy / whole if whole else 0.0, prompt)
