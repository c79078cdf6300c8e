"""A toy of any family with the CLIP and VAE that a trainer asks for: texts by their seed, latents by pooling."""

from __future__ import annotations

import importlib
import zlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from support.encoder_toys import ENCODERS, toy_clip
from support.families import Family, drawn, make

SIDE = 64  # of an image; of one for PixArt, which ComfyUI evaluates on nothing as small, 320
OF_TEXT = (  # what encoders put beside cross-attention rows; the rest of a toy's conditioning comes of other nodes
    "pooled_output",
    "attention_mask",
    "conditioning_llama3",
    "conditioning_mt5xl",
    "attention_mask_mt5xl",
    "conditioning_byt5small",
    "text_input_ids",
)


def side_of(family: Family) -> int:
    """Of an image that this family takes, in pixels."""
    return 320 if family.latent[-1] > SIDE // 4 else SIDE


def toy_parts(family: Family, dtype: torch.dtype = torch.float32) -> tuple:
    """(MODEL, CLIP, VAE), made in inference mode as ComfyUI 0.3.75 loads them."""
    with torch.inference_mode():
        model = make(family, dtype=dtype)
    form = model.model.latent_format
    if form.latent_channels != family.latent[0]:  # narrower than the family's own
        made = importlib.import_module("comfy.latent_formats").LatentFormat()
        made.latent_channels, made.latent_dimensions = family.latent[0], len(family.latent) - 1
        model.model.latent_format = made
    return model, _clip(family), _vae(family, getattr(model.model.latent_format, "latent_dimensions", 2))


def _clip(family: Family):
    """ComfyUI's CLIP with texts whose encodings are random, of lengths of their own where a family allows that."""
    from modular_lora_guard.comfy_host.trainer_model import TEXT_ENCODERS

    clip = toy_clip(ENCODERS["CLIP-L (SD1.x)"])
    streams = TEXT_ENCODERS.get(family.config, {"l"})

    class Tokenizer:
        def tokenize_with_weights(self, text, return_word_ids=False, **_):
            return {stream: [[(text, 1.0)]] for stream in streams}

    def encode(tokens, return_pooled=False, return_dict=False):
        text = next(iter(tokens.values()))[0][0][0]
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        found = {"cond": torch.randn(1, *family.context, generator=generator), "pooled_output": None}
        found |= {name: drawn(family.cond[name], generator) for name in OF_TEXT if name in family.cond}
        if "text_input_ids" in found:
            found["text_input_ids"] = found["text_input_ids"].clone()
            found["text_input_ids"][:, 0] += zlib.crc32(text.encode()) % 100  # another text, other tokens
        return found

    clip.tokenizer, clip.encode_from_tokens = Tokenizer(), encode
    return clip


def _vae(family: Family, dimensions: int):
    whole = side_of(family) == SIDE or family.latent[0] == 3  # latents of the toy's own size; pixels are latents, too
    ratio = side_of(family) // family.latent[-1] if whole else 8
    mix = torch.randn(family.latent[0], 3, generator=torch.Generator().manual_seed(3))
    cpu = torch.device("cpu")

    def encode(pixels):
        small = F.avg_pool2d(pixels.movedim(-1, 1), ratio)  # t 3 h w, t 1 of an image
        latents = torch.einsum("dc,bchw->bdhw", mix, small * 2 - 1)
        if dimensions == 2:
            return latents
        first, rest = latents[:1], latents[1:].unflatten(0, (-1, 4)).mean(1)  # a frame, then four at a time
        return torch.cat([first, rest]).movedim(0, 1)[None]

    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher(torch.nn.Linear(1, 1), cpu, cpu)
    times = (lambda n: (n + 3) // 4, lambda k: 4 * k - 3)
    ratios = (ratio, ratio) if dimensions == 2 else [(time, ratio, ratio) for time in times]
    return SimpleNamespace(
        patcher=patcher,
        encode=encode,
        spacial_compression_encode=lambda: ratio,
        downscale_ratio=ratios[0],
        upscale_ratio=ratios[1],
    )
