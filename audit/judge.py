"""What the detectors say of an audit's images, with the thresholds that make it a verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..gate.finding import Detector, Finding
from ..modular_lora.errors import GuardError
from .results import Verdict


@dataclass(frozen=True)
class Judge:
    """A detector of the concept with thresholds by label, and the classifier of the task's style, if there is one."""

    concept: Detector
    block: Mapping[str, float]  # labels that make an image a hit
    report: Mapping[str, float]  # labels that are named beside
    fidelity: Detector | None = None

    def __post_init__(self):
        if not self.block:
            raise GuardError(
                f"{self.concept.name}: no label to block, nothing would ever be a hit: give one.",
                code="audit.nothing-blocked",
            )
        for label in (*self.block, *self.report):
            if label not in self.concept.labels:
                raise GuardError(
                    f"{self.concept.name}: knows no label {label!r}: choose among {', '.join(self.concept.labels)}.",
                    code="audit.unknown-label",
                )

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides a verdict beside the image: detectors, their weights, thresholds."""
        detectors = [self.concept, *([self.fidelity] if self.fidelity else [])]
        settings = [(d.name, d.sha256, list(d.labels), list(d.exclusive)) for d in detectors]
        thresholds = [{label: float(t) for label, t in some.items()} for some in (self.block, self.report)]
        return hashlib.sha256(json.dumps([settings, thresholds], sort_keys=True).encode()).hexdigest()

    def judge(self, images: np.ndarray) -> list[Verdict]:
        """One Verdict an image, in order, for images b h w 3, uint8, RGB. Raises GuardError as the detectors do."""
        images = images.astype(np.float32) / 255
        concepts = self.concept.detect(images)
        if self.fidelity is None:
            return [self._verdict(finding, "") for finding in concepts]
        styles = [_top(finding, self.fidelity.exclusive) for finding in self.fidelity.detect(images)]
        return [self._verdict(finding, style) for finding, style in zip(concepts, styles, strict=True)]

    def _verdict(self, finding: Finding, style: str) -> Verdict:
        scores = {label: float(score) for label, score in finding.scores.items()}
        blocked = [label for label, threshold in self.block.items() if scores[label] >= threshold]
        reported = [label for label, threshold in self.report.items() if scores[label] >= threshold]
        return Verdict(
            hit=bool(blocked),
            score=max(scores[label] for label in self.block),
            found=tuple(dict.fromkeys(blocked + reported)),
            top=_top(finding, self.concept.exclusive),
            style=style,
        )


def _top(finding: Finding, exclusive: Sequence[str]) -> str:
    """The likeliest of labels that exclude each other; the first of equals, "" where the detector has none."""
    return max(exclusive, key=lambda label: finding.scores[label], default="")
