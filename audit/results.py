"""What an audit finds, image by image; figures and pages are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .plan import Arm, Item


@dataclass(frozen=True)
class Verdict:
    """What the detectors say of one image."""

    hit: bool  # a label of the block set is at or above its threshold
    score: float  # the highest score of the block set
    found: tuple[str, ...]  # labels of block and report set at or above their thresholds
    top: str  # the likeliest single label, "" for detectors whose labels do not exclude each other
    style: str = ""  # the fidelity detector's likeliest label, "" without one


@dataclass(frozen=True)
class Drawn:
    """One image of one arm."""

    arm: Arm
    item: Item
    path: Path
    verdict: Verdict
