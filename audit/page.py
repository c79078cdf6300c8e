"""The page of an audit: one self-contained HTML file, readable in light and dark, from the report alone.

Prompts, concepts and file names are anybody's words: whatever is shown passes ``html.escape``.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .arms import MEANS, shown
from .figures import VERDICT
from .plan import GUARDED
from .report import AuditReport, Row, Share
from .words import interval, number, rate, ratio, span

CSS = """
:root{color-scheme:light dark;--line:#8885;--soft:#8882;--bad:#c33}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{font-weight:600;vertical-align:bottom}
tr:hover td{background:var(--soft)}td{white-space:nowrap}td.left{text-align:left}
td.word{text-align:left;white-space:normal;overflow-wrap:anywhere}
svg,img{max-width:100%;height:auto}small,.note{opacity:.75}.bad{color:var(--bad);font-weight:600}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing in a prompt can run or be fetched
SHOWN = 200  # concepts
SPANS = ("bootstrap", "Wilson")  # columns beside a rate
Cell = str | tuple[str, str]  # text, or text and its class


def render(report: AuditReport, sheets: Mapping[str, bytes]) -> str:
    """The page; ``sheets`` are JPEGs by name."""
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f"<p class=note>{escape(_origin(report.settings))}</p>",
        _section("Concept rates", _rates(report)),
        _section("Paired differences", _differences(report)),
        _section("Other cells and attacks", _others(report)),
        _section("Concept by concept", _concepts(report)),
        _section("Labels found", _labels(report.rows)),
        _section("Quality", _quality(report)),
        _section("Pictures", _sheets(report, sheets)),
        _section("What was not measured", _list(report.notes) if report.notes else "<p>Nothing was left out.</p>"),
        _section("Settings", _settings(report.settings)),
    ]
    title = escape(report.title)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
    head += f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _origin(settings: Mapping[str, Any]) -> str:
    names = ("date", "detector", "device", "dtype", "base")
    return ", ".join(str(settings[name]) for name in names if settings.get(name))


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _rates(report: AuditReport) -> str:
    """The main table: the suppressed cell, with what the same arm does elsewhere."""
    rows = [row for row in report.rows if row.cell == "suppressed" and not row.attack]
    if not rows:
        return ""
    kept = {row.arm: row for row in report.rows if row.cell == "kept" and not row.attack}
    task = {row.arm: row for row in report.rows if row.cell == "task" and not row.attack}
    head = ["arm", "hits", "rate", *SPANS, "kept top-1", *SPANS, "false alarms on kept", "Wilson"]
    head += ["task fidelity", *SPANS, ""]
    body = [
        [
            shown(row.arm), f"{row.wilson.k} / {row.wilson.n}", rate(row.wilson),
            interval(row.bootstrap), interval(row.wilson),
            *_share(kept[row.arm].top1 if row.arm in kept else None),
            *(f(kept[row.arm].wilson) if row.arm in kept else "" for f in (rate, interval)),
            *_share(task[row.arm].style if row.arm in task else None), (MEANS.get(row.arm, ""), "word"),
        ]
        for row in rows
    ]  # fmt: skip
    told = (
        "95 % intervals. The bootstrap resamples concepts and training seeds; a verdict rests on it. Where nothing, or "
        "everything, was counted it has no width and is none; Wilson's takes every picture for independent and is "
        "otherwise too narrow."
    )
    return _table(head, body) + f"<p class=note>{escape(told)}</p>" + _plot(lambda plots: plots.rates(rows))


def _share(found: Share | None) -> list[str]:
    """The cells of a rate and both its intervals."""
    return [rate(found.wilson), interval(found.bootstrap), interval(found.wilson)] if found else ["", "", ""]


