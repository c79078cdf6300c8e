"""Charts that nodes show, drawn by matplotlib, which is imported when the first of them is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
PAPER, INK = "#fafaf8", "#282828"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.facecolor": PAPER,
    "text.parse_math": False,
}  # a name's dollar sign stays one


def chart(width: int, height: int, plot: Callable[[Figure], None]) -> Image.Image:
    """An image of ``width`` x ``height`` pixels with what ``plot`` puts on the figure it is handed.

    Without matplotlib, which ComfyUI does not bring, the image says in words what to install: a chart must not stop a
    run that works otherwise.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        image = Image.new("RGB", (width, height), PAPER)
        ImageDraw.Draw(image).text((8, 8), f"No chart ({error}): pip install matplotlib.", fill=INK)
        return image
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that matplotlib's font lacks
        canvas = FigureCanvasAgg(Figure((width / DPI, height / DPI), DPI, facecolor=PAPER, layout="constrained"))
        plot(canvas.figure)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


SIZES = range(19, 10, -1)  # of a table's letters, in pixels: the largest with which it fits
EDGE, BETWEEN = 16, 14  # pixels beside a table, and between two of its columns


def table(width: int, rows: Sequence[Sequence[str]]) -> Image.Image:
    """A table as an image of ``width`` pixels: its first column on the left, figures at the right of theirs.

    The first row heads the columns. Of what is too long for the smallest letters the end is shown.
    """
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for size in SIZES:
        font = ImageFont.load_default(size)
        columns = [max(pen.textlength(row[i], font) for row in rows) for i in range(len(rows[0]))]
        if sum(columns) + BETWEEN * (len(columns) - 1) <= width - 2 * EDGE:
            break
    columns[0] = width - 2 * EDGE - sum(columns[1:]) - BETWEEN * (len(columns) - 1)
    high = size + 10
    image = Image.new("RGB", (width, high * len(rows) + 2 * EDGE), PAPER)
    pen = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        y, right = EDGE + number * high, float(EDGE)
        for i, (text, wide) in enumerate(zip(row, columns, strict=True)):
            right += wide + BETWEEN * bool(i)
            said = fitting(pen, text, font, wide)
            pen.text((right - (pen.textlength(said, font) if i else wide), y), said, fill=INK, font=font)
    pen.line((EDGE, EDGE + high - 6, width - EDGE, EDGE + high - 6), fill=INK)
    return image


def fitting(pen: ImageDraw.ImageDraw, text: str, font, width: float) -> str:
    """The text, or its end, by which layers differ, where the whole is too wide."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"…{text}", font) > width:
        text = text[1:]
    return f"…{text}"


def below(one: Image.Image, other: Image.Image) -> Image.Image:
    """Two images of one width as one."""
    both = Image.new("RGB", (one.width, one.height + other.height), PAPER)
    both.paste(one)
    both.paste(other, (0, one.height))
    return both


COLUMNS, SIDE, LABEL = 4, 236, 24  # images in a row at most; pixels of the largest side of one, and of a label's line


def rows_of_images(width: int, rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of images, each below its label, as an image of ``width`` pixels; a label says where some are not shown."""
    most = max(len(images) for _, images in rows)
    side = min(SIDE, width // min(most, COLUMNS) - 4)
    sheet = Image.new("RGB", (width, len(rows) * (LABEL + side + 4)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (label, images) in enumerate(rows):
        y = number * (LABEL + side + 4)
        left_out = f" (the first {COLUMNS} of {len(images)})" if len(images) > COLUMNS else ""
        pen.text((4, y + 3), label + left_out, fill=INK, font=font)
        for column, image in enumerate(images[:COLUMNS]):
            small = image.convert("RGB")
            small.thumbnail((side, side))
            sheet.paste(small, (column * (side + 4) + 2, y + LABEL))
    return sheet
