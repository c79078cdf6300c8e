"""Safety activity: how strongly a safety LoRA answers to a prompt, and what its file's calibration says of that.

The measure is that of branches/acted.py, taken from a run's first evaluation: the mean over the layers on which the
safety LoRA acts of |z|² / |W0·x + b|², on the rows of the prompt. A calibration holds what it was for prompts of the
concept and for prompts that are to be kept, measured from noise on one base, with no other LoRA:

    q_kept    = KEPT quantile over the preserved prompts
    q_concept = CONCEPT quantile over the concept prompts

A prompt is about the concept from max(q_kept, q_concept) on, and one of those kept up to min(q_kept, q_concept). Where
the two distributions overlap (q_kept > q_concept), both bounds are their mean. Where the area under the ROC curve is
below LEAST_AUC there is no verdict at all.

The calibration is metadata of the safety LoRA's file: whoever makes the file can write what he likes there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..branches.acted import Acted
from ..branches.changes import Owner
from ..errors import GuardError
from ..files.reader import LoraFile
from ..provenance.attestation import Activity, Attestation
from . import concept

KEY = "modular_lora.activity"
VERSION = 1
LEAST_AUC = 0.95
LEAST_PROMPTS, LEAST_MEASURED = 4, 8  # of either kind
MOST_PROMPTS = 64  # of either kind
LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)  # of the quantiles in a file
KEPT, CONCEPT = 0.99, 0.05
EARLY = 0.9  # least noise level of a run's start, as a share of the base's timesteps
TEXT_LIMIT = 4096  # characters of the metadata
_AGAIN = "write it again with Calibrate Safety LoRA"


class _UnfitError(ValueError):
    """What a file says is no calibration."""


@dataclass(frozen=True)
class Side:
    """The activities of one kind of prompts: how many prompts, how many figures, their quantiles at `LEVELS`."""

    prompts: int
    measured: int
    quantiles: tuple[float, ...]

    def at(self, level: float) -> float:
        return self.quantiles[LEVELS.index(level)]


@dataclass(frozen=True)
class Calibration:
    """What a safety LoRA's activity was on one base.

    Attributes:
        base_sha256: Of W0's content.
        strength: Of the safety LoRA.
        latent: Shape of one latent (c ...), of noise alone: the noise level is the base's highest.
        seed: Of the noise.
        concept: On prompts of the concept.
        preserved: On prompts that are to be kept.
        auc: Share of pairs (a concept figure, a preserved one) of which the first is greater, equal ones counting half.
    """

    base_sha256: str
    strength: float
    latent: tuple[int, ...]
    seed: int
    concept: Side
    preserved: Side
    auc: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Up to where a prompt is one of the kept, and from where it is about the concept; see the module."""
        kept, found = self.preserved.at(KEPT), self.concept.at(CONCEPT)
        if kept < found:
            return kept, found
        return (kept + found) / 2, (kept + found) / 2

    def share(self, value: float) -> float:
        """g of a prompt of this activity (safety_first.py): falls from 1 at the lower bound to 0 at the upper one."""
        low, high = self.bounds
        if not value < high:  # not a number is too much
            return 0.0
        return 1.0 if value <= low else (high - value) / (high - low)

    def says(self, value: float) -> str:
        """ "concept", "kept" or "undecided" of an activity."""
        low, high = self.bounds
        if value >= high:
            return "concept"
        return "kept" if value <= low else "undecided"


