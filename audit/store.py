"""Images and verdicts of an audit on disk: whole units or nothing, in a folder of the user's own.

``<arm>-<training seed>/<key>/`` holds one finished unit: ``0000.png`` ..., ``unit.json`` and verdicts, a file a judge.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..modular_lora.errors import GuardError, writing
from ..modular_lora.util import atomic, plain_json
from .plan import Unit
from .results import Verdict

logger = logging.getLogger("modular_lora")
UNIT, MANIFEST = "unit.json", "audit.json"
ABANDONED = 600  # seconds; writing a unit takes a few, so an older half-written one has no writer any more


class StoreError(GuardError):
    """The audit's folder is not what it was when its images were written."""

    code = "store"


class Store:
    """One audit folder; several processes may write into it."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder, or takes it as it is, and clears what killed processes left half-written."""
        self.folder = Path(folder).absolute()
        self.twice = 0  # units that another process had finished first
        try:
            # The folders of arms are 0700 too, so that images are private in a folder that was there before. Windows
            # before Python 3.12.4 ignores modes: there a folder has the rights of its parent, which in the user's
            # profile are the user's alone.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _clear_abandoned(self.folder)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be the audit's folder ({error}): choose another one.") from error

    def place(self, unit: Unit) -> Path:
        """Folder of a unit, finished or not."""
        name = f"{unit.arm.name}-{unit.arm.training_seed}"
        if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise GuardError(
                f"Arm {unit.arm.name!r}: a folder is named after it: use letters, digits, _ and - only.",
                code="audit.arm-name",
            )
        return self.folder / name / unit.key

    def paths(self, unit: Unit) -> list[Path]:
        """Image files of a unit, in the order of its items."""
        return [self.place(unit) / f"{i:04d}.png" for i in range(len(unit.items))]

    def finished(self, unit: Unit) -> bool:
        """Whether a unit is there; folders appear whole, so what is missing in one was taken away later."""
        return self.place(unit).exists()

    def put(self, unit: Unit, images: np.ndarray) -> None:
        """Keep a unit's images, b h w 3, uint8; where another process was first, its images stay."""
        _check_images(unit, images)
        place = self.place(unit)
        temporary = atomic.temporary(self.folder)
        try:
            with writing(place, StoreError):
                temporary.mkdir(mode=0o700)
                place.parent.mkdir(mode=0o700, exist_ok=True)
                for path, image in zip(self.paths(unit), images, strict=True):
                    Image.fromarray(image).save(temporary / path.name, format="PNG", compress_level=4)
                _write(temporary / UNIT, asdict(unit) | {"pixels_sha256": [_sha256(image) for image in images]})
                self._rename(temporary, unit)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _rename(self, temporary: Path, unit: Unit) -> None:
        """A folder that is there and not empty cannot be renamed onto: whoever comes second loses."""
        try:
            os.rename(temporary, self.place(unit))
        except OSError:
            if not self.finished(unit):
                raise
            self.twice += 1
            logger.info("audit: unit %s was finished by another process as well", unit.key[:12])

    def images(self, unit: Unit) -> np.ndarray:
        """Images of a finished unit, b h w 3, uint8; StoreError where they are not those that were written."""
        place = self.place(unit)
        remedy = f"delete the folder {place}, and the unit is drawn again."
        hashes = _read(place / UNIT, remedy).get("pixels_sha256")
        images = []
        for path, sha256 in zip(self.paths(unit), hashes or [], strict=False):
            try:
                with Image.open(path) as file:
                    images.append(np.asarray(file.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise StoreError(f"{path}: is missing or damaged ({error}): {remedy}", code="store.damaged") from error
            if _sha256(images[-1]) != sha256:
                raise StoreError(f"{path}: has other pixels than were written: {remedy}", code="store.other-pixels")
        if len(images) != len(unit.items):
            raise StoreError(
                f"{place / UNIT}: names {len(images)} images of {len(unit.items)}: {remedy}", code="store.other-count"
            )
        return np.stack(images)

    def verdicts(self, unit: Unit, judge: str) -> list[Verdict] | None:
        """What the judge of this identity said of a unit, None where it was not asked yet."""
        path = self._verdict_file(unit, judge)
        if not path.is_file():
            return None
        remedy = f"delete the file {path}, and the unit is judged again."
        said = _read(path, remedy)
        try:
            verdicts = [Verdict(**(v | {"found": tuple(v["found"])})) for v in said["verdicts"]]
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path}: holds no verdicts ({error!r}): {remedy}", code="store.verdicts") from error
        return verdicts if said.get("judge") == judge and len(verdicts) == len(unit.items) else None

    def put_verdicts(self, unit: Unit, judge: str, verdicts: list[Verdict]) -> None:
        _write(self._verdict_file(unit, judge), {"judge": judge, "verdicts": [asdict(v) for v in verdicts]})

    def _verdict_file(self, unit: Unit, judge: str) -> Path:
        return self.place(unit) / f"verdicts-{judge[:12]}.json"

    def manifest(self) -> dict[str, Any]:
        """What the folder was last used for, {} for a new one."""
        path = self.folder / MANIFEST
        return _read(path, f"delete {path}: finished units are kept.") if path.exists() else {}

    def put_manifest(self, said: dict[str, Any]) -> None:
        _write(self.folder / MANIFEST, said)


def _check_images(unit: Unit, images: np.ndarray) -> None:
    n = len(unit.items)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != n or images.shape[3] != 3:
        raise GuardError(
            f"Arm {unit.arm.name}: the sampler gave {images.shape} {images.dtype} for {n} images: it must give "
            "b h w 3 uint8.",
            code="audit.sampler-output",
        )


def _sha256(image: np.ndarray) -> str:
    return hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _clear_abandoned(folder: Path) -> None:
    for path in list(folder.rglob(f"{atomic.PART}*")):
        try:
            if time.time() - path.stat().st_mtime < ABANDONED:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # its writer has just renamed it, or another audit cleared it
            continue


def _write(path: Path, said: dict[str, Any]) -> None:
    """A JSON file, whole or not at all. Raises StoreError."""
    with writing(path, StoreError):
        atomic.write(path, json.dumps(said, ensure_ascii=False, indent=1), sync=True)


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return plain_json.read_object(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: is missing or damaged ({error}): {remedy}", code="store.damaged") from error
