"""Pictures of a data set: buckets, decoding, resizing and cropping, masks. Sizes are (width, height), as in PIL.

Bucket rule of sd-scripts, written after its behaviour: with (W, H) the resolution, widths w go from min to max in
steps; the height of w is the largest multiple of the step with w·h ≤ W·H, at most max; both (w, h) and (h, w) are
buckets if h ≥ min; the square below √(W·H) always is. A picture goes to the bucket of its own size, else to that of
the nearest w/h; it is scaled until it covers the bucket and cropped at the centre.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..modular_lora.errors import GuardError

Size = tuple[int, int]  # width height
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF")  # of such files, whatever their ending says
MAX_PIXELS = 178_956_970  # where PIL stops too, unless the host has changed it
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
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


class PictureError(GuardError):
    """A file that is no whole picture."""


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
    """Where a picture goes: scaled to ``resized``, then the rectangle of ``bucket`` at (left, top) ``crop``."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture with its EXIF orientation applied."""

    image: Image.Image  # RGB
    alpha: Image.Image | None  # L; None: opaque
    turned: bool  # by its EXIF orientation
    frames: int  # of an animation; the first is taken


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
    """Bucket, scaled size and centre crop of a picture; PictureError where it is smaller than any bucket."""
    if buckets.enable_bucket and buckets.bucket_no_upscale:
        resized = _shrunk(size, buckets.resolution[0] * buckets.resolution[1], buckets.bucket_reso_steps)
        bucket = tuple(side // buckets.bucket_reso_steps * buckets.bucket_reso_steps for side in resized)
        if not all(bucket):
            raise PictureError(
                f"{size[0]}×{size[1]} is smaller than bucket_reso_steps = {buckets.bucket_reso_steps}: "
                "use a larger picture or leave out bucket_no_upscale."
            )
    else:
        bucket = _nearest(size, buckets)
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        resized = tuple(max(int(side * scale + 0.5), b) for side, b in zip(size, bucket, strict=True))
    return Fit(bucket, resized, tuple((r - b) // 2 for r, b in zip(resized, bucket, strict=True)))


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

    The crop is the real one, in pixels of the resized picture; of a flipped picture, from its other side. sd-scripts
    gives half the gap that the picture would leave when fitted inside the bucket.
    """
    left, top = fit.crop
    if flipped:
        left = fit.resized[0] - fit.bucket[0] - left
    return torch.tensor([original[1], original[0], top, left, fit.bucket[1], fit.bucket[0]])


def decode(data: bytes, on_white: bool = True) -> Decoded:
    """The whole picture of a file's bytes; PictureError for anything truncated, damaged, too large or no picture.

    Grey, palette, 16-bit and CMYK pictures become RGB; ICC profiles are not applied, as in sd-scripts. Without
    ``on_white`` transparent parts keep the colour that is hidden in them, as in sd-scripts.
    """
    if not data:
        raise PictureError("empty file (0 bytes)")
    try:
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]  # a PIL may be built without WebP
        with _strict(), Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width}×{image.height} has more than {MAX_PIXELS} pixels: scale it down")
            frames = getattr(image, "n_frames", 1)
            image.load()
            upright, turned = _upright(image)
            rgb, alpha = _split(upright, on_white)
            return Decoded(rgb, alpha, turned, frames)
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError("no PNG, JPEG, WebP, BMP or GIF, whatever its ending says") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"too many pixels, maybe a decompression bomb ({error}): scale it down") from error
    except Exception as error:  # PIL's decoders raise what they meet: OSError, SyntaxError, struct.error, ...
        raise PictureError(f"damaged or truncated ({type(error).__name__}: {error})") from error


@contextmanager
def _strict() -> Iterator[None]:
    """PIL neither completes truncated files, which hosts switch on for the whole process, nor warns of large ones."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    try:
        if image.getexif().get(ORIENTATION, 1) in range(2, 9):
            return ImageOps.exif_transpose(image), True
    except Exception:  # damaged EXIF data, in whatever way, says nothing against the pixels
        pass
    return image, False


def _split(image: Image.Image, on_white: bool) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha or None where all is opaque)."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits; PIL's own conversion cuts off at 255
        values = np.asarray(image).astype(np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top) + 0.5).astype(np.uint8))
    if not ("A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info):
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    opaque = alpha.getextrema()[0] == 255
    if opaque or not on_white:
        return image.convert("RGB"), None if opaque else alpha
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB"), alpha


def place(image: Image.Image, fit: Fit, interpolation: str | None = None) -> Image.Image:
    """``image`` scaled and cropped to its bucket; by default with area averages when smaller, else Lanczos."""
    if image.size != fit.resized:
        smaller = image.width >= fit.resized[0] and image.height >= fit.resized[1]
        name = interpolation or ("area" if smaller else "lanczos")
        image = image.resize(fit.resized, INTERPOLATIONS[name])
    left, top = fit.crop
    return image.crop((left, top, left + fit.bucket[0], top + fit.bucket[1]))


def pixels(image: Image.Image, flipped: bool) -> Tensor:
    """h w 3, float32 0..1, of an RGB picture; ``flipped``: mirrored left to right."""
    values = torch.from_numpy(np.array(image)).float() / 255  # h w 3
    return values.flip(1) if flipped else values


def mask(image: Image.Image, flipped: bool, downscale: int) -> Tensor:
    """h/downscale w/downscale, float32 0..1: what each latent cell's loss counts, the mean of an L picture's cells."""
    values = torch.from_numpy(np.array(image)).float()[None, None] / 255  # 1 1 h w
    cells = F.adaptive_avg_pool2d(values, (image.height // downscale, image.width // downscale))[0, 0]
    return cells.flip(1) if flipped else cells
