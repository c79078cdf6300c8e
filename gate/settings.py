"""What the gate does about what a detector finds: thresholds, growth of boxes and the action; presets as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from ..modular_lora import plain_json
from ..modular_lora.errors import one_line, writing
from .errors import GateError
from .finding import Detector, Finding

Action = Literal["report", "blur", "pixelate", "box", "ellipse", "replace", "block", "empty"]
ACTIONS: tuple[str, ...] = get_args(Action)
GROWTH = 1.2  # default of labels that are masked: detectors' boxes sit tight
MOST_CELLS = 16
MOST_GROWTH = 10.0


@dataclass(frozen=True)
class Settings:
    """Labels are the detector's; a label is found where its score is at or above its threshold."""

    block: Mapping[str, float]  # label -> threshold, above 0, at most 1: found, the action is taken
    report: Mapping[str, float] = field(default_factory=dict)  # found, it is said and nothing else
    growth: Mapping[str, float] = field(default_factory=dict)  # label -> factor of its boxes' width and height; else 1
    action: Action = "blur"
    cells: int = 6  # blur and pixelate keep this many samples along the longer side of a box: fewer hide more

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise GateError(f"action: {self.action!r} does not exist: one of {', '.join(ACTIONS)}.")
        for name in ("block", "report"):
            for label, value in getattr(self, name).items():
                _number(f"{name}.{label}", value, 0, 1)
        for label, value in self.growth.items():
            _number(f"growth.{label}", value, 0, MOST_GROWTH)
        if isinstance(self.cells, bool) or not isinstance(self.cells, int) or not 1 <= self.cells <= MOST_CELLS:
            raise GateError(f"cells: {self.cells!r} must be a whole number from 1 to {MOST_CELLS}: correct it.")

    def check(self, detector: Detector) -> None:
        """Raises GateError for a label that the detector does not know, and where no label is blocked."""
        for name in ("block", "report", "growth"):
            for label in getattr(self, name):
                if label not in detector.labels:
                    known = ", ".join(detector.labels[:30]) + ", …" * (len(detector.labels) > 30)
                    raise GateError(f"{name}: {detector.name} knows no label {label!r}: it knows {known}.")
        if not self.block:
            raise GateError(f"block: no label of {detector.name} is blocked, so nothing is guarded: name one.")

    def blocked(self, finding: Finding) -> tuple[str, ...]:
        """Labels of the block set that are found."""
        return _found(self.block, finding)

    def reported(self, finding: Finding) -> tuple[str, ...]:
        """Labels of the report set that are found."""
        return _found(self.report, finding)


def defaults(detector: Detector, action: Action = "blur") -> Settings:
    """The detector's own block and report set; boxes of the block set grow by a fifth."""
    growth = dict.fromkeys(detector.block, GROWTH) if detector.has_boxes else {}
    return Settings(dict(detector.block), dict(detector.report), growth, action)


def load(path: str | Path, detector: Detector) -> Settings:
    """A preset from its file. Raises GateError for what cannot be read, unknown keys, labels and actions."""
    path = Path(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(f"{path.name}: cannot be read as JSON ({one_line(error)}): check the preset.") from error
    names = {f.name for f in fields(Settings)}
    if not isinstance(said, dict) or "block" not in said or not said.keys() <= names:
        raise GateError(f"{path.name}: a preset has the keys {', '.join(sorted(names))}, block at least: correct it.")
    for name in ("block", "report", "growth"):
        if not isinstance(said.get(name, {}), dict):
            raise GateError(f"{path.name}: {name} must map labels to numbers: correct it.")
    try:
        settings = Settings(**said)
        settings.check(detector)
    except GateError as error:
        raise GateError(f"{path.name}: {one_line(error)}") from error
    return settings


def save(settings: Settings, path: str | Path) -> None:
    """Write a preset, whole or not at all. Raises GateError where that is not possible."""
    with writing(Path(path).name, GateError):
        plain_json.write(asdict(settings), path)


def _found(thresholds: Mapping[str, float], finding: Finding) -> tuple[str, ...]:
    # "not below", so that a score that is not a number counts as found
    return tuple(label for label, least in thresholds.items() if not finding.scores[label] < least)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise GateError(f"{name}: {value!r} is not a number: correct it.")
    if not low < value <= high:
        raise GateError(f"{name}: {value:g} must be above {low:g} and at most {high:g}: correct it.")
