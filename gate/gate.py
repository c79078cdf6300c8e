"""The gate: images in, images out, and what was found and done, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import actions
from .errors import Blocked, GateError
from .finding import Detector, Finding
from .settings import ANSWERS, Answer, Settings

OTHERWISE = "change the prompt or the seed"  # the remedy for an image that is blocked


@dataclass(frozen=True)
class Outcome:
    """What the gate hands on, in the order of the images."""

    images: np.ndarray  # b h w 3, as they came where nothing was done
    flags: tuple[bool, ...]  # the answer is not "pass", and the action follows
    masks: np.ndarray  # b h w float32, 1 where a label that is acted on is, grown; all of it without boxes
    findings: tuple[Finding, ...]
    changed: tuple[bool, ...]
    blocked: tuple[tuple[str, ...], ...]  # labels that are acted on, those for a person too
    reported: tuple[tuple[str, ...], ...]  # labels of the report set that were found
    answers: tuple[Answer, ...]
    overruled: tuple[tuple[str, ...], ...]  # labels that were found, and that the second detector did not confirm
    # what the safety LoRAs say of each prompt: "concept", "kept", "undecided" or "" for nothing; () where none is asked
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Second:
    """A second detector that confirms what the first finds: its milder answer holds."""

    detector: Detector
    settings: Settings


def run(
    images: np.ndarray,
    detector: Detector,
    settings: Settings,
    replacement: np.ndarray | None = None,
    second: Second | None = None,
    prompts: Sequence[str] = (),
) -> Outcome:
    """Judge every image of b h w 3 (float, RGB, 0..1) and do what the settings say about those that are flagged.

    ``replacement`` is the image h w 3 of the action "replace"; ``second`` is asked about the images that the first
    detector flags, and no others; ``prompts`` is what the safety LoRAs say of each image's prompt, which counts where
    the settings do not ignore it (Outcome.prompts). An image that is flagged for its prompt is acted on as a whole.
    Images that are not acted on stay bit for bit the
    same, and where one is withheld stands a black one; ``images`` itself is never written to. Raises Blocked where
    the action is "block" and an image is flagged, and GateError where settings and detector do not fit or the images
    cannot be judged.
    """
    settings.check(detector)
    replacement = actions.checked_replacement(replacement) if settings.action == "replace" else None
    findings = _judged(detector, images)
    answers, blocked, overruled = _answered(images, settings, findings, second)
    asked = tuple(prompts) if settings.activity != "ignore" else ()
    about = tuple(map(settings.answer_to_prompt, asked or [""] * len(images)))
    answers = tuple(max(pair, key=ANSWERS.index) for pair in zip(answers, about, strict=True))
    flags = tuple(answer != "pass" for answer in answers)
    if settings.action == "block" and any(flags):
        raise Blocked(_refusal(detector, settings, flags, blocked, findings, asked))
    changed = flags if settings.action != "report" else (False,) * len(flags)
    masks = np.zeros(images.shape[:3], np.float32)
    out = images.copy() if any(changed) else images
    for i in np.flatnonzero(flags):
        regions = actions.regions(findings[i], blocked[i], settings, images.shape[1:3], whole=about[i] != "pass")
        masks[i] = actions.mask(regions, settings.action, images.shape[1:3])
        if changed[i]:
            out[i] = actions.apply(images[i], regions, masks[i], settings, replacement)
    reported = tuple(map(settings.reported, findings))
    return Outcome(out, flags, masks, findings, changed, blocked, reported, answers, overruled, asked)


def _judged(detector: Detector, images: np.ndarray) -> tuple[Finding, ...]:
    findings = tuple(detector.detect(images))
    if len(findings) != len(images):
        raise GateError(
            f"{detector.name}: {len(findings)} findings for {len(images)} images: it must judge all.",
            code="gate.findings",
        )
    return findings


Labels = tuple[tuple[str, ...], ...]


def _answered(
    images: np.ndarray, settings: Settings, findings: tuple[Finding, ...], second: Second | None
) -> tuple[tuple[Answer, ...], Labels, Labels]:
    """The answers, the labels that are acted on, and those that the second detector did not confirm."""
    answers = list(map(settings.answer, findings))
    acted = [(*settings.blocked(finding), *settings.reviewed(finding)) for finding in findings]
    overruled: list[tuple[str, ...]] = [()] * len(findings)
    asked = [i for i, answer in enumerate(answers) if answer != "pass"]
    if second is not None and asked:
        second.settings.check(second.detector)
        for i, finding in zip(asked, _judged(second.detector, images[asked]), strict=True):
            answers[i] = min(answers[i], second.settings.answer(finding), key=ANSWERS.index)
            if answers[i] == "pass":
                acted[i], overruled[i] = (), acted[i]
    return tuple(answers), tuple(acted), tuple(overruled)


def _refusal(
    detector: Detector,
    settings: Settings,
    flags: tuple[bool, ...],
    blocked: Labels,
    findings: tuple[Finding, ...],
    prompts: tuple[str, ...],
) -> str:
    first = flags.index(True)
    said = _reason(settings, blocked[first], findings[first], prompts[first] if prompts else "")
    by = detector.name + " or for their prompt" * bool(prompts)
    return f"{sum(flags)} of {len(flags)} images are blocked by {by}, image {first + 1}: {said}; {OTHERWISE}."


def blocked_by(detector: Detector, settings: Settings, outcome: Outcome, i: int) -> str:
    """Why image i is blocked: the labels that are acted on, with scores and thresholds, and its prompt."""
    prompt = outcome.prompts[i] if outcome.prompts else ""
    by = f" by {detector.name}" * bool(outcome.blocked[i])
    return f"blocked{by}: {_reason(settings, outcome.blocked[i], outcome.findings[i], prompt)}"


def _reason(settings: Settings, labels: tuple[str, ...], finding: Finding, prompt: str) -> str:
    """What flags one image: labels, its prompt, or both."""
    about = settings.answer_to_prompt(prompt) != "pass"
    said = [_scores(settings, labels, finding)] * bool(labels)
    return ", and ".join([*said, *["its prompt is about the safety LoRA's concept"] * about])


def _scores(settings: Settings, labels: tuple[str, ...], finding: Finding) -> str:
    return ", ".join(f"{label} {finding.scores[label]:.2f} ≥ {settings.acted[label]:g}" for label in labels)
