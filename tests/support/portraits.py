"""Drawn portraits that NudeNet takes for faces: images that a detector sees something in, made on the spot."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def portrait(seed: int, width: int = 320, height: int = 320) -> Image.Image:
    """A head with shoulders on a plain ground; soft edges, without which the network sees a drawing and no face."""
    rng = np.random.default_rng(seed)
    colour = lambda low, high: tuple(int(v) for v in rng.integers(low, high, 3))  # noqa: E731
    image = Image.new("RGB", (width, height), colour(0, 256))
    draw = ImageDraw.Draw(image)
    x, y, a = rng.uniform(0.35, 0.65) * width, 0.42 * height, rng.uniform(0.2, 0.28) * min(width, height)
    b, light = a * 1.25, rng.uniform(0.7, 1)
    skin, shade = (tuple(int(v * light * f) for v in (240, 190, 160)) for f in (1, 0.75))
    hair = colour(0, 90)

    def oval(cx: float, cy: float, rx: float, ry: float, fill: tuple | str) -> None:
        draw.ellipse((x + cx * a - rx * a, y + cy * b - ry * b, x + cx * a + rx * a, y + cy * b + ry * b), fill=fill)

    oval(0, -0.08, 1.25, 1.28, hair)
    draw.rectangle((x - a * 0.4, y + b * 0.6, x + a * 0.4, y + b * 1.6), fill=shade)
    oval(0, 2.65, 2.2, 1.35, colour(0, 256))
    oval(0, 0, 1, 1, skin)
    for side in (-1, 1):
        oval(side * 0.4, -0.1, 0.2, 0.09, "white")
        oval(side * 0.4, -0.1, 0.09, 0.09, hair)
        oval(side * 0.4, -0.22, 0.28, 0.03, hair)
    oval(0, 0.2, 0.06, 0.1, shade)
    oval(0, 0.53, 0.35, 0.085, (190, 70, 80))
    return image.filter(ImageFilter.GaussianBlur(0.06 * a))


def floats(*images: Image.Image) -> np.ndarray:
    """Images of one size as b h w 3 float32, 0..1."""
    return np.stack([np.asarray(image, np.float32) / 255 for image in images])
