"""The first lines of every report: what a person wants to know, and nothing that was not checked.

The details (hashes, layers, norms) are in report.py, which the nodes give at their `report` output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..provenance.attestation import SAFETY_FIRST, Attestation
from .build import GuardedPart
from .report import format_shortfall


def guard_summary(parts: Sequence[GuardedPart], notes: Iterable[str], where: str = "") -> str:
    """What Guard Model shows: the LoRAs in one line, then each warning, what was left out of a file, and the notes.

    ``where``: which task LoRAs are counted, for a guard that takes further ones later.
    """
    lines = [line for part in parts for line in part.lines]
    names = {
        role: list(dict.fromkeys(line.sha256 for line in lines if line.role == role)) for role in ("safety", "task")
    }
    layers = sum(part.layers for part in parts)
    said = [
        f"The model is guarded by {_count(len(names['safety']), 'safety LoRA')}, on {_count(layers, 'layer')}. "
        f"{_tasks(len(names['task']))}{where}."
    ]
    said += [f"WARNING: {w}" for part in parts for _, result in part.interference for w in result.warnings]
    said += filter(None, map(format_shortfall, lines))
    return "\n".join(dict.fromkeys([*said, *(f"note: {note}" for note in notes)]))


def run_line(a: Attestation) -> str:
    """One sampling run, or one image of it, in one line."""
    safety, tasks = ([lora for lora in a.loras if lora.role == role] for role in ("safety", "task"))
    if not a.evaluations:
        return "Not sampled: denoise 0, or no step to do, so this is what went into the sampler."
    if not a.status.startswith("guarded"):  # what a gate put in the place of an image
        return f"{a.status[:1].upper()}{a.status[1:]}: no run made this image."
    limits = "".join(words for words, said in _LIMITS if said in a.status)
    times = f"all {a.evaluations} evaluations" if a.evaluations > 1 else "the one evaluation"
    ran = f"ran in {times} of the model"
    if not any(lora.sha256 in a.net_strength for lora in safety):
        ran = "acted on the text encoder alone"
    subject = "the safety LoRA" if len(safety) == 1 else f"{len(safety)} safety LoRAs"
    edited = f" Edited on the way by {', '.join(a.edits)}." if a.edits else ""
    how = ", safety first" * (a.combine == SAFETY_FIRST)
    return f"Guarded{limits}: {subject} {ran}. {_tasks(len(tasks))}{how}.{edited}"


def task_line(a: Attestation) -> str:
    """The task LoRAs that acted in one sampling run, with both strengths of each; "" where there was none."""
    tasks = [f"{r.name} at {r.strength_model:g} / {r.strength_clip:g}" for r in a.loras if r.role == "task"]
    return "task: " + ", ".join(tasks) if tasks else ""


_LIMITS = (  # words, and what stands in a status; see provenance.attestation.guarded_status
    (", on a base with merged LoRAs or models", "merged base"),
    (", from a start that no guarded run made", "outside start"),
)


def warnings(report: str) -> list[str]:
    """The warnings of a report, which are read on the node as well."""
    return [line for line in report.splitlines() if line.startswith("WARNING")]


def per_image(lines: Sequence[str]) -> str:
    """One line for all images of a batch where they are alike, else one for every run of images that are."""
    if len(set(lines)) <= 1:
        return "".join(lines[:1])
    return "\n".join(f"{_images(first, last)}: {line}" for first, last, line in _runs(lines))


def once(reports: Sequence[str]) -> str:
    """The details of every image of a batch: lines that all have once, then those of one image under its number."""
    if len(set(reports)) <= 1:
        return "".join(reports[:1])
    split = [report.splitlines() for report in reports]
    common = set(split[0]).intersection(*split[1:])
    said = [line for line in split[0] if line in common]
    for number, lines in enumerate(split, 1):
        said += [f"image {number}: {line}" for line in lines if line not in common]
    return "\n".join(said)


def _runs(lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    first = 1
    for number, line in enumerate(lines, 1):
        if number == len(lines) or lines[number] != line:
            yield first, number, line
            first = number + 1


def _images(first: int, last: int) -> str:
    return f"Image {first}" if first == last else f"Images {first} to {last}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _tasks(n: int) -> str:
    return _count(n, "task LoRA") if n else "No task LoRA"
