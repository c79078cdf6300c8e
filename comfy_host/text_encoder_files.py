"""Text encoders from files of their own, as ComfyUI's CLIP loaders take them, for commands without a whole checkpoint.

ComfyUI makes text encoders of any files: where one is missing or of something else, what was in memory stands for its
weights, and a line of the log says so. Here every weight that a text needs must have come of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
from torch import nn

from ..modular_lora.errors import GuardError
from . import introspection

UNREAD = re.compile(r"text_projection|logit_scale|visual|vision|multi_modal|lm_head")  # a text does without, or has 1
UNTOLD = "stable_diffusion"  # what ComfyUI takes where no type is given


def load(files: Sequence[Path], clip_type: str, model):
    """ComfyUI's CLIP of these files.

    Args:
        files: One for each encoder.
        clip_type: What they are for, by ComfyUI's name (comfy.sd.CLIPType); "": as the files tell, where that gives
            the tokenizer that ``model`` asks for.
        model: The MODEL that they are for.

    Raises:
        GuardError: No such type, one is needed, or an encoder's weights are in none of the files.
    """
    kinds = {kind.name.lower(): kind for kind in comfy.sd.CLIPType}
    if clip_type and clip_type not in kinds:
        raise GuardError(f"--clip_type {clip_type!r}: ComfyUI knows {', '.join(kinds)}.", code="train.clip-type")
    with _loaded() as lacking:
        clip = comfy.sd.load_clip([str(file) for file in files], clip_type=kinds[clip_type or UNTOLD])
    if not clip_type:
        _check_told(model, clip)
    for encoder in clip.cond_stage_model.modules():
        if not isinstance(encoder, comfy.sd1_clip.SDClipModel):
            continue
        names = lacking.get(encoder, list(encoder.transformer.state_dict()))
        if without := [name for name in names if not UNREAD.search(name)]:
            raise GuardError(
                f"--text_encoder {', '.join(file.name for file in files)}: {len(without)} weights of a "
                f"{type(clip.cond_stage_model).__name__} are in none of these files, first {without[0]!r}: give a "
                "whole file for each of its encoders, and with --clip_type what they are for.",
                code="train.text-encoder-files",
            )
    return clip


@contextmanager
def _loaded() -> Iterator[dict[nn.Module, list[str]]]:
    """The encoders that are loaded from a file, and the weights that are not in it."""
    kind, lacking = comfy.sd1_clip.SDClipModel, {}
    original = kind.load_sd

    def load_sd(self, sd):
        found = original(self, sd)
        lacking[self] = list(found[0])
        return found

    kind.load_sd = load_sd
    try:
        yield lacking
    finally:
        kind.load_sd = original


def _check_told(model, clip) -> None:
    """GuardError where the files alone did not give the tokenizer that the model's family has in a whole checkpoint."""
    wanted = model.model.model_config.clip_target({})
    if wanted is None or type(clip.tokenizer) is not wanted.tokenizer:
        raise GuardError(
            f"--text_encoder: the files alone do not tell that they are for a {introspection.family(model)} (ComfyUI "
            f"makes {type(clip.tokenizer).__name__} of them): say with --clip_type what they are for, as ComfyUI's "
            "CLIP loaders call it.",
            code="train.clip-type",
        )
