"""The page of an audit: one self-contained HTML file, readable in light and dark, from the report alone.

Prompts, concepts and file names are anybody's words: the template escapes whatever it is given but the plots, which
matplotlib escapes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..modular_lora import pages
from . import words
from .arms import MEANS, shown
from .figures import VERDICT
from .plan import GUARDED
from .report import AuditReport, Row

TEMPLATE = Path(__file__).with_name("templates") / "page.html"
SHOWN = 200  # concepts


def render(report: AuditReport, sheets: Mapping[str, bytes]) -> str:
    """The page; ``sheets`` are JPEGs by name."""
    plain = [row for row in report.rows if not row.attack]
    rows = {cell: [row for row in plain if row.cell == cell] for cell in ("suppressed", "kept", "task")}
    suppressed = rows["suppressed"]
    counted = [row for row in suppressed if row.concepts]
    concepts = list(dict.fromkeys(name for row in counted for name in row.concepts))
    return pages.render(
        TEMPLATE,
        report=report,
        origin=[report.settings.get(name) for name in ("date", "detector", "device", "dtype", "base")],
        suppressed=suppressed,
        kept={row.arm: row for row in rows["kept"]},
        task={row.arm: row for row in rows["task"]},
        others=[row for row in report.rows if row.attack or row.cell != "suppressed"],
        counted=counted,
        concepts=concepts,
        plain=plain,
        labels=sorted({label for row in plain for label in row.labels}),
        plots=_plots(report, suppressed, counted if 1 < len(concepts) <= SHOWN else ()),
        sheets=sheets,
        guarded=", ".join(GUARDED),
        most=SHOWN,
        least=VERDICT,
        means=MEANS,
        shown=shown,
        said=_said,
        words=words,
    )


def _plots(report: AuditReport, suppressed: Sequence[Row], counted: Sequence[Row]) -> dict[str, Markup] | None:
    """The SVG of every plot that has something to show; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    plots = importlib.import_module(".plots", __package__)  # here, since matplotlib takes long to import
    some = [one for one in report.differences if one.metric == "concept rate" and not one.attack]
    made = {
        "rates": suppressed and plots.rates(suppressed),
        "differences": some and plots.differences(some, float(report.settings["margin"])),
        "concepts": counted and plots.concepts(counted),
    }
    return {name: Markup(svg) for name, svg in made.items() if svg}


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "; ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
