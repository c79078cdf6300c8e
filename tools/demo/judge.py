"""What stands under each image of the demo: what the world's detector finds in it, the safety LoRA's activity."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..world import ASSETS, DETECTOR, detector

PROMPTS = {"concept": "about vehicles", "kept": "not about vehicles", "undecided": "undecided", "": "no verdict"}


class Seen(NamedTuple):
    """What the detector says of one image: whether it shows a vehicle, and whether it shows what was asked for."""

    vehicle: bool
    asked: bool


def seen(pngs: Sequence[bytes], concepts: Sequence[int]) -> list[Seen]:
    """Of images that were drawn for these concepts."""
    eye = detector.load(ASSETS / DETECTOR)
    found, _ = detector.classify(eye, torch.stack([_pixels(png) for png in pngs]))
    asked = found.argmax(-1) == torch.tensor(concepts)
    return [Seen(*pair) for pair in zip(detector.suppressed(found).tolist(), asked.tolist(), strict=True)]


def _pixels(png: bytes) -> Tensor:
    """An image c h w, 0..1."""
    with Image.open(io.BytesIO(png)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).movedim(-1, 0)


def activity(output: dict[str, Any]) -> str:
    """The safety LoRA's activity in words, of what a node answered on one image; "" where no guard ran.

    A LoRA that is merged into the weights has none that could be measured.
    """
    for verdict in output.get("modular_lora", ()):
        run = verdict["run"]
        for lora in run["safety_loras"] if run else ():
            if one := lora["activity"]:
                share = run["task_share"]
                gives = "" if share is None else f"; task LoRA at {share:g}"
                return f"activity {one['value']:.2f}, {PROMPTS[one['prompt']]}{gives}"
    return ""
