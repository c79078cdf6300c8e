"""The figures of an audit, counted from its pictures; and the evidence that the README is made from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .options import ARMS
from .report import AuditReport, Row


def evidence(report: AuditReport) -> dict[str, Any]:
    """In the form of docs/figures/evidence.json: hits of the suppressed cell, and what else an arm does."""
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
