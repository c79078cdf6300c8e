"""ComfyUI's base directory for demo and tests: the pack, the demo checkpoint, LoRAs, detector, data set in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...modular_lora.util import atomic
from ..bootstrap.links import link_folder
from ..bootstrap.paths import PACK_NAME, ROOT
from ..world import ASSETS, DATA_SET, DETECTOR_CONCEPTS, DETECTOR_ONNX

FOLDERS = (
    "custom_nodes",
    "input",
    "output",
    "temp",
    "user",
    "models/checkpoints",
    "models/loras",
    "models/safety_loras",
    "models/modular_lora_detectors",
)


def prepare(base: Path, *, checkpoint: Path, loras: Iterable[Path], safety: Path, pack: Path = ROOT) -> None:
    """Lay out `base`; running it again changes nothing."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_folder(pack, base / "custom_nodes" / PACK_NAME)
    place_file(checkpoint, base / "models" / "checkpoints" / checkpoint.name)
    for lora in loras:
        place_file(lora, base / "models" / "loras" / lora.name)
    place_file(safety, base / "models" / "safety_loras" / safety.name)
    for name in (DETECTOR_ONNX, DETECTOR_CONCEPTS):
        place_file(ASSETS / name, base / "models" / "modular_lora_detectors" / name)
    shutil.copytree(ASSETS / DATA_SET, base / "input" / DATA_SET, dirs_exist_ok=True)


def place_file(source: Path, destination: Path) -> None:
    """A hard link, or a copy on another file system; a changed source replaces what is there."""
    if destination.exists() and destination.samefile(source):
        return
    with atomic.replacing(destination) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
