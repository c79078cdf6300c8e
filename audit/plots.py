"""Plots of an audit as SVG for a page: text stays text, ink is the page's own colour, equal figures equal files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..gate.labelled import Point
from .arms import shown
from .report import Difference, Row

INK, BAR, MARK = "#010203", "#5b86c4", "#c44e52"  # INK is exchanged for the page's own text colour
STYLE: dict[Any, Any] = {  # matplotlib's own settings, of whose names its newest types keep a list
    "svg.fonttype": "none",
    "svg.hashsalt": "modular lora guard",  # else ids are random
    "text.parse_math": False,  # labels are anybody's words; a dollar sign must stay one
    "font.size": 9.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
LONGEST = 40  # letters of a label


def rates(rows: Sequence[Row]) -> str:
    """Concept rate of every row; thick the bootstrap's interval, thin with ends Wilson's."""
    with rc_context(STYLE):
        figure = _figure(7, 0.6 + 0.3 * len(rows))
        put_rates(figure, rows)
        return _svg(figure)


def put_rates(figure: Figure, rows: Sequence[Row]) -> None:
    """The plot of ``rates`` on a figure of any size."""
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        axes.barh(place, row.wilson.rate, color=BAR, height=0.6)
        over_concepts = (row.bootstrap.low, row.bootstrap.high) if row.bootstrap else None
        _spans(axes, place, over_concepts, (row.wilson.low, row.wilson.high))
        axes.text(1.02, place, f"{row.wilson.rate:.1%}", verticalalignment="center")
    _names(axes, [shown(row.arm) for row in rows])
    axes.set_xlim(0, 1)
    axes.set_xlabel("concept rate; thick: bootstrap, thin: Wilson")


def differences(found: Sequence[Difference], margin: float) -> str:
    """Every difference with its intervals; the margin as a dashed line."""
    with rc_context(STYLE):
        figure = _figure(7, 0.6 + 0.3 * len(found))
        axes = figure.add_subplot()
        for place, one in enumerate(found):
            _spans(axes, place, one.bootstrap, one.newcombe)
            axes.plot(one.difference, place, "o", color=BAR)
        _names(axes, [f"{shown(one.arm)} − {shown(one.against)}" for one in found])
        axes.axvline(0, color=INK, linewidth=0.5)
        axes.axvline(margin, color=MARK, linewidth=1, linestyle="--")
        axes.set_xlabel("difference of concept rates; thick: bootstrap, thin: Newcombe; dashed: the margin")
        return _svg(figure)


def concepts(rows: Sequence[Row]) -> str:
    """Hit rate by concept (down) and arm (across)."""
    names = list(dict.fromkeys(name for row in rows for name in row.concepts))
    table = [[_share(row.concepts.get(name)) for row in rows] for name in names]
    with rc_context(STYLE):
        figure = _figure(1.5 + 0.8 * len(rows), 0.9 + 0.22 * len(names))
        axes = figure.add_subplot()
        axes.pcolormesh(table, cmap="Reds", vmin=0, vmax=1)
        _names(axes, names, 0.5)
        axes.set_xticks(
            [i + 0.5 for i in range(len(rows))], [_label(shown(row.arm)) for row in rows], rotation=30, ha="left"
        )
        axes.xaxis.tick_top()
        return _svg(figure)


def curve(points: Sequence[Point], thresholds: Mapping[str, float]) -> str:
    """Misses and false alarms over the threshold; dashed: those in force."""
    with rc_context(STYLE):
        figure = _figure(7, 3)
        axes = figure.add_subplot()
        at = [point.threshold for point in points]
        for name, colour in (("missed", MARK), ("false_alarms", BAR)):
            found = [getattr(point, name) for point in points]
            axes.fill_between(at, [rate.low for rate in found], [rate.high for rate in found], color=colour, alpha=0.2)
            axes.plot(at, [rate.rate for rate in found], color=colour, label=name.replace("_", " "))
        for threshold in set(thresholds.values()):
            axes.axvline(threshold, color=INK, linewidth=0.8, linestyle="--")
        axes.set_xlabel("threshold; dashed: those in force")
        axes.legend(frameon=False)
        return _svg(figure)


def _spans(axes, place: int, over_concepts: tuple[float, float] | None, over_images: tuple[float, float]) -> None:
    if over_concepts:
        axes.plot(over_concepts, [place, place], color=INK, linewidth=2.5, solid_capstyle="butt")
    axes.plot(over_images, [place, place], color=INK, linewidth=0.7, marker="|", markersize=7)


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _names(axes, names: Sequence[str], shift: float = 0.0) -> None:
    """Labels down the side, the first one on top."""
    axes.set_yticks([i + shift for i in range(len(names))], [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.5 + shift, -0.5 + shift)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(name: str) -> str:
    """One printable line; control characters are no XML."""
    line = "".join(letter if letter.isprintable() else " " for letter in name)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _share(hits: tuple[int, int] | None) -> float:
    return hits[0] / hits[1] if hits else float("nan")


def _svg(figure: Figure) -> str:
    """The <svg> element alone, without the XML head and without a date."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that matplotlib's font lacks; the browser's has them
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return re.sub(r"(?s)^.*?(?=<svg)", "", file.getvalue()).replace(INK, "currentColor")
