"""The figures of an audit: one frozen report, its JSON, and the evidence that the README is made from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..modular_lora.errors import GuardError
from . import stats
from .options import ARMS, AuditOptions
from .results import Drawn, Rate

AGAINST = ("safety", "base")  # what every other arm is compared with
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


def to_json(report: AuditReport) -> str:
    return json.dumps({"form": FORM} | asdict(report), indent=1, ensure_ascii=False)


def read(path: Path) -> AuditReport:
    """A report.json as it was written. Raises GuardError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("form") != FORM:
            raise ValueError("another form")
        rows = tuple(_row_again(row) for row in said.pop("rows"))
        differences = tuple(Difference(**one) for one in said.pop("differences"))
        quality = tuple(Quality(**one) for one in said.pop("quality"))
        notes = tuple(said.pop("notes"))
        return AuditReport(**said, rows=rows, differences=differences, quality=quality, notes=notes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GuardError(f"{path}: is no report of this version ({error}): run the audit again.") from error


def _row_again(said: dict[str, Any]) -> Row:
    rates = {name: Rate(**said[name]) if said[name] else None for name in ("wilson", "bootstrap", "top1", "style")}
    concepts = {name: (k, n) for name, (k, n) in said["concepts"].items()}
    return Row(**(said | rates | {"concepts": concepts}))


def evidence(report: AuditReport) -> dict[str, Any]:
    """The figures in the form of docs/figures/evidence.json: hits of the suppressed cell, with what else an arm does."""
    plain = {(row.arm, row.cell): row for row in report.rows if not row.attack}
    arms = {}
    for arm in ARMS:
        if row := plain.get((arm, "suppressed")):
            arms[arm] = _arm_evidence(report, row, plain.get((arm, "kept")), plain.get((arm, "task")))
    settings = report.settings
    names = ("detector", "threshold", "prompts_sha256", "seeds", "command", "date")
    more = ("sampling", "base", "LoRAs", "device", "dtype", "margin", "confidence", "resamples", "quality")
    return {
        "arms": arms,
        **{name: settings[name] for name in names},
        **{name.lower(): settings[name] for name in more},
        "differences": [asdict(one) for one in report.differences],
    }


def _arm_evidence(report: AuditReport, row: Row, kept: Row | None, task: Row | None) -> dict[str, Any]:
    interval = row.bootstrap or row.wilson
    measured = {one.cell: one.kid for one in report.quality if one.arm == row.arm}
    return {
        "k": row.wilson.k,
        "n": row.wilson.n,
        "low": interval.low,
        "high": interval.high,
        "quality": measured.get("task", measured.get("kept")),
        "task_fidelity": task.style.rate if task and task.style else None,
        "interval": "bootstrap over concepts and training seeds" if row.bootstrap else "Wilson",
        "wilson": [row.wilson.low, row.wilson.high],
        "per_concept": {name: list(hits) for name, hits in row.concepts.items()},
        "kept": kept and {"false_alarms": asdict(kept.wilson), "top1": kept.top1 and asdict(kept.top1)},
        "kid": measured,
    }