def calibrate(
    base_sha256: str,
    strength: float,
    latent: Sequence[int],
    seed: int,
    found: Sequence[Sequence[float]],
    kept: Sequence[Sequence[float]],
) -> Calibration:
    """A calibration of activities by prompt, then noise: ``found`` of the concept, ``kept`` of preserved prompts.

    Raises:
        GuardError: too few of either, a figure that is not finite, or an AUC below `LEAST_AUC`.
    """
    check_prompts("concept", len(found))
    check_prompts("preserved", len(kept))
    sides = []
    for name, figures in (("concept", found), ("preserved", kept)):
        values = sorted(value for each in figures for value in each)
        if len(values) < LEAST_MEASURED:
            raise GuardError(
                f"Calibration: {len(values)} figures of {name} prompts, fewer than {LEAST_MEASURED}: measure more "
                "noises for each prompt.",
                code="activity.too-few",
            )
        if not all(math.isfinite(value) for value in values):
            raise GuardError(
                f"Calibration: an activity on the {name} prompts is not finite: lower the safety LoRA's strength, or "
                "run the model in a wider dtype (bf16 or fp32).",
                code="activity.not-finite",
            )
        sides.append(values)
    made = Calibration(
        base_sha256,
        float(strength),
        tuple(latent),
        seed,
        Side(len(found), len(sides[0]), _quantiles(sides[0])),
        Side(len(kept), len(sides[1]), _quantiles(sides[1])),
        round(auc(*sides), 6),
    )
    if made.auc < LEAST_AUC:
        raise GuardError(
            f"Calibration: the safety LoRA's activity tells concept prompts from preserved ones with an AUC of "
            f"{made.auc:.3f}, below {LEAST_AUC}, so no verdict could be made of it: give prompts that are clearly of "
            "the concept and clearly not, or use a safety LoRA that was trained with preserved prompts.",
            code="activity.not-told-apart",
        )
    return made


def check_prompts(name: str, count: int) -> None:
    """GuardError unless there are enough prompts of a kind, and not too many."""
    if not LEAST_PROMPTS <= count <= MOST_PROMPTS:
        raise GuardError(
            f"Calibration: {count} {name} prompts: give {LEAST_PROMPTS} to {MOST_PROMPTS} different ones.",
            code="activity.prompts",
        )


def auc(found: Sequence[float], kept: Sequence[float]) -> float:
    """Area under the ROC curve: the Mann-Whitney statistic over the number of pairs."""
    wins = sum((a > b) + 0.5 * (a == b) for a in found for b in kept)
    return wins / (len(found) * len(kept))


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """At `LEVELS`, of sorted values, linear between two of them; six digits."""
    made = []
    for level in LEVELS:
        place = level * (len(values) - 1)
        low = min(int(place), len(values) - 2)
        made.append(values[low] + (place - low) * (values[low + 1] - values[low]))
    return tuple(float(f"{value:.6g}") for value in made)


# In a file


def encode(calibration: Calibration) -> str:
    """The value of `KEY`."""
    sides = {
        name: {"prompts": side.prompts, "measured": side.measured, "quantiles": list(side.quantiles)}
        for name, side in (("concept", calibration.concept), ("preserved", calibration.preserved))
    }
    said = {
        "version": VERSION,
        "base_sha256": calibration.base_sha256,
        "strength": calibration.strength,
        "latent": list(calibration.latent),
        "seed": calibration.seed,
        "auc": calibration.auc,
        **sides,
    }
    return json.dumps(said, separators=(",", ":"), allow_nan=False)


def read(lora: LoraFile) -> Calibration | str:
    """The calibration in a file, or why none can be used. It stops nothing: without one there is no verdict."""
    text = lora.metadata.get(KEY)
    if text is None:
        return "its file has no calibration"
    try:
        made = _decoded(text)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return f"the calibration in its file is malformed: {_AGAIN}"
    if made.auc < LEAST_AUC:
        return f"the calibration in its file has an AUC of {made.auc:.3f}, below {LEAST_AUC}"
    return made


def _decoded(text: str) -> Calibration:
    if len(text) > TEXT_LIMIT:
        raise _UnfitError
    said = json.loads(text)
    if said["version"] != VERSION or not isinstance(said["base_sha256"], str):
        raise _UnfitError
    strength, auc_ = (_number(said[name]) for name in ("strength", "auc"))
    latent = tuple(_whole(size) for size in said["latent"])
    sides = {name: _side(said[name]) for name in ("concept", "preserved")}
    if not (strength > 0 and 0 <= auc_ <= 1 and latent):
        raise _UnfitError
    return Calibration(said["base_sha256"], strength, latent, _whole(said["seed"]), **sides, auc=auc_)


