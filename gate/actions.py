"""What is done to a flagged image. Pillow and numpy; every action covers a region at least as large as its box."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

from .errors import GateError
from .finding import Finding
from .runner import to_bytes
from .settings import Settings

Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last two outside
LOCAL = ("blur", "pixelate", "box", "ellipse")


def regions(
    finding: Finding, labels: tuple[str, ...], settings: Settings, size: tuple[int, int], whole: bool = False
) -> list[Region]:
    """Where the found ``labels`` are in an image of ``size`` (h, w): their boxes at or above the threshold, grown.

    A label without such a box (a detector of one score, or a threshold below what it draws boxes for) is everywhere,
    and so is what has no place in the image (``whole``).
    """
    if whole:
        return [(0, 0, size[1], size[0])]
    found = []
    for label in labels:
        boxes = [box for box in finding.boxes if box.label == label and box.score >= settings.acted[label]]
        grown = [_grown(box, settings.growth.get(label, 1.0), size) for box in boxes]
        grown = [r for r in grown if r[0] < r[2] and r[1] < r[3]]
        if not grown:
            return [(0, 0, size[1], size[0])]
        found += grown
    return list(dict.fromkeys(found))


def _grown(box, factor: float, size: tuple[int, int]) -> Region:
    """The box about its centre, out to whole pixels, clipped to the image."""
    more_x, more_y = box.width * (factor - 1) / 2, box.height * (factor - 1) / 2
    x0, y0 = math.floor(box.x - more_x), math.floor(box.y - more_y)
    x1, y1 = math.ceil(box.x + box.width + more_x), math.ceil(box.y + box.height + more_y)
    return max(0, x0), max(0, y0), min(size[1], x1), min(size[0], y1)


def mask(found: list[Region], action: str, size: tuple[int, int]) -> np.ndarray:
    """h w float32, 1 inside the regions; ellipses go through the corners of their boxes, so that all is covered."""
    out = np.zeros(size, np.float32)
    for x0, y0, x1, y1 in found:
        if action != "ellipse":
            out[y0:y1, x0:x1] = 1
            continue
        y, x = np.ogrid[: size[0], : size[1]]
        across = (x + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)
        down = (y + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
        out[across**2 + down**2 <= 2] = 1
    return out


def apply(
    image: np.ndarray,
    found: list[Region],
    where: np.ndarray,
    settings: Settings,
    replacement: np.ndarray | None,
) -> np.ndarray:
    """The image h w 3 with the action done; outside its mask ``where`` (h w) local actions change nothing."""
    if settings.action == "replace":
        assert replacement is not None, "gate.run checked that there is one"
        return _fitted(replacement, image.shape[:2]).astype(image.dtype)
    if settings.action not in LOCAL:
        return np.zeros_like(image)
    out = image.copy()
    if settings.action in ("box", "ellipse"):
        out[where > 0] = 0
        return out
    how = Image.Resampling.BICUBIC if settings.action == "blur" else Image.Resampling.NEAREST
    for x0, y0, x1, y1 in found:
        out[y0:y1, x0:x1] = _coarse(image[y0:y1, x0:x1], settings.cells, how)
    return out


def _coarse(crop: np.ndarray, cells: int, how: Image.Resampling) -> np.ndarray:
    """The crop h w 3 from ``cells`` means along its longer side: what is finer is gone, not hidden."""
    height, width = crop.shape[:2]
    longer = max(height, width)
    scale = max(1, min(cells, longer // 4)) / longer  # a small box keeps a quarter at most
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(to_bytes(np.clip(np.nan_to_num(crop), 0, 1)))
    coarse = image.resize(small, Image.Resampling.BOX).resize((width, height), how)
    return np.asarray(coarse, np.float32).astype(crop.dtype) / 255


def checked_replacement(image: np.ndarray | None) -> np.ndarray:
    """The replacement h w 3. Raises GateError where there is none, or it is not one finite image."""
    if image is None:
        raise GateError(
            'replacement: the action is "replace" and there is no image to put in: connect one.',
            code="gate.no-replacement",
        )
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape or not np.isfinite(image).all():
        raise GateError(
            f"replacement: {image.shape} is not one image h×w×3 of finite numbers: give one.", code="gate.replacement"
        )
    return image


def _fitted(replacement: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The replacement scaled into h, w as a whole, on black."""
    image = Image.fromarray(to_bytes(np.clip(replacement, 0, 1)))
    return np.asarray(ImageOps.pad(image, (size[1], size[0])), np.float32) / 255
