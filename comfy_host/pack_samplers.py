"""Detailers, upscalers, tiled and regional samplers of other packs: they sample parts, or what they resized themselves.

Such a node makes its images or latents of what it is given and of guarded runs of its own, so that they are an edit; so
does one that cuts a part out for a sampler or puts it back. It is one while two things hold: its pack's files are those
that were read (docs/compatibility.md says which were run), and nothing came to it that may bring an image of its own.
That is asked of every value that reaches it: models must be guarded, detectors be of files that were read as well, and
a hook, a ControlNet for a place in the image, a latent's mask, or an object that nobody knows is one too many. What is
known of the images, latents and masks among the values decides about the rest, as for every edit.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import numpy as np
import torch

from . import bound_vae, image_values
from .patcher import GuardMixin

# SHA-256 over the Python files in the folder of a node's class and below, as they were read
IMPACT = ("8d7d37bda43de074051f13e3335573ba7482180de0720a246516a64acb38df70",)  # Impact Pack 7.10.6, modules/impact
SUBPACK = ("add49f16f7ef0e838ab909cacebc2dad9963d42e17c3e7dca5f320030362171f",)  # Impact Subpack 28c9407, impact
ULTIMATE = (  # Ultimate SD Upscale, with Coyote-A's script at 2322caa
    "3b59c8caf36c008c5ff4eb507c86aa7e36d3fcae1adf7440bcc8a0b5d8ada27c",  # c48d60d
    "116c86f17da89de77f3e519aa6189d2e8f2afdecdf0236c7fad4446e46536dcd",  # 34a3c2c
)
INPAINT = (  # Inpaint Crop and Stitch
    "22a5d9d42cdb58e2b7bea43e0852b9731afae55b9a38ab2b3c58dd3f424c3046",  # a5fbe06
    "9f543d608677bb8d6959c493a5ebe0647cc41fc7c3eab67a9004ea17262cba87",  # 3a57816
)
TILED = ("d53e8da85e7d8abf122c67a4772605965431b24c3b00e566bfb176585c4e232d",)  # Tiled KSampler 2fd9b05
FOLDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("BboxDetectorSEGS", "DetailerForEach", "DetailerForEachPipe"), IMPACT),
    **dict.fromkeys(("FaceDetailer", "FaceDetailerPipe", "MaskToSEGS"), IMPACT),
    **dict.fromkeys(("IterativeImageUpscale", "IterativeLatentUpscale"), IMPACT),
    **dict.fromkeys(("RegionalSampler", "RegionalSamplerAdvanced"), IMPACT),
    **dict.fromkeys(("InpaintCropImproved", "InpaintStitchImproved"), INPAINT),
    **dict.fromkeys(("BNK_TiledKSampler", "BNK_TiledKSamplerAdvanced"), TILED),
    **dict.fromkeys(("UltimateSDUpscale", "UltimateSDUpscaleCustomSample", "UltimateSDUpscaleNoUpscale"), ULTIMATE),
}
# Detectors, which find their places in the image that they are handed; the same of their class. Their weights are not
# looked into, as those of an upscale model and a VAE are not.
DETECTORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("UltraBBoxDetector", "UltraSegmDetector"), SUBPACK),
    **dict.fromkeys(("NO_BBOX_DETECTOR", "NO_SEGM_DETECTOR"), IMPACT),
}
# Objects in which another node of the pack hands on what came to it: as if all of that came to the node itself
HOLDERS: dict[str, tuple[str, ...]] = dict.fromkeys(image_values.HELD, IMPACT)
PLAIN = (str, int, float, type(None), torch.Tensor, np.generic, comfy.sd.CLIP, comfy.samplers.Sampler)


def vouched(name: str, kind: type, inputs: Mapping[str, list]) -> bool:
    """Whether a node that goes by this name is one of these, and nothing came to it that is one too many.

    Args:
        name: What the node goes by.
        kind: Its class.
        inputs: What came to it; a list for each input.
    """
    if name not in FOLDERS or folder_sha256(kind) not in FOLDERS[name]:
        return False
    return _all_known(inputs)


def _all_known(values: Mapping[str, Any]) -> bool:
    return all(_is_known(some) for key, some in values.items() if key != "upscale_model")  # ComfyUI's own node runs it


def _is_known(value: Any) -> bool:
    """Whether a value brings no image but those that `image_values` finds in it."""
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return isinstance(value, GuardMixin)
    if isinstance(value, comfy.sd.VAE):  # another pack's may decode to whatever it likes
        return not bound_vae.stranger(value)
    if isinstance(value, PLAIN) or image_values.is_conditioning(value):
        return True
    if image_values.is_segment(value):
        return value.control_net_wrapper is None
    if isinstance(value, Mapping) and "noise_mask" in value:  # its outlines are not among `image_values`
        return False
    if isinstance(value, list | tuple | Mapping):
        return all(map(_is_known, value.values() if isinstance(value, Mapping) else value))
    kind: type = type(value)
    if kind.__name__ in HOLDERS and folder_sha256(kind) in HOLDERS[kind.__name__]:
        return _all_known(vars(value))
    return kind.__name__ in DETECTORS and folder_sha256(kind) in DETECTORS[kind.__name__]


@cache
def folder_sha256(kind: type) -> str:
    """Over the Python files in the folder of a class and below, their names among it; "" where there are none."""
    try:
        folder = _file(kind).parent
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
        digest = hashlib.sha256()
        for name in sorted(found):
            text = found[name].read_text(encoding="utf-8").encode()  # with the same line ends everywhere
            digest.update(f"{name}\n{len(text)}\n".encode() + text)
        return digest.hexdigest()
    except (OSError, TypeError, UnicodeDecodeError):
        return ""


def _file(kind: type) -> Path:
    """Of a class; by its code where Python does not know its module, as Ultimate SD Upscale takes its own out again."""
    try:
        return Path(inspect.getfile(kind))
    except TypeError:
        found = next((inspect.unwrap(one) for one in vars(kind).values() if inspect.isfunction(one)), None)
        if found is None:
            raise
        return Path(found.__code__.co_filename)