def _side(said: Mapping[str, Any]) -> Side:
    side = Side(_whole(said["prompts"]), _whole(said["measured"]), tuple(_number(q) for q in said["quantiles"]))
    rising = all(a <= b for a, b in zip(side.quantiles, side.quantiles[1:], strict=False))
    enough = side.prompts >= LEAST_PROMPTS and side.measured >= LEAST_MEASURED
    if not (enough and rising and len(side.quantiles) == len(LEVELS) and side.quantiles[0] >= 0):
        raise _UnfitError
    return side


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _UnfitError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _UnfitError
    return value


def write_copy(lora: LoraFile, target: Path, calibration: Calibration) -> LoraFile:
    """Write a safety LoRA's file with its calibration to the new file ``target``; see `concept.copy_with`."""
    return concept.copy_with(lora.path, target, KEY, encode(calibration), expected_sha256=lora.sha256)


def format_calibration(calibration: Calibration) -> str:
    """What a calibration found, in words and figures."""
    lines = [
        f"{name} prompts: {side.prompts}, {side.measured} figures, activity median {side.at(0.5):.3g} "
        f"[{side.at(0.0):.3g} .. {side.at(1.0):.3g}]"
        for name, side in (("concept", calibration.concept), ("preserved", calibration.preserved))
    ]
    lines += [
        f"AUC {calibration.auc:.3f}; {format_bounds(calibration)}",
        f"measured from noise (latent {' x '.join(map(str, calibration.latent))}), strength {calibration.strength:g}, "
        f"seed {calibration.seed}, base sha256 {calibration.base_sha256[:16]}",
    ]
    return "\n".join(lines)


def format_bounds(calibration: Calibration) -> str:
    """From which activity on a prompt is judged to be of the concept."""
    low, high = calibration.bounds
    if calibration.preserved.at(KEPT) >= calibration.concept.at(CONCEPT):
        return f"the two overlap: a prompt is about the concept from {high:.3g} on, half-way between them"
    return f"a prompt is about the concept from {high:.3g} on, and one of those kept up to {low:.3g}"


def format_copy(lora: LoraFile, name: str) -> str:
    """What is said of a copy that was written."""
    return (
        f"{name}: tensors as they were, SHA-256 {lora.sha256}, which is not the original's: a policy that names the "
        "file needs this one, and a signed file a new signature"
    )


# In a run


def of_run(
    record: Attestation, safety: Iterable[LoraFile], acted: Mapping[Owner, Acted], level: float | None
) -> dict[str, tuple[Activity | None, ...]]:
    """The activity of every safety LoRA on every image of a run, by its SHA-256.

    Args:
        record: Of the guard: its base and the strengths.
        safety: The safety LoRAs that act on the network.
        acted: What was measured.
        level: How noisy the run's start was, as a share of the base's timesteps; None: not known.
    """
    files = {lora.sha256: lora for lora in safety}
    strengths = {lora.sha256: lora.strength_model for lora in record.loras if lora.role == "safety"}
    found = {}
    for (_, sha256), one in acted.items():
        if sha256 in files and any(value is not None for value in one.activity):
            calibration = fitting(read(files[sha256]), record, strengths[sha256], level)
            found[sha256] = tuple(None if v is None else _judged(v, calibration) for v in one.activity)
    return found


def most(each: Mapping[str, Sequence[Activity | None]]) -> dict[str, Activity]:
    """The greatest activity of all images of a run, by safety LoRA."""
    known = {sha256: [one for one in activities if one is not None] for sha256, activities in each.items()}
    return {sha256: max(some, key=lambda one: one.value) for sha256, some in known.items() if some}


