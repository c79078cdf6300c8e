"""Images of a data set: buckets, resizing and cropping, masks. Sizes are (width, height), as in PIL.

Bucket rule of sd-scripts, written after its behaviour: with (W, H) the resolution, widths w go from min to max in
steps; the height of w is the largest multiple of the step with w·h ≤ W·H, at most max; both (w, h) and (h, w) are
buckets if h ≥ min; the square below √(W·H) always is. An image goes to the bucket of its own size, else to that of
the nearest w/h; it is scaled until it covers the bucket and cropped at the centre.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...modular_lora.files.images import ImageError, Mask, decode, decode_mask
from . import clips

Size = tuple[int, int]  # width height
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


class MaskShapeError(ImageError):
    """A mask that does not lie on its image."""

    code = "image.mask-shape"


@dataclass(frozen=True)
class Buckets:
    """sd-scripts' bucket options of a data set; min and max are multiples of the step."""

    resolution: Size = (512, 512)
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass(frozen=True)
class Fit:
    """Where an image goes: scaled to ``resized``, then the rectangle of ``bucket`` at (left, top) ``crop``."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]

    @property
    def kept(self) -> float:
        """Share of the image that is in its bucket."""
        return self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])


@functools.lru_cache(maxsize=64)
def bucket_sizes(resolution: Size, least: int, most: int, step: int) -> tuple[Size, ...]:
    """All buckets of at most resolution[0]·resolution[1] pixels, sorted; sides are multiples of ``step``."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    found = {(side, side)} if side else set()
    for width in range(least, most + 1, step):
        height = min(most, area // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def fit(size: Size, buckets: Buckets) -> Fit:
    """Bucket, scaled size and centre crop of an image; ImageError where it is smaller than any bucket."""
    if buckets.enable_bucket and buckets.bucket_no_upscale:
        step = buckets.bucket_reso_steps
        resized = _shrunk(size, buckets.resolution[0] * buckets.resolution[1], step)
        bucket = resized[0] // step * step, resized[1] // step * step
        if not all(bucket):
            raise ImageError(
                f"{size[0]}×{size[1]} is smaller than bucket_reso_steps = {buckets.bucket_reso_steps}: "
                "use a larger image or leave out bucket_no_upscale.",
                code="image.too-small",
            )
    else:
        bucket = _nearest(size, buckets)
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        resized = max(int(size[0] * scale + 0.5), bucket[0]), max(int(size[1] * scale + 0.5), bucket[1])
    return Fit(bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2))


def _nearest(size: Size, buckets: Buckets) -> Size:
    if not buckets.enable_bucket:
        return buckets.resolution
    sizes = bucket_sizes(
        buckets.resolution, buckets.min_bucket_reso, buckets.max_bucket_reso, buckets.bucket_reso_steps
    )
    if size in sizes:
        return size
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - size[0] / size[1]))


def _shrunk(size: Size, area: int, step: int) -> Size:
    """``size`` scaled down to ``area`` with one side a multiple of ``step``: the side whose bucket keeps w/h better."""
    if size[0] * size[1] <= area:
        return size
    aspect = size[0] / size[1]
    floor = lambda value: int(value + 0.5) // step * step  # noqa: E731
    width, height = floor(math.sqrt(area * aspect)), floor(math.sqrt(area / aspect))
    if not width or not height:
        return max(width, 1), max(height, 1)
    by_width, by_height = floor(width / aspect), floor(height * aspect)
    error_of_width = abs(width / by_width - aspect) if by_width else math.inf
    if error_of_width < abs(by_height / height - aspect):
        return width, int(width / aspect + 0.5)
    return int(height * aspect + 0.5), height


def sizes(original: Size, fit: Fit, flipped: bool) -> Tensor:
    """SDXL's size conditioning (6, int64): original h w, crop top left, target h w (arXiv 2307.01952, section 2.2).

    The crop is the real one, in pixels of the resized image; of a flipped image, from its other side. sd-scripts
    gives half the gap that the image would leave when fitted inside the bucket.
    """
    left, top = fit.crop
    if flipped:
        left = fit.resized[0] - fit.bucket[0] - left
    return torch.tensor([original[1], original[0], top, left, fit.bucket[1], fit.bucket[0]])


def thumbnail(path: Path, side: int) -> Image.Image:
    """An image file as it is trained on, or a clip's first frame, within ``side`` pixels."""
    data = path.read_bytes()
    if path.suffix.lower() in clips.VIDEOS:
        image = clips.look(data, path.suffix, 1, "head")[0].image
    else:
        image = decode(data).image
    image.thumbnail((side, side))
    return image


def read_mask(path: Path, size: Size) -> Mask:
    """The mask file of an image of ``size``, scaled to it; MaskShapeError where its shape is another one."""
    mask = decode_mask(path.read_bytes())
    (width, height), found = size, mask.image.size
    if found == size:
        return mask
    if abs(found[0] * height - found[1] * width) > max(*found, *size):  # sides may be rounded by a pixel
        raise MaskShapeError(
            f"{found[0]}×{found[1]} is another shape than its image's {width}×{height}: draw it on the image"
        )
    return replace(mask, image=mask.image.resize(size))


def place(image: Image.Image, fit: Fit, interpolation: str | None = None) -> Image.Image:
    """``image`` scaled and cropped to its bucket; by default with area averages when smaller, else Lanczos."""
    if image.size != fit.resized:
        smaller = image.width >= fit.resized[0] and image.height >= fit.resized[1]
        name = interpolation or ("area" if smaller else "lanczos")
        image = image.resize(fit.resized, INTERPOLATIONS[name])
    left, top = fit.crop
    return image.crop((left, top, left + fit.bucket[0], top + fit.bucket[1]))


def pixels(image: Image.Image, flipped: bool) -> Tensor:
    """h w 3, float32 0..1, of an RGB image; ``flipped``: mirrored left to right."""
    values = torch.from_numpy(np.array(image)).float() / 255  # h w 3
    return values.flip(1) if flipped else values


def mask(image: Image.Image, flipped: bool, downscale: int) -> Tensor:
    """h/downscale w/downscale, float32 0..1: what each latent cell's loss counts, the mean of an L image's cells."""
    values = torch.from_numpy(np.array(image)).float()[None, None] / 255  # 1 1 h w
    cells = F.adaptive_avg_pool2d(values, (image.height // downscale, image.width // downscale))[0, 0]
    return cells.flip(1) if flipped else cells
