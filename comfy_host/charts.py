"""Charts that nodes show, drawn by matplotlib, which is imported when the first of them is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

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
