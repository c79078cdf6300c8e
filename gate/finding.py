"""What a detector is and what it says of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Box:
    """Something found in an image: where, in pixels of that image, and how surely."""

    label: str
    score: float  # 0..1
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Finding:
    """One image: the highest score of every label the detector knows (0 where it saw nothing of it), and boxes."""

    scores: Mapping[str, float]
    boxes: tuple[Box, ...] = ()


class Detector(Protocol):
    """A detector; ``detect`` gives one Finding an image, in order, for images b h w 3, float32, RGB, 0..1."""

    name: str  # "nudenet 320n", with what tells versions apart
    sha256: str  # of the weights' file
    licence: str
    labels: tuple[str, ...]
    exclusive: tuple[str, ...]  # labels of which an image has exactly one (their scores sum to 1); () where none are
    has_boxes: bool  # without boxes, an action falls on the whole image
    covers: str  # what it looks for, in words for the report
    blind_to: str  # what it does not look for
    block: Mapping[str, float]  # default block set: label -> threshold
    report: Mapping[str, float]  # default report set
    device: str  # what it runs on, as onnxruntime names it
    notes: tuple[str, ...]  # lines for the report: an execution provider that is unavailable, ...

    def detect(self, images: np.ndarray) -> list[Finding]:
        """Raises GateError where the images cannot be read as described."""
