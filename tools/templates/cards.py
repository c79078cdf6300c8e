"""A template's card: title, sentence, and the images that a run of it gave."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, HEAD = (800, 600), 32, 150
PAPER, INK, GREY = "white", "#1c2a30", "#4c5a60"


def card(title: str, sentence: str, images: Sequence[Image.Image]) -> Image.Image:
    """An RGB image of SIZE pixels; ``images`` stand in a row, each as large as it fits."""
    made = Image.new("RGB", SIZE, PAPER)
    pen = ImageDraw.Draw(made)
    pen.text((MARGIN, 24), title, INK, ImageFont.load_default(40))
    for i, line in enumerate(textwrap.wrap(sentence, 62)[:2]):
        pen.text((MARGIN, 78 + 30 * i), line, GREY, ImageFont.load_default(24))
    width, height = SIZE[0] - 2 * MARGIN, SIZE[1] - HEAD - MARGIN
    boxes = rows(len(images), width, height)
    for image, (x, y, side_x, side_y) in zip(images, boxes, strict=True):
        fitted = fit(image, side_x, side_y)
        left, top = x + (side_x - fitted.width) // 2, y + (side_y - fitted.height) // 2
        made.paste(fitted, (MARGIN + left, HEAD + top))
    return made


def rows(count: int, width: int, height: int, gap: int = 12) -> list[tuple[int, int, int, int]]:
    """Boxes x, y, width, height for ``count`` images: one row up to three, two rows above."""
    lines = 1 if count <= 3 else 2
    columns = -(-count // lines)
    side_x, side_y = (width - gap * (columns - 1)) // max(columns, 1), (height - gap * (lines - 1)) // lines
    return [((i % columns) * (side_x + gap), (i // columns) * (side_y + gap), side_x, side_y) for i in range(count)]


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """As large as it fits; images of a few pixels keep their pixels."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
