"""Contact sheets: the same prompts and noise in every arm, side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..modular_lora.files.images import decode
from .arms import shown
from .plan import GUARDED
from .results import Drawn

SIDE, GAP, HEAD = 128, 6, 22  # pixels
ROWS = 12
PAPER, INK, HIT, BLANK = (250, 250, 248), (40, 40, 40), (200, 40, 40), (190, 190, 190)


def sheets(drawn: Sequence[Drawn], unsafe: bool) -> dict[str, bytes]:
    """A JPEG for every cell and attack: a row a prompt, a column an arm of the first training seed.

    Without ``unsafe`` only the guarded arms' images are in it, and what the detector calls a hit is blanked.
    """
    found: dict[str, list[Drawn]] = {}
    for one in drawn:
        if unsafe or one.arm.name in GUARDED:
            found.setdefault(" ".join(filter(None, (one.item.cell, one.item.attack))), []).append(one)
    return {name: sheet(some, unsafe) for name, some in found.items()}


def sheet(drawn: Iterable[Drawn], unsafe: bool) -> bytes:
    """One sheet; rows are chosen so that as many concepts as possible are seen."""
    table: dict[tuple, dict[str, Drawn]] = {}
    for one in drawn:
        table.setdefault(_asked(one), {}).setdefault(one.arm.name, one)
    arms = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = _spread(list(table.values()))
    step = SIDE + GAP
    paper = Image.new("RGB", (GAP + step * len(arms), HEAD + GAP + step * len(rows)), PAPER)
    draw = ImageDraw.Draw(paper)
    for column, arm in enumerate(arms):
        draw.text((GAP + column * step, GAP), shown(arm), INK, ImageFont.load_default())
        for line, row in enumerate(rows):
            if arm in row:
                _paste(paper, draw, (GAP + column * step, HEAD + GAP + line * step), row[arm], unsafe)
    file = io.BytesIO()
    paper.save(file, "JPEG", quality=88)
    return file.getvalue()


def _asked(one: Drawn) -> tuple:
    return one.item.prompt, one.item.seed, one.item.denoise, one.item.start


def _spread(rows: list[dict[str, Drawn]]) -> list[dict[str, Drawn]]:
    """At most ROWS rows, one of each concept before a second of any, in their order."""
    turns: dict[str, int] = {}
    ranked = []
    for place, row in enumerate(rows):
        concept = next(iter(row.values())).item.concept
        turns[concept] = turns.get(concept, 0) + 1
        ranked.append((turns[concept], place))
    return [rows[place] for place in sorted(place for _, place in sorted(ranked)[:ROWS])]


def _paste(paper: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], one: Drawn, unsafe: bool) -> None:
    box = (*at, at[0] + SIDE, at[1] + SIDE)
    if one.verdict.hit and not unsafe:
        draw.rectangle(box, BLANK)
    else:
        image = ImageOps.contain(decode(one.path.read_bytes()).image, (SIDE, SIDE))
        paper.paste(image, (at[0] + (SIDE - image.width) // 2, at[1] + (SIDE - image.height) // 2))
    if one.verdict.hit:
        draw.rectangle(box, outline=HIT, width=3)
