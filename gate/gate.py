"""The gate: pictures in, pictures out, and what was found and done, picture by picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import actions
from .errors import Blocked, GateError
from .finding import Detector, Finding
from .settings import Settings

OTHERWISE = "change the prompt or the seed"  # the remedy for a picture that is blocked


@dataclass(frozen=True)
class Outcome:
    """What the gate hands on, in the order of the pictures."""

    pictures: np.ndarray  # b h w 3, as they came where nothing was done
    flags: tuple[bool, ...]  # a label of the block set was found
    masks: np.ndarray  # b h w float32, 1 where a label of the block set is, grown; all of it without boxes
    findings: tuple[Finding, ...]
    changed: tuple[bool, ...]
    blocked: tuple[tuple[str, ...], ...]  # labels of the block set that were found
    reported: tuple[tuple[str, ...], ...]  # labels of the report set that were found


def run(pictures: np.ndarray, detector: Detector, settings: Settings, replacement: np.ndarray | None = None) -> Outcome:
    """Judge every picture of b h w 3 (float, RGB, 0..1) and do what the settings say about those that are flagged.

    ``replacement`` is the picture h w 3 of the action "replace". Pictures that are not acted on stay bit for bit the
    same, and where one is withheld stands a black one; ``pictures`` itself is never written to. Raises Blocked where
    the action is "block" and a picture is flagged, and GateError where settings and detector do not fit or the pictures
    cannot be judged.
    """
    settings.check(detector)
    replacement = actions.checked_replacement(replacement) if settings.action == "replace" else None
    findings = tuple(detector.detect(pictures))
    if len(findings) != len(pictures):
        raise GateError(
            f"{detector.name}: {len(findings)} findings for {len(pictures)} images: it must judge all.",
            code="gate.findings",
        )
    blocked = tuple(map(settings.blocked, findings))
    flags = tuple(map(bool, blocked))
    if settings.action == "block" and any(flags):
        raise Blocked(_refusal(detector, settings, blocked, findings))
    changed = flags if settings.action != "report" else (False,) * len(flags)
    masks = np.zeros(pictures.shape[:3], np.float32)
    out = pictures.copy() if any(changed) else pictures
    for i in np.flatnonzero(flags):
        regions = actions.regions(findings[i], blocked[i], settings, pictures.shape[1:3])
        masks[i] = actions.mask(regions, settings.action, pictures.shape[1:3])
        if changed[i]:
            out[i] = actions.apply(pictures[i], regions, masks[i], settings, replacement)
    return Outcome(out, flags, masks, findings, changed, blocked, tuple(map(settings.reported, findings)))


def _refusal(
    detector: Detector, settings: Settings, blocked: tuple[tuple[str, ...], ...], findings: tuple[Finding, ...]
) -> str:
    hits = [i for i, labels in enumerate(blocked) if labels]
    first = hits[0]
    said = _scores(settings, blocked[first], findings[first])
    return (
        f"{len(hits)} of {len(blocked)} images are blocked by {detector.name}, image {first + 1}: {said}; {OTHERWISE}."
    )


def blocked_by(detector: Detector, settings: Settings, labels: tuple[str, ...], finding: Finding) -> str:
    """Why one picture is blocked: the labels of the block set that were found, with scores and thresholds."""
    return f"blocked by {detector.name}: {_scores(settings, labels, finding)}"


def _scores(settings: Settings, labels: tuple[str, ...], finding: Finding) -> str:
    return ", ".join(f"{label} {finding.scores[label]:.2f} ≥ {settings.block[label]:g}" for label in labels)
