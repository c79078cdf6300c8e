"""What a network is told beside x_t and time, made by the loaded model itself (BaseModel.extra_conds), for a batch.

Rows of which ComfyUI would put the conditionings into one batch go through the network together, the others apart, as
when it samples (comfy.samplers.calc_cond_batch). What neither text nor data set gives (a mask, a first frame) is what
ComfyUI takes where nothing is connected.
"""

from __future__ import annotations

from collections.abc import Iterator

import comfy.ldm.hunyuan_video.model
import comfy.ldm.modules.attention
import torch
from torch import Tensor

from ..training.model import Cond, Text

# As extra_conds calls Text.reference: ReferenceLatent's latents go behind the image's tokens (Flux Kontext, Qwen Image
# Edit, OmniGen2), InstructPixToPixConditioning's beside its channels (InstructPix2Pix, Flux Canny and Depth).
REFERENCE_NAMES = (REFERENCES := "reference_latents", "concat_latent_image")
SIZES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")  # as extra_conds calls Text.size


def batches(model, x: Tensor, cond: Cond, downscale: int, reference_name: str = "") -> Iterator[tuple[list[int], dict]]:
    """(rows, keyword arguments of BaseModel.apply_model for them) of a batch x_t (b c ...), each row once.

    ``reference_name``: one of REFERENCE_NAMES, where rows have reference images.
    """
    rows_of = zip(x.split(1), cond.rows, strict=True)
    asked = [_asked(model, one, row, downscale, reference_name) for one, row in rows_of]
    groups: list[list[int]] = []
    alone = isinstance(model.diffusion_model, comfy.ldm.hunyuan_video.model.HunyuanVideo)  # it takes one mask of a text
    for i, own in enumerate(asked):
        for group in groups:
            if not (alone and "attention_mask" in own) and _together(asked[group[0]], own):
                group.append(i)
                break
        else:
            groups.append([i])
    for rows in groups:
        first, *others = (asked[i] for i in rows)
        yield rows, {name: one.concat([other[name] for other in others]) for name, one in first.items()}


def wants_mask(model, x: Tensor, row: Text, downscale: int, reference_name: str) -> bool:
    """Whether a reference beside the channels of x (1 c ...) comes with a mask, which no data set has."""
    beside = _asked(model, x, row, downscale, reference_name).get("c_concat")
    return reference_name != REFERENCES and beside is not None and beside.cond.shape != x.shape


def transformer_options(sigmas: Tensor) -> dict:
    """What ComfyUI tells every network's blocks of an evaluation at sigmas (b), and PyTorch's own attention."""
    return {
        "cond_or_uncond": [0],
        "sigmas": sigmas,
        "sample_sigmas": torch.cat([sigmas[:1], torch.zeros_like(sigmas[:1])]),
        "optimized_attention_override": _sdpa,
    }


def _asked(model, x: Tensor, row: Text, downscale: int, reference_name: str) -> dict:
    """The conditioning of one row, by name (comfy.conds)."""
    pixels = [downscale * n for n in x.shape[-2:]]
    size = [*pixels, 0, 0, *pixels] if row.size is None else row.size.tolist()
    known = {
        "cross_attn": row.cross.to(x.device),
        "device": x.device,
        "noise": x,
        "latent_image": torch.zeros_like(x),
        "latent_shapes": [x.shape],
        "denoise_mask": None,
        "prompt_type": "positive",
        "seed": 0,
    }
    if row.reference is not None:
        reference = row.reference.to(x.device)
        known[reference_name] = [reference] if reference_name == REFERENCES else reference
    further = {name: part if part is None else part.to(x.device) for name, part in row.further.items()}
    found = model.extra_conds(**dict(zip(SIZES, size, strict=True)), **further, **known)
    return {name: one.process_cond(batch_size=1, area=None) for name, one in found.items()}


def _together(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].can_concat(other[name]) for name in one)


def _sdpa(function, *args, **kwargs):
    """PyTorch's own attention, whose backward keeps no n² scores (attention_pytorch)."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
