"""How figures of an audit read, on the page and as text."""

from __future__ import annotations

from ..gate.statistics import Rate
from .arms import shown
from .report import AuditReport, Difference, Row


def rate(found: Rate | None) -> str:
    return f"{found.rate:.1%}" if found and found.n else ""


def interval(found: Rate | None) -> str:
    return f"{found.low:.1%} … {found.high:.1%}" if found else ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def ratio(one: Difference) -> str:
    """Of two rates, with its interval; ∞ where the second may be 0."""
    if not one.ratio:
        return ""
    if one.ratio[0] is None and not one.difference:
        return "0 / 0"
    value, low, high = ("∞" if part is None else f"{part:.2f}" for part in one.ratio)
    return f"{value} ({low} … {high})"


def format_report(report: AuditReport) -> str:
    """A few lines for a terminal or a node."""
    lines = [report.title, f"{'arm':<24} {'cell':<12} {'hits':>12} {'rate':>7}  interval"]
    lines += [_line(row) for row in report.rows]
    for one in report.differences:
        if one.verdict and not one.attack:
            what, span = f"{shown(one.arm)} − {shown(one.against)}, {one.metric}", f"{one.low:+.1%} … {one.high:+.1%}"
            lines.append(f"{what}: {one.difference:+.1%} ({span}), {one.verdict}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _line(row: Row) -> str:
    arm = shown(row.arm) + (f", {row.attack}" if row.attack else "")
    hits = f"{row.wilson.k} / {row.wilson.n}"
    return f"{arm:<24} {row.cell:<12} {hits:>12} {rate(row.wilson):>7}  {interval(row.bootstrap or row.wilson)}"
