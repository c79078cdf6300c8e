"""CLIP-L with three of its twelve layers, which took half of a graph's time; ComfyUI has an option for it."""

from __future__ import annotations

import functools
import importlib

LAYERS = 3  # SDXL takes what the last but one says


def shorten() -> None:
    """Every CLIP-L that ComfyUI makes in this process from now on has LAYERS layers."""
    model = importlib.import_module("comfy.sd1_clip").SDClipModel
    whole = model.__init__

    @functools.wraps(whole)
    def shorter(self, *args, model_options: dict = {}, **rest) -> None:  # noqa: B006 - ComfyUI's own default
        whole(
            self,
            *args,
            model_options={"clip_l_model_config": {"num_hidden_layers": LAYERS}} | model_options,
            **rest,
        )

    model.__init__ = shorter
