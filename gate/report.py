"""The words and the JSON of the gate: what was found and done, by which detector at which thresholds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

from ..modular_lora.util import plain_json
from .finding import Detector
from .gate import Outcome, Second
from .settings import Settings

DONE = {
    "report": "left as they are",
    "blur": "blurred",
    "pixelate": "pixelated",
    "box": "covered by boxes",
    "ellipse": "covered by ellipses",
    "replace": "replaced",
    "empty": "left empty",
    "block": "stopped",
    "withhold": "withheld",
}


def format_gate(outcome: Outcome, detector: Detector, settings: Settings, second: Second | None = None) -> str:
    """The whole report of a gate: what was found, and `format_settings`."""
    return "\n".join([*format_found(outcome, settings), format_settings(detector, settings, second)])


def format_found(outcome: Outcome, settings: Settings) -> list[str]:
    """A line of counts, and one for each label found, with its threshold."""
    n, flagged = len(outcome.flags), sum(outcome.flags)
    line = f"{flagged} of {n} images flagged" + f", {DONE[settings.action]}" * bool(flagged) + f"; {n - flagged} passed"
    if persons := outcome.answers.count("review"):
        line += f"; {persons} of those flagged for a person to decide"
    if milder := sum(map(bool, outcome.overruled)):
        line += f"; {milder} passed as the second detector did not confirm the first"
    return [
        line,
        *_of_prompts(outcome, settings),
        *_counts("blocked", outcome.blocked, settings.acted),
        *_counts("not confirmed", outcome.overruled, settings.acted),
        *_counts("reported", outcome.reported, settings.report),
    ]


def _of_prompts(outcome: Outcome, settings: Settings) -> list[str]:
    """How many images are flagged for their prompt, and of how many nothing is known of it."""
    about = sum(settings.answer_to_prompt(said) != "pass" for said in outcome.prompts)
    lines = [f"  prompt: about the safety LoRA's concept in {about} images"] if about else []
    if unknown := outcome.prompts.count(""):
        lines.append(f"  prompt: no verdict of the safety LoRA on {unknown} images, which the detector alone judged")
    return lines


def format_settings(detector: Detector, settings: Settings, second: Second | None = None) -> str:
    """What a gate will do: thresholds and action, the detector and what it covers and does not."""
    lines = [f"blocks {_thresholds(settings.block)}; action: {settings.action}"]
    if settings.review:
        lines.append(f"to a person {_thresholds(settings.review)}")
    if settings.activity != "ignore":
        does = "blocks" if settings.activity == "block" else "sends to a person"
        lines.append(f"{does} what was drawn of a prompt about the safety LoRA's concept, by its calibration")
    if settings.report:
        lines.append(f"reports {_thresholds(settings.report)}")
    lines.append(f"detector {detector.name}, sha256 {detector.sha256[:16]}, {detector.licence}, on {detector.device}")
    lines += format_limits(detector)
    if second is not None:
        own = format_settings(second.detector, second.settings).splitlines()
        lines += ["what it flags must be confirmed by:", *(f"  {line}" for line in own)]
    return "\n".join(lines)


def format_limits(detector: Detector) -> list[str]:
    """What a detector looks for and what not, for every place where its word may be taken for more."""
    lines = [f"covers: {detector.covers}", f"does not cover: {detector.blind_to}"]
    if not detector.has_boxes:
        lines.append("no boxes: what is done falls on the whole image")
    return [*lines, *(f"note: {note}" for note in detector.notes)]


def to_json(outcome: Outcome, detector: Detector, settings: Settings) -> str:
    """Detector, settings and every image's flag, labels found, scores and boxes (pixels: x, y, width, height)."""
    images = [
        {
            "flagged": outcome.flags[i],
            "changed": outcome.changed[i],
            "answer": outcome.answers[i],
            "blocked": outcome.blocked[i],
            "not_confirmed": outcome.overruled[i],
            "reported": outcome.reported[i],
            **({"prompt": outcome.prompts[i]} if outcome.prompts else {}),
            "scores": {label: round(score, 6) for label, score in finding.scores.items()},
            "boxes": [asdict(box) for box in finding.boxes],
        }
        for i, finding in enumerate(outcome.findings)
    ]
    said = {"detector": describe(detector), "settings": asdict(settings), "pictures": images}
    return plain_json.dumps(said, ensure_ascii=False)


def describe(detector: Detector) -> dict[str, object]:
    """What tells one detector from another, for every JSON that holds a figure of it."""
    names = ("name", "sha256", "licence", "device", "covers", "blind_to")
    return {name: getattr(detector, name) for name in names}


def _counts(what: str, found: tuple[tuple[str, ...], ...], thresholds: Mapping[str, float]) -> list[str]:
    counted = Counter(label for labels in found for label in labels)
    return [f"  {what}: {label} ≥ {thresholds[label]:g} in {n} images" for label, n in counted.most_common()]


def _thresholds(thresholds: Mapping[str, float]) -> str:
    return ", ".join(f"{label} ≥ {least:g}" for label, least in thresholds.items())
