"""Thresholds and growth of single labels, as lines of text: ``LABEL threshold [growth]`` or ``LABEL off``."""

from __future__ import annotations

from dataclasses import replace

from .errors import GateError
from .finding import Detector
from .settings import Settings

OFF = "off"


def with_threshold(chosen: Settings, threshold: float) -> Settings:
    """One threshold for every label; 0: the settings as they are."""
    if not threshold:
        return chosen
    return replace(chosen, block=dict.fromkeys(chosen.block, threshold), report=dict.fromkeys(chosen.report, threshold))


def with_classes(chosen: Settings, detector: Detector, text: str) -> Settings:
    """Settings with the lines ``LABEL threshold [growth]`` and ``LABEL off`` worked in. GateError names the line."""
    block, report, growth = dict(chosen.block), dict(chosen.report), dict(chosen.growth)
    for line in filter(None, map(str.strip, text.splitlines())):
        label, values = _split(line, detector)
        if values == [OFF]:
            if label in block:
                report.setdefault(label, block.pop(label))
            continue
        block[label] = _number(line, values[0])
        if len(values) > 1:
            growth[label] = _number(line, values[1])
    return replace(chosen, block=block, report=report, growth=growth)


def _split(line: str, detector: Detector) -> tuple[str, list[str]]:
    """Label and the one or two words behind it; labels may hold spaces and end in digits."""
    for words in (1, 2):
        label, *values = line.rsplit(maxsplit=words)
        if label in detector.labels and len(values) == words:
            return label, values
    known = ", ".join(detector.labels[:30]) + ", …" * (len(detector.labels) > 30)
    raise GateError(
        f"classes: {line!r} is not LABEL threshold [growth], or LABEL off; {detector.name} knows {known}.",
        code="gate.class-line",
    )


def _number(line: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise GateError(f"classes: {word!r} in {line!r} is not a number: correct it.", code="gate.class-line") from None