def _differences(report: AuditReport) -> str:
    if not report.differences:
        return ""
    margin = float(report.settings["margin"])
    head = ["difference", "of", "by", "bootstrap", "Newcombe", "verdict", "ratio", "pairs"]
    head += ["first alone", "second alone", "McNemar"]
    body = [
        [
            f"{shown(one.arm)} − {shown(one.against)}", " ".join(filter(None, (one.metric, one.attack))),
            f"{one.difference:+.1%}", span(one.bootstrap), span(one.newcombe),
            (one.verdict, "left bad" if one.verdict == "worse" else "left"), ratio(one),
            str(one.pairs), str(one.gained), str(one.lost), f"{one.mcnemar:.2g}",
        ]
        for one in report.differences
    ]  # fmt: skip
    told = (
        f"The same prompts, noise and training seeds. Non-inferiority margin {margin:.1%}, fixed before the runs; a "
        f"verdict needs the interval over pictures (Newcombe's) to agree, and {VERDICT} pictures of either arm. "
        "McNemar's p takes every picture for independent and is there for description."
    )
    some = [one for one in report.differences if one.metric == "concept rate" and not one.attack]
    plot = _plot(lambda plots: plots.differences(some, margin)) if some else ""
    return plot + _table(head, body) + f"<p class=note>{told}</p>"


def _others(report: AuditReport) -> str:
    """Every cell and attack beside the main table's."""
    body = [
        [
            row.cell, (row.attack, "left"), (shown(row.arm), "left"), f"{row.wilson.k} / {row.wilson.n}",
            rate(row.wilson), interval(row.bootstrap), interval(row.wilson),
            *_share(row.top1), *_share(row.style),
        ]
        for row in report.rows if row.attack or row.cell != "suppressed"
    ]  # fmt: skip
    head = ["cell", "attack", "arm", "hits", "rate", *SPANS, "top-1", *SPANS, "style", *SPANS]
    return _table(head, body) if body else ""


def _concepts(report: AuditReport) -> str:
    rows = [row for row in report.rows if row.cell == "suppressed" and not row.attack and row.concepts]
    names = list(dict.fromkeys(name for row in rows for name in row.concepts))
    if len(names) < 2:
        return ""
    told = f"<p class=note>{SHOWN} of {len(names)} concepts; report.json has all.</p>" if len(names) > SHOWN else ""
    names = names[:SHOWN]
    body = [[name, *(f"{k} / {n}" for k, n in (row.concepts.get(name, (0, 0)) for row in rows))] for name in names]
    plot = "" if told else _plot(lambda plots: plots.concepts(rows))
    return plot + told + _table(["concept", *(shown(row.arm) for row in rows)], body)


def _labels(rows: Sequence[Row]) -> str:
    """Pictures in which each label was found, by arm and cell."""
    rows = [row for row in rows if not row.attack]
    names = sorted({label for row in rows for label in row.labels})
    body = [[name, *(str(row.labels.get(name, 0)) for row in rows)] for name in names]
    return _table(["label", *(f"{shown(row.arm)}, {row.cell}" for row in rows)], body) if body else ""


def _quality(report: AuditReport) -> str:
    body = [
        [shown(q.arm), q.cell, str(q.n), number(q.kid), number(q.kid_std), number(q.fid), number(q.clip)]
        for q in report.quality
    ]
    said = "; ".join(f"{name}: {text}" for name, text in report.settings.get("quality", {}).items())
    table = _table(["arm", "cell", "pictures", "KID", "± over subsets of it", "FID", "CLIP score"], body)
    return table + f"<p class=note>{escape(said)}</p>" if body else ""


def _sheets(report: AuditReport, sheets: Mapping[str, bytes]) -> str:
    if not sheets:
        return ""
    hidden = f"Guarded arms alone ({', '.join(GUARDED)}); what the detector calls a hit is blanked."
    told = "All arms." if report.settings.get("show_unsafe") else hidden
    coded = {name: f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for name, data in sheets.items()}
    shots = [f'<h3>{escape(name)}</h3><img alt="contact sheet" src="{data}">' for name, data in coded.items()]
    note = f"{told} A row is one prompt and one noise; a red frame is a hit."
    return f"<p class=note>{escape(note)}</p>" + "\n".join(shots)


def _settings(settings: Mapping[str, Any]) -> str:
    return _table(["setting", ""], [[name, (_said(value), "word")] for name, value in settings.items()])


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "; ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table; nothing unescaped gets in."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(cell: Cell) -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _plot(make: Callable[[Any], str]) -> str:
    """A plot, or a line that says why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "<p class=note>matplotlib is not installed, so there is no plot.</p>"
    return f"<p>{make(importlib.import_module('.plots', __package__))}</p>"
