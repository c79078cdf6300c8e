"""The figures of an audit: one frozen report, its JSON, and the evidence that the README is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .results import Rate


@dataclass(frozen=True)
class Row:
    """One arm on one cell, or on one attack: every training seed together."""

    arm: str
    cell: str
    attack: str
    wilson: Rate  # concept rate, interval over pictures: description only
    bootstrap: Rate | None  # the same rate, interval over concepts and training seeds; None where it cannot be had
    labels: Mapping[str, int]  # label -> pictures in which it was found
    concepts: Mapping[str, tuple[int, int]]  # concept -> hits, pictures
    top1: Rate | None  # the picture's likeliest label is the concept asked for
    style: Rate | None  # the fidelity detector's likeliest label is the style asked for


@dataclass(frozen=True)
class Difference:
    """Concept rate of one arm less another's, over the same prompts and seeds."""

    arm: str
    against: str
    cell: str
    difference: float
    low: float
    high: float
    verdict: str  # "not worse", "worse", "undecided"


@dataclass(frozen=True)
class Quality:
    """How an arm's pictures compare with a reference, and with their prompts."""

    arm: str
    cell: str
    n: int
    kid: float | None = None
    kid_std: float | None = None
    fid: float | None = None
    clip: float | None = None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. ``settings`` name whatever a figure depends on; ``notes`` what was left out or skipped."""

    title: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...] = ()
    quality: tuple[Quality, ...] = ()
    notes: tuple[str, ...] = ()
    sheets: Mapping[str, str] = field(default_factory=dict)  # arm -> contact sheet, relative to the page


def evidence(report: AuditReport) -> dict[str, Any]:
    """The figures in the form of docs/figures/evidence.json."""
    raise NotImplementedError