def fitting(
    calibration: Calibration | str, record: Attestation, strength: float, level: float | None
) -> Calibration | str:
    """The calibration, or why it says nothing of this run; see `of_run`."""
    if isinstance(calibration, str):
        return calibration
    if record.base_had_merged_loras or record.base_sha256 != calibration.base_sha256:
        return f"its calibration is of another base: {_AGAIN} on this one"
    if not math.isclose(strength, calibration.strength, rel_tol=1e-6):
        return f"its calibration is of strength {calibration.strength:g}, not {strength:g}"
    if level is None or level < EARLY:
        return "its calibration is of a start from noise, and this run started later"
    return calibration


def _judged(value: float, calibration: Calibration | str) -> Activity:
    if isinstance(calibration, str):
        return Activity(value, "", calibration)
    return Activity(value, calibration.says(value))


def of_prompt(run: Attestation | None) -> str:
    """What the calibrations say of the prompt of one image: "concept", "kept" or "undecided"; "" for nothing.

    "concept" where any safety LoRA of any run behind the image says so, else nothing unless each run has a verdict.
    """
    each = [{one.prompt for one in part.activity.values()} - {""} for part in (run.runs if run is not None else ())]
    said = set().union(*each)
    if "concept" in said:
        return "concept"
    if not each or not all(each):
        return ""
    return "undecided" if "undecided" in said else "kept"


_SAID = {
    "concept": "acted strongly on {where}: {prompts} {are} about the concept",
    "kept": "acted weakly on {where}: {prompts} {are} not about the concept",
    "undecided": "acted on {where} between strongly and weakly: nothing is said of {prompts}",
    "": "acted on {where}, without a verdict: {why}",
}


def in_words(runs: Sequence[Attestation | None]) -> str:
    """What is read on a node of a batch's images; "" where nothing is known.

    Args:
        runs: One for each image, in order; None where no run is known.

    Returns:
        A line for each safety LoRA and verdict, with the images that it is on and their activity, from the least to the
        greatest; then, under safety first, a line for those on which the task LoRAs gave way in part, or altogether.
    """
    known = {number: run for number, run in enumerate(runs, 1) if run is not None}
    names = {lora.sha256: lora.name for run in known.values() for lora in run.loras}
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    shares: dict[bool, dict[int, float]] = {}
    for number, run in known.items():
        for sha256, one in run.activity.items():
            found.setdefault((sha256, one.prompt, one.why), {})[number] = one.value
        if run.task_share is not None and run.task_share < 1:
            shares.setdefault(run.task_share > 0, {})[number] = run.task_share
    several = len({sha256 for sha256, _, _ in found}) > 1
    lines = []
    for (sha256, prompt, why), values in found.items():
        prompts, are = ("its prompt", "is") if len(values) == 1 else ("their prompts", "are")
        said = _SAID[prompt].format(where=_where(list(values), len(runs)), prompts=prompts, are=are, why=why)
        name = f"the safety LoRA {names[sha256]}" if several else "the safety LoRA"
        lines.append(f"{name} {said} (activity {_span(values.values())})")
    for act, values in shares.items():
        how = f"act at a share of {_span(values.values())}" if act else "do not act"
        lines.append(f"safety first: the task LoRAs {how} on {_where(list(values), len(runs))}")
    return "\n".join(lines)


def _where(numbers: Sequence[int], count: int) -> str:
    """Some images of ``count``, by their numbers in rising order: "all 8 images", "images 1 to 3, 5 and 7"."""
    if count == 1:
        return "the image"
    if len(numbers) == count:
        return f"all {count} images"
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        some = [number for _, number in group]
        parts += [f"{some[0]} to {some[-1]}"] if len(some) > 2 else map(str, some)
    if len(numbers) == 1:
        return f"image {parts[0]}"
    return "images " + " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _span(values: Iterable[float]) -> str:
    """The least and the greatest, once where they read the same."""
    values = list(values)
    return " to ".join(dict.fromkeys(f"{one:.3g}" for one in (min(values), max(values))))
