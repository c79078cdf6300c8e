"""The demo world at a fraction of its size, for tests that ask nothing of what it has learnt.

CLIP-L has three of its twelve layers, by an option of ComfyUI's, and the U-Net a fifth of its channels, which ComfyUI
takes for SD1.5 once the class of that name does not ask for 320. Both hold random weights; the VAE is the world's own.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = 3  # SDXL takes what the last but one says
CHANNELS, FEWER = 320, 64
UNET = "model.diffusion_model."
CALM = 0.3  # of what the U-Net answers: rounding errors stay below one level of an image, what a LoRA does far above


def accept() -> None:
    """Every CLIP-L that ComfyUI makes in this process from now on has LAYERS layers, and SD1.5 may have any width."""
    model = importlib.import_module("comfy.sd1_clip").SDClipModel
    whole = model.__init__

    @functools.wraps(whole)
    def shorter(self, *args, model_options: dict = {}, **rest) -> None:  # noqa: B006 - ComfyUI's own default
        sizes = {"num_hidden_layers": LAYERS} | model_options.get("clip_l_model_config", {})
        whole(self, *args, model_options=model_options | {"clip_l_model_config": sizes}, **rest)

    model.__init__ = shorter
    importlib.import_module("comfy.supported_models").SD15.unet_config.pop("model_channels", None)


def write(world: Path, path: Path, narrow: bool = True) -> None:
    """The demo world's file with a random text encoder: its own is a lookup table whose layers take no LoRA.

    ``narrow``: with a random U-Net of FEWER channels, too.
    """
    generator, tensors = torch.Generator().manual_seed(0), load_file(world)
    for name, tensor in list(tensors.items()):
        layer = re.search(r"^cond_stage_model\..*\.encoder\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= LAYERS:
            del tensors[name]
        elif layer and tensor.is_floating_point():
            size = 0.03 if tensor.dim() > 1 else 0.0
            tensors[name] = _random(name, tensor.shape, size, 0.0, generator)
        elif narrow and name.startswith(UNET):
            shape = torch.Size(n * FEWER // CHANNELS if n % CHANNELS == 0 else n for n in tensor.shape)
            size = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.05
            size *= CALM if name.startswith(f"{UNET}out.") else 1.0
            tensors[name] = _random(name, shape, size, 0.05, generator)
    save_file(tensors, path)


def _random(name: str, shape: torch.Size, size: float, gain: float, generator: torch.Generator) -> Tensor:
    """Random numbers of this size; those of a norm's weight lie around 1, as far off as ``gain``."""
    drawn = torch.randn(shape, generator=generator)
    norm = len(shape) == 1 and name.endswith("weight")
    return (1 + drawn * gain if norm else drawn * size).half()
