"""Image files of an audit: folders that the user names, and what is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ImageOps

from ..modular_lora.errors import GuardError, writing
from ..modular_lora.files.images import ENDINGS, ImageError, decode, named, under
from ..modular_lora.util import atomic


def find(folder: str | Path) -> list[Path]:
    """Every image file under a folder, sorted. GuardError where there is none."""
    found, _ = under(Path(folder))
    if not found:
        raise GuardError(
            f"{folder}: no images ({', '.join(ENDINGS)}) are in it: check the path.", code="audit.no-images"
        )
    return found


def left_out(name: str, folder: str) -> list[str]:
    """For the report, what is in a folder and is not read; ``name`` is the option that names it."""
    names = [path.name for path in under(Path(folder))[1]] if folder else []
    return [f"{name}: {len(names)} files are not {', '.join(ENDINGS)} and were not read: {named(names)}"] * bool(names)


def read(paths: Sequence[Path], width: int, height: int) -> np.ndarray:
    """Images n h w 3, uint8, cut and scaled to one size. Raises GuardError that names the file."""
    images = np.empty((len(paths), height, width, 3), np.uint8)
    for i, path in enumerate(paths):
        try:
            image = decode(path.read_bytes()).image
        except (OSError, ImageError) as error:
            raise GuardError(f"{path}: cannot be read as an image ({error}): take it out of the folder.") from error
        images[i] = np.asarray(ImageOps.fit(image, (width, height)))
    return images


def write(path: Path, data: bytes) -> None:
    """A whole file or none. Raises GuardError."""
    with writing(path):
        atomic.write(path, data, parents=True)
