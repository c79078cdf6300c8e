"""What an audit found, as one frozen report, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..gate.statistics import Rate
from ..modular_lora.errors import GuardError, one_line
from ..modular_lora.util import plain_json

FORM = 2  # of report.json


@dataclass(frozen=True)
class Share:
    """A rate with both its intervals."""

    wilson: Rate  # over images
    bootstrap: Rate | None  # over concepts and training seeds; None: it cannot be had, or has no width


@dataclass(frozen=True)
class Row:
    """One arm on one cell, or on one attack: every training seed together."""

    arm: str
    cell: str
    attack: str
    wilson: Rate  # concept rate, interval over images: description only
    bootstrap: Rate | None  # the same rate, interval over concepts and training seeds; None as for Share
    labels: Mapping[str, int]  # label -> images in which it was found
    concepts: Mapping[str, tuple[int, int]]  # concept -> hits, images
    top1: Share | None = None  # the image's likeliest label is the concept asked for
    style: Share | None = None  # the fidelity detector's likeliest label is the style asked for


@dataclass(frozen=True)
class Difference:
    """A rate of one arm less another's, over the same prompts and seeds, with its 95 % intervals."""

    arm: str
    against: str
    cell: str
    attack: str
    metric: str  # "concept rate", "top-1", "task fidelity"
    difference: float
    bootstrap: tuple[float, float] | None  # over concepts and training seeds; None: it has no width
    newcombe: tuple[float, float]  # over images, from Wilson's
    verdict: str  # "not worse", "worse", "undecided", "too few images"; "" where being worse is no question
    pairs: int  # images of the same item and training seed
    gained: int  # of them, true of this arm's image alone
    lost: int  # and of the other's alone
    mcnemar: float  # exact p; too small where images cluster, so for description only
    ratio: tuple[float | None, ...] = ()  # of the rates, with its interval; None: infinite or undefined


@dataclass(frozen=True)
class Quality:
    """How an arm's images compare with a reference, and with their prompts."""

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
        said = plain_json.read_object(path)
        if said.get("form") != FORM:
            raise ValueError("another form")
        return TypeAdapter(AuditReport).validate_python(said)
    except (OSError, ValueError) as error:
        raise GuardError(
            f"{path}: is not a report of this version ({one_line(error)}): run the audit again.",
            code="audit.report-unreadable",
        ) from error
