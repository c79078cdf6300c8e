"""Image files as every part of the pack reads them: data sets, masks, audits, the gate's own error."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

from ..errors import GuardError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF")  # of such files, whatever their ending says
MAX_PIXELS = 178_956_970  # where PIL stops too, unless the host has changed it
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
SIDE_FILES = re.compile(r"\..*|.*\.(npz|safetensors)|metadata_cache\.json|thumbs\.db|desktop\.ini", re.IGNORECASE)
SHOWN = 10


class ImageError(GuardError):
    """A file that is no whole image."""

    code = "image"


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image with its EXIF orientation applied."""

    image: Image.Image  # RGB
    alpha: Image.Image | None  # L; None: opaque
    turned: bool  # by its EXIF orientation
    frames: int  # of an animation; the first is taken


def decode(data: bytes, on_white: bool = True) -> Decoded:
    """The whole image of a file's bytes; ImageError for anything truncated, damaged, too large or no image.

    Grey, palette, 16-bit and CMYK images become RGB; ICC profiles are not applied, as in sd-scripts. Without
    ``on_white`` transparent parts keep the colour that is hidden in them. Further images in a phone's JPEG (depth,
    gain map: MPO) are no frames of an animation.
    """
    with _opened(data) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        upright, turned = _upright(image)
        rgb, alpha = _split(upright, on_white)
        return Decoded(rgb, alpha, turned, frames)


def decode_frames(data: bytes) -> Iterator[tuple[Image.Image, Image.Image | None]]:
    """Each frame of an animation as `decode` gives the first: (RGB on white, alpha or None). Raises ImageError."""
    with _opened(data) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            yield _split(image.copy(), on_white=True)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The bytes as PIL opens them; what PIL raises inside becomes an ImageError."""
    if not data:
        raise ImageError("empty file (0 bytes)", code="image.empty")
    try:
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]  # a PIL may be built without WebP
        with _strict(), Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{image.width}×{image.height} has more than {MAX_PIXELS} pixels: scale it down",
                    code="image.too-large",
                )
            yield image
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            "no PNG, JPEG, WebP, BMP or GIF, whatever its ending says", code="image.unknown-format"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"too many pixels, maybe a decompression bomb ({error}): scale it down", code="image.too-large"
        ) from error
    except Exception as error:  # PIL's decoders raise what they meet: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"damaged or truncated ({type(error).__name__}: {error})", code="image.damaged") from error


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask: white counts, black and transparent does not."""

    image: Image.Image  # L
    has_alpha: bool  # so that a reader that drops alpha sees another mask
    coloured: bool  # so that a reader of another channel than red sees another mask


def decode_mask(data: bytes) -> Mask:
    """The mask of a file's bytes: its red channel, on black where it is transparent. Raises ImageError."""
    decoded = decode(data, on_white=False)
    red, green, blue = decoded.image.split()
    coloured = any(ImageChops.difference(red, other).getbbox() for other in (green, blue))
    if decoded.alpha is None:
        return Mask(red, False, coloured)
    return Mask(ImageChops.multiply(red, decoded.alpha), True, coloured)


def under(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files under a folder by their ending, and other files that are not read; both sorted.

    Hidden files and those that systems and trainers leave behind are in neither.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not SIDE_FILES.fullmatch(path.name))
    found = [path for path in files if path.suffix.lower() in ENDINGS]
    return found, [path for path in files if path.suffix.lower() not in ENDINGS]


def named(names: list[str] | tuple[str, ...]) -> str:
    """The first names of many, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{'; '.join(names[:SHOWN])}{rest}"


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
    if image.mode.startswith("I"):
        image = _eight_bits(image)
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


def _eight_bits(image: Image.Image) -> Image.Image:
    """L, or LA where a grey is transparent, of 16-bit grey; PIL's own conversion cuts off at 255."""
    values = np.asarray(image).astype(np.float32)
    grey = Image.fromarray((values.clip(0, 65535) * (255 / 65535) + 0.5).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
