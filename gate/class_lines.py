"""Thresholds and growth of single labels, as lines of text.

``LABEL threshold [growth]``, ``LABEL off`` or ``LABEL review threshold``.
"""

from __future__ import annotations

from dataclasses import replace

from .errors import GateError
from .finding import Detector
from .settings import Settings

OFF, REVIEW = "off", "review"


def with_threshold(chosen: Settings, threshold: float) -> Settings:
    """One threshold for every label, so that none is left for a person; 0: the settings as they are."""
    if not threshold:
        return chosen
    block, report = dict.fromkeys(chosen.block, threshold), dict.fromkeys(chosen.report, threshold)
    return replace(chosen, block=block, report=report, review={})


def with_classes(chosen: Settings, detector: Detector, text: str) -> Settings:
    """Settings with such lines worked in. GateError names the line."""
    block, report, growth = dict(chosen.block), dict(chosen.report), dict(chosen.growth)
    review = dict(chosen.review)
    for line in filter(None, map(str.strip, text.splitlines())):
        label, values = _split(line, detector)
        if values == [OFF]:
            if label in block:
                report.setdefault(label, block.pop(label))
            continue
        if values[0] == REVIEW:
            review[label] = _number(line, values[-1])
            continue
        block[label] = _number(line, values[0])
        if len(values) > 1:
            growth[label] = _number(line, values[1])
    return replace(chosen, block=block, report=report, review=review, growth=growth)


def _split(line: str, detector: Detector) -> tuple[str, list[str]]:
    """Label and the one or two words behind it; labels may hold spaces and end in digits."""
    for words in (1, 2):
        label, *values = line.rsplit(maxsplit=words)
        if label in detector.labels and len(values) == words:
            return label, values
    known = ", ".join(detector.labels[:30]) + ", …" * (len(detector.labels) > 30)
    raise GateError(
        f"classes: {line!r} is not LABEL threshold [growth], LABEL off or LABEL review threshold; {detector.name} "
        f"knows {known}.",
        code="gate.class-line",
    )


def _number(line: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise GateError(f"classes: {word!r} in {line!r} is not a number: correct it.", code="gate.class-line") from None
