"""What an audit found, as one frozen report, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..gate.statistics import Rate
from ..modular_lora.errors import GuardError

FORM = 1  # of report.json


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
    top1: Rate | None = None  # the picture's likeliest label is the concept asked for
    style: Rate | None = None  # the fidelity detector's likeliest label is the style asked for


@dataclass(frozen=True)
class Difference:
    """A rate of one arm less another's, over the same prompts and seeds; 95 % by the bootstrap."""

    arm: str
    against: str
    cell: str
    attack: str
    metric: str  # "concept rate", "top-1", "task fidelity"
    difference: float
    low: float
    high: float
    verdict: str  # "not worse", "worse", "undecided"; "" where being worse is no question
    pairs: int  # pictures of the same item and training seed
    gained: int  # of them, true of this arm's picture alone
    lost: int  # and of the other's alone
    mcnemar: float  # exact p; too small where pictures cluster, so for description only
    ratio: tuple[float | None, ...] = ()  # of the rates, with its interval; None: infinite or undefined


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


def to_json(report: AuditReport) -> str:
    return json.dumps({"form": FORM} | asdict(report), indent=1, ensure_ascii=False, allow_nan=False)


def read(path: Path) -> AuditReport:
    """A report.json as it was written. Raises GuardError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("form") != FORM:
            raise ValueError("another form")
        rows = tuple(_row_again(row) for row in said.pop("rows"))
        differences = tuple(Difference(**(one | {"ratio": tuple(one["ratio"])})) for one in said.pop("differences"))
        quality = tuple(Quality(**one) for one in said.pop("quality"))
        notes = tuple(said.pop("notes"))
        return AuditReport(**said, rows=rows, differences=differences, quality=quality, notes=notes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GuardError(f"{path}: is no report of this version ({error}): run the audit again.") from error


def _row_again(said: dict[str, Any]) -> Row:
    rates = {name: Rate(**said[name]) if said[name] else None for name in ("wilson", "bootstrap", "top1", "style")}
    concepts = {name: (k, n) for name, (k, n) in said["concepts"].items()}
    return Row(**(said | rates | {"concepts": concepts}))
