"""Images, latents and masks among the values that nodes take and give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..modular_lora.provenance.edits import Kind, Row, rows

# What nodes put into a conditioning of pictures that the model fills in, goes on from or gives back changed. What only
# steers it, as a ControlNet's image does (control_video, pose_video_latent, clip_vision_output), is left out.
PICTURES = frozenset((
    "concat_image",
    "concat_latent_image",
    "context_latents",
    "minimax_keyframes",
    "minimax_refs",
    "reference_latents",
    "reference_motion",
    "stable_cascade_prior",
    "time_dim_concat",
    "vace_frames",
))  # fmt: skip
ENCODED = (  # what encoders put into a conditioning (text_encoders/*.py)
    "cross_attn",
    "pooled_output",
    "conditioning_llama3",
    "conditioning_mt5xl",
    "conditioning_byt5small",
    "conditioning_lyrics",
)
CONTAINERS = (list, tuple, Mapping)
NUMBERS = (torch.int64, torch.bool)  # of what ComfyUI draws with neither: tokens, places, which tokens count
# Objects of Impact Pack in which a node hands on what came to it, by the name of their class, and where they keep it
HELD = {
    "KSamplerAdvancedWrapper": ("params",),
    "PixelKSampleUpscaler": ("params",),
    "REGIONAL_PROMPT": ("mask", "sampler"),
}


def image_values(value: Any) -> Iterator[tuple[Kind, torch.Tensor]]:
    """Every image, latent and mask in a value: a batch each.

    ComfyUI tells them apart by form: a latent lies in a mapping under "samples", an image is b h w c, a mask has fewer
    dimensions. The frames of a video are images. What a text encoder made has a mask's form and is none: prompts are
    the same in many graphs. Of what a detector of Impact Pack found, its crop is an image, and its outline a mask. In
    objects that hold what came to another node, all of it is looked for.
    """
    waiting, seen = [value], {}  # what was seen is kept, as the place of what is gone is given to the next
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            if one.dtype not in NUMBERS:
                yield ("image" if one.ndim > 3 else "mask"), one
        elif isinstance(one, CONTAINERS) and id(one) not in seen:
            seen[id(one)] = one
            if is_segment(one):
                yield from _of_segment(one)
            elif isinstance(one, Mapping):
                samples: Any = one.get("samples")
                if isinstance(samples, torch.Tensor) or getattr(samples, "is_nested", False):
                    yield "latent", samples
                waiting.extend(item for key, item in one.items() if key not in ("samples", "noise_mask", *ENCODED))
            elif is_conditioning(one):
                waiting.append(one[1])
            else:
                waiting.extend(one)
        elif is_video(one):
            waiting.append(one.get_components().images)
        elif id(one) not in seen:
            seen[id(one)] = one
            waiting.extend(getattr(one, name, None) for name in HELD.get(type(one).__name__, ()))


def pictures(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[Row, ...]]:
    """The rows of every latent in a guider's conditionings that a model goes on from."""
    for entry in (entry for kind in conds.values() for entry in kind or ()):
        for name in PICTURES & entry.keys():
            for _, tensor in image_values(entry[name]):
                if tensor.ndim > 3:
                    yield rows(tensor, "latent")


def is_conditioning(value: Any) -> bool:
    """One entry of ComfyUI's CONDITIONING: a text encoder's output, b n c, and what belongs to it."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], Mapping)
    return pair and isinstance(value[0], torch.Tensor) and value[0].ndim == 3


def is_segment(value: Any) -> bool:
    """What a detector of Impact Pack found in one place: its SEG, a named tuple that holds arrays."""
    return isinstance(value, tuple) and {"cropped_image", "cropped_mask"} <= set(getattr(value, "_fields", ()))


def _of_segment(segment: Any) -> Iterator[tuple[Kind, torch.Tensor]]:
    kinds: tuple[tuple[Kind, Any], ...] = (("image", segment.cropped_image), ("mask", segment.cropped_mask))
    for kind, values in kinds:
        if isinstance(values, np.ndarray | torch.Tensor):
            yield kind, torch.as_tensor(values)


def is_video(value: Any) -> bool:
    """Of ComfyUI's own classes, without a file behind it: one of a file holds what no run of this prompt made."""
    return type(value).__name__ == "VideoFromComponents" and type(value).__module__.startswith("comfy_api.")
