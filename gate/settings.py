"""What the gate does about what a detector finds: thresholds, growth of boxes and the action; presets as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, WrapValidator

from ..modular_lora.errors import writing
from ..modular_lora.util import plain_json
from ..modular_lora.validation import from_json, raises
from .errors import GateError
from .finding import Detector, Finding

Answer = Literal["pass", "review", "block"]  # review: to a person
ANSWERS: tuple[Answer, ...] = get_args(Answer)  # from mild to strict
Action = Literal["report", "blur", "pixelate", "box", "ellipse", "replace", "block", "withhold", "empty"]
ACTIONS: tuple[Action, ...] = get_args(Action)
Activity = Literal["ignore", "review", "block"]  # what is made of a prompt that is about a safety LoRA's concept
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)  # from mild to strict, each in the place of its answer
ABOUT = "concept"  # what a safety LoRA's calibration says of such a prompt (modular_lora/guard/activity.py)
GROWTH = 1.2  # default of labels that are masked: detectors' boxes sit tight
MOST_CELLS = 16
MOST_GROWTH = 10.0


def _as_written(value: Any, check: Callable[[Any], float]) -> Any:
    """A number that ``check`` takes, a whole one left so: settings are known by the hash of their JSON."""
    check(value)
    return value


Threshold = Annotated[float, Field(gt=0, le=1), WrapValidator(_as_written)]
Growth = Annotated[float, Field(gt=0, le=MOST_GROWTH), WrapValidator(_as_written)]


@raises(GateError)
@dataclass(frozen=True)
class Settings:
    """Labels are the detector's; a label is found where its score is at or above its threshold."""

    block: Mapping[str, Threshold] = field(metadata={"description": "labels and their thresholds, which are acted on"})
    report: Mapping[str, Threshold] = field(default_factory=dict)  # found, it is said and nothing else
    growth: Mapping[str, Growth] = field(default_factory=dict)  # label -> factor of its boxes' width and height; else 1
    action: Action = "blur"
    # samples that blur and pixelate keep along the longer side of a box: fewer hide more
    cells: Annotated[int, Field(ge=1, le=MOST_CELLS)] = 6
    # label -> threshold, below that in ``block`` where it has one: acted on too, and answered "review", to a person
    review: Mapping[str, Threshold] = field(default_factory=dict)
    # the least answer to an image whose prompt is about a safety LoRA's concept, whatever the detector finds in it
    activity: Activity = "ignore"

    def check(self, detector: Detector) -> None:
        """Raises GateError for labels that the detector does not know, none that is blocked, and an idle review."""
        for name in ("block", "report", "review", "growth"):
            for label in getattr(self, name):
                if label not in detector.labels:
                    known = ", ".join(detector.labels[:30]) + ", …" * (len(detector.labels) > 30)
                    raise GateError(
                        f"{name}: {detector.name} knows no label {label!r}: it knows {known}.",
                        code="gate.unknown-label",
                    )
        if not self.block:
            raise GateError(
                f"block: no label of {detector.name} is blocked, so nothing is guarded: name one.",
                code="gate.nothing-blocked",
            )
        for label, least in self.review.items():
            if not least < (most := self.block.get(label, 2.0)):
                raise GateError(
                    f"review: {label} from {least:g} never comes to a person, blocked from {most:g}: set less.",
                    code="gate.review-threshold",
                )

    def blocked(self, finding: Finding) -> tuple[str, ...]:
        """Labels of the block set that are found."""
        return _found(self.block, finding)

    def reviewed(self, finding: Finding) -> tuple[str, ...]:
        """Labels of the review set that are found, and not so surely that they are blocked."""
        blocked = self.blocked(finding)
        return tuple(label for label in _found(self.review, finding) if label not in blocked)

    def answer(self, finding: Finding) -> Answer:
        """What is said of one image."""
        return "block" if self.blocked(finding) else "review" if self.reviewed(finding) else "pass"

    def answer_to_prompt(self, said: str) -> Answer:
        """The least answer to an image, by what its safety LoRAs' calibrations say of its prompt; "" for nothing."""
        return ANSWERS[ACTIVITIES.index(self.activity)] if said == ABOUT else "pass"

    @property
    def acted(self) -> dict[str, float]:
        """Labels that are acted on, and the scores from which they are."""
        return {**self.block, **self.review}

    def reported(self, finding: Finding) -> tuple[str, ...]:
        """Labels of the report set that are found."""
        return _found(self.report, finding)


def defaults(detector: Detector, action: Action = "blur") -> Settings:
    """The detector's own block and report set; boxes of the block set grow by a fifth."""
    growth = dict.fromkeys(detector.block, GROWTH) if detector.has_boxes else {}
    return Settings(dict(detector.block), dict(detector.report), growth, action)


def load(path: str | Path, detector: Detector) -> Settings:
    """A preset from its file. Raises GateError for what cannot be read, unknown keys, labels and actions."""

    def checked(**said: Any) -> Settings:
        settings = Settings(**said)
        settings.check(detector)
        return settings

    return from_json(checked, path, GateError, "preset, an object with the key block at least")


def save(settings: Settings, path: str | Path) -> None:
    """Write a preset, whole or not at all. Raises GateError where that is not possible."""
    with writing(Path(path).name, GateError):
        plain_json.write(asdict(settings), path)


def _found(thresholds: Mapping[str, float], finding: Finding) -> tuple[str, ...]:
    # "not below", so that a score that is not a number counts as found
    return tuple(label for label, least in thresholds.items() if not finding.scores[label] < least)
