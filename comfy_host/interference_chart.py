"""The image of LoRA Interference: the layers on which least of the safety LoRA is left, to be read on a node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..modular_lora.guard.interference import Interference
from .charts import EDGE, INK, PAPER, fitting

MOST = 10  # layers: a node shows the image at about half its size, and no more of them could be read
WIDTH, TEXT, BAR, ROW = 640, 19, 12, 46  # pixels
GRID, NEGATIVE, POSITIVE = "#d2d2cd", "#c83c32", "#3278be"


def images(found: Sequence[tuple[str, Interference]]) -> torch.Tensor:
    """An image for each safety LoRA and what it is compared with, as one IMAGE batch (b h w 3, float32 0..1)."""
    drawn = [draw(name, result) for name, result in found] or [Image.new("RGB", (WIDTH, ROW), PAPER)]
    height = max(one.height for one in drawn)
    batch = []
    for one in drawn:
        sheet = Image.new("RGB", (WIDTH, height), PAPER)  # the shorter ones are padded below
        sheet.paste(one)
        batch.append(np.asarray(sheet, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(batch))


def draw(name: str, result: Interference) -> Image.Image:
    """The layers with the lowest net strength, each with a bar of its cosine: -1 left and red, +1 right and blue."""
    worst = sorted(result.layers, key=lambda layer: layer.net_strength)[:MOST]
    font, top = ImageFont.load_default(TEXT), EDGE + 3 * (TEXT + 8) + 6
    image = Image.new("RGB", (WIDTH, top + ROW * len(worst) + EDGE), PAPER)
    pen = ImageDraw.Draw(image)
    many = f"the {len(worst)} lowest of {len(result.layers)} layers" if len(worst) > 1 else "its layer"
    for i, line in enumerate((
        name,
        f"net strength {result.net_strength:.3f}, mean cosine {result.mean_cosine:+.4f}",
        f"{many}: net strength, cosine from -1 to +1",
    )):  # fmt: skip
        pen.text((EDGE, EDGE + i * (TEXT + 8)), fitting(pen, line, font, WIDTH - 2 * EDGE), fill=INK, font=font)
    middle, half = WIDTH // 2, WIDTH // 2 - EDGE
    for i, layer in enumerate(worst):
        y = top + i * ROW
        figure = f"{layer.net_strength:.3f}"
        right = WIDTH - EDGE - pen.textlength(figure, font)
        label = layer.layer.removeprefix("diffusion_model.").removesuffix(".weight")
        pen.text((EDGE, y), fitting(pen, label, font, right - 2 * EDGE), fill=INK, font=font)
        pen.text((right, y), figure, fill=INK, font=font)
        bottom = y + TEXT + 6
        pen.line((EDGE, bottom + BAR // 2, WIDTH - EDGE, bottom + BAR // 2), fill=GRID)
        x = middle + round(half * max(-1.0, min(1.0, layer.cosine)))
        pen.rectangle((min(x, middle), bottom, max(x, middle), bottom + BAR), fill=NEGATIVE if x < middle else POSITIVE)
    pen.line((middle, top, middle, image.height - EDGE), fill=GRID)
    return image
