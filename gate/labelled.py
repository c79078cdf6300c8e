"""The gate's own error, on images that a person has sorted: what it misses and what it flags for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..modular_lora.errors import writing
from ..modular_lora.files.images import ENDINGS, ImageError, decode, named, under
from ..modular_lora.util import plain_json
from .errors import GateError
from .finding import Detector, Finding
from .report import describe
from .settings import Settings
from .statistics import Rate, wilson

STEPS = 100  # thresholds of the curve, evenly over 0..1


@dataclass(frozen=True)
class Point:
    """One threshold, the same for every label of the block set."""

    threshold: float
    missed: Rate  # of the images that should be flagged
    false_alarms: Rate  # of the images that should pass


@dataclass(frozen=True)
class LabelledError:
    """The error of one detector with one block set on one pair of folders."""

    detector: Detector
    settings: Settings
    missed: Rate  # at the settings' own thresholds
    false_alarms: Rate
    curve: tuple[Point, ...]
    unreadable: tuple[str, ...]  # files that end like images and cannot be read; they count nowhere
    others: tuple[str, ...]  # files that do not end like images that are read; they count nowhere


def measure(flagged: Path, clean: Path, detector: Detector, settings: Settings) -> LabelledError:
    """Judge all images under ``flagged``, which should be flagged, and under ``clean``, which should pass.

    Of an image of several frames the first counts. Raises GateError where a folder holds no readable image.
    """
    settings.check(detector)
    flagged, clean = Path(flagged), Path(clean)
    if flagged.resolve() == clean.resolve():
        raise GateError(f"{flagged.name}: is both folders, flagged and clean: give two.", code="gate.same-folder")
    unreadable: list[str] = []
    others: list[str] = []
    bad, good = (_judged(folder, detector, unreadable, others) for folder in (flagged, clean))
    highest = [np.array([max(f.scores[label] for label in settings.block) for f in some]) for some in (bad, good)]
    return LabelledError(
        detector,
        settings,
        _rate(sum(settings.answer(f) == "pass" for f in bad), len(bad)),
        _rate(sum(settings.answer(f) != "pass" for f in good), len(good)),
        tuple(_point(i / STEPS, *highest) for i in range(STEPS + 1)),
        tuple(unreadable),
        tuple(others),
    )


def format_error(error: LabelledError) -> str:
    """The report: both rates with their intervals, under which detector and thresholds."""
    lines = [
        f"missed {_said(error.missed)} of the images that should be flagged",
        f"false alarms {_said(error.false_alarms)} of the images that should pass",
        "at " + ", ".join(f"{label} ≥ {least:g}" for label, least in error.settings.acted.items()),
        f"detector {error.detector.name}, sha256 {error.detector.sha256[:16]}",
    ]
    if error.unreadable:
        lines.append(f"{len(error.unreadable)} files cannot be read and count nowhere: {named(error.unreadable)}")
    if error.others:
        lines.append(
            f"{len(error.others)} files are not {', '.join(ENDINGS)} and count nowhere: convert what is an image: "
            f"{named(error.others)}"
        )
    return "\n".join(lines)


def save(error: LabelledError, path: Path) -> None:
    """Write rates and curve as JSON, whole or not at all. Raises GateError where that is not possible."""
    said = {
        "detector": describe(error.detector),
        "block": dict(error.settings.block),
        "review": dict(error.settings.review),
        "missed": asdict(error.missed),
        "false_alarms": asdict(error.false_alarms),
        "curve": [asdict(point) for point in error.curve],
        "unreadable": list(error.unreadable),
        "others": list(error.others),
        "interval": "Wilson, 95 %",
    }
    with writing(path.name, GateError):
        plain_json.write(said, path)


def _judged(folder: Path, detector: Detector, unreadable: list[str], others: list[str]) -> list[Finding]:
    found = [detector.detect(image[None])[0] for image in _images(folder, unreadable, others)]
    if not found:
        raise GateError(
            f"{folder.name}: holds no image that can be read: give a folder of images.", code="gate.no-images"
        )
    return found


def _images(folder: Path, unreadable: list[str], others: list[str] | None = None) -> Iterator[np.ndarray]:
    """Images h w 3 float32, RGB, one at a time; names of files that are not read go to the two lists."""
    if not folder.is_dir():
        raise GateError(f"{folder.name}: no such folder in {folder.parent}: check the path.", code="gate.no-folder")
    found, left = under(folder)
    name = lambda path: f"{folder.name}/{path.relative_to(folder).as_posix()}"  # noqa: E731
    if others is not None:
        others += map(name, left)
    for path in found:
        try:
            image = decode(path.read_bytes()).image
        except (OSError, ImageError):
            unreadable.append(name(path))
            continue
        yield np.asarray(image, np.float32) / 255


def _point(threshold: float, bad: np.ndarray, good: np.ndarray) -> Point:
    return Point(
        threshold, _rate(int((bad < threshold).sum()), len(bad)), _rate(int((good >= threshold).sum()), len(good))
    )


def _rate(k: int, n: int) -> Rate:
    return Rate(k, n, *wilson(k, n))


def _said(rate: Rate) -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}] ({rate.k} of {rate.n})"
