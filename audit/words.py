"""How figures of an audit read, on the page and as text."""

from __future__ import annotations

from ..gate.statistics import Rate
from .arms import shown
from .report import AuditReport, Difference, Row


def rate(found: Rate | None) -> str:
    return f"{found.rate:.1%}" if found and found.n else ""


def interval(found: Rate | None) -> str:
    return f"{found.low:.1%} … {found.high:.1%}" if found else ""


def span(found: tuple[float, float] | None) -> str:
    return f"{found[0]:+.1%} … {found[1]:+.1%}" if found else ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def ratio(one: Difference) -> str:
    """Of two rates, with its interval where that has a width; ∞ where the second may be 0."""
    if not one.ratio:
        return ""
    if one.ratio[0] is None and not one.difference:
        return "0 / 0"
    value, low, high = ("∞" if part is None else f"{part:.2f}" for part in one.ratio)
    return value if one.ratio[1] == one.ratio[2] else f"{value} ({low} … {high})"


HEAD = ("arm", "cell", "hits", "rate", "bootstrap", "Wilson")


def format_report(report: AuditReport) -> str:
    """A few lines for a terminal."""
    return "\n".join([report.title, *map(_line, rates(report)), *format_differences(report)])


def rates(report: AuditReport) -> list[tuple[str, ...]]:
    """Every arm's rate on every cell and attack, with both intervals; the first row heads the columns."""
    return [HEAD, *map(_cells, report.rows)]


def format_differences(report: AuditReport) -> list[str]:
    """What was decided of the arms, and the notes: the report without its table, for a node."""
    lines = []
    for one in report.differences:
        if one.verdict and not one.attack:
            what = f"{shown(one.arm)} − {shown(one.against)}, {one.metric}"
            spans = [f"bootstrap {span(one.bootstrap)}"] if one.bootstrap else []
            spans.append(f"over images {span(one.newcombe)}")
            lines.append(f"{what}: {one.difference:+.1%} ({'; '.join(spans)}), {one.verdict}")
    return [*lines, *(f"note: {note}" for note in report.notes)]


def _cells(row: Row) -> tuple[str, ...]:
    arm = shown(row.arm) + (f", {row.attack}" if row.attack else "")
    hits = f"{row.wilson.k} / {row.wilson.n}"
    return arm, row.cell, hits, rate(row.wilson), interval(row.bootstrap), interval(row.wilson)


def _line(cells: tuple[str, ...]) -> str:
    arm, cell, hits, share, bootstrap, wilson = cells
    return f"{arm:<24} {cell:<12} {hits:>12} {share:>7}  {bootstrap:<17}  {wilson}"
