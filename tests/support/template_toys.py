"""What ComfyUI's templates load besides a checkpoint, at toy size.

VAEs, ControlNets, upscale models and GLIGEN are small files that ComfyUI's own loaders read. In the place of the
loaders of a diffusion model or text encoder by itself stand classes with the same inputs, which give what a toy has
of that kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.encoder_toys import ENCODERS, randomise, toy_clip
from support.families import make, named
from support.families_image import U_NETS
from support.families_video import VIDEOS
from support.graphs import save_lora

FILE = "toy.safetensors"
TEXT = 768  # width of the demo world's text
FOLDERS = ("vae", "controlnet", "upscale_models", "gligen")
MODELS = ("UNETLoader",)
CLIPS = ("CLIPLoader", "DualCLIPLoader", "QuadrupleCLIPLoader")
CHECKPOINT, IMAGE_CHECKPOINT, VISION = "CheckpointLoaderSimple", "ImageOnlyCheckpointLoader", "CLIPVisionLoader"
STYLE, HEARING, PATCH = "StyleModelLoader", "AudioEncoderLoader", "ModelPatchLoader"
VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 1024,
}
OTHERS = {  # family -> a LoRA for it
    "LotusD": "lotus_safety.safetensors",
    "SVD_img2vid": "svd_safety.safetensors",
    "LTXV": "ltxv_safety.safetensors",
}


@contextmanager
def files(comfy, model) -> Iterator[None]:
    """The files in ComfyUI's folders, for the demo world's ``model``."""
    paths = comfy.folder_paths.folder_names_and_paths
    before = {name: paths[name] for name in FOLDERS}
    made = (_vae(comfy), _control_network(model), _upscale_model(), _gligen(model))
    for name, tensors in zip(FOLDERS, made, strict=True):
        folder = comfy.base / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILE)
        paths[name] = ([str(folder)], {".safetensors"})
    yield
    paths.update(before)


def _vae(comfy) -> dict[str, torch.Tensor]:
    """The checkpoint's own."""
    prefix = "first_stage_model."
    tensors = load_file(comfy.base / "models" / "checkpoints" / "world.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _control_network(model) -> dict[str, torch.Tensor]:
    from comfy import ops
    from comfy.cldm import cldm

    left = ("out_channels", "disable_unet_model_creation")
    settings = {key: value for key, value in model.model.model_config.unet_config.items() if key not in left}
    network = cldm.ControlNet(**settings, hint_channels=3, operations=ops.manual_cast)
    randomise(network)
    return network.state_dict()


def _upscale_model() -> dict[str, torch.Tensor]:
    from spandrel.architectures.ESRGAN import ESRGAN

    network = ESRGAN(num_filters=8, num_blocks=1, scale=2)
    randomise(network)
    return network.state_dict()


def _gligen(model) -> dict[str, torch.Tensor]:
    from comfy import gligen
    from comfy.ldm.modules.attention import BasicTransformerBlock

    made = {}
    for name, block in model.model.diffusion_model.named_modules():
        if isinstance(block, BasicTransformerBlock):
            fuser = gligen.GatedSelfAttentionDense(
                block.attn1.to_q.in_features, TEXT, 8, block.attn1.to_q.in_features // 8
            )
            randomise(fuser)
            made |= {f"{name}.fuser.{key}": value for key, value in fuser.state_dict().items()}
    place = gligen.PositionNet(TEXT, TEXT)
    randomise(place)
    return made | {f"position_net.{key}": value for key, value in place.state_dict().items()}


def vision(folder: Path) -> Any:
    """A model of CLIP vision of two layers, whose embedding is as wide as Stable Video Diffusion asks for."""
    from comfy.clip_vision import ClipVisionModel

    config = folder / "vision.json"
    config.write_text(json.dumps(VISION_CONFIG), encoding="utf-8")
    made = ClipVisionModel(config)
    randomise(made.model)
    return made


def style() -> Any:
    """Redux's model between CLIP vision and a text of the demo world's width."""
    from comfy.ldm.flux.redux import ReduxImageEncoder
    from comfy.sd import StyleModel

    network = ReduxImageEncoder(VISION_CONFIG["hidden_size"], TEXT)
    randomise(network)
    return StyleModel(network)


class Hearing:
    """An audio encoder that hears noise: in Whisper's layers and width, fifty times a second."""

    def encode_audio(self, waveform: torch.Tensor, sample_rate: int) -> dict:
        shape = (1, waveform.shape[-1] * 50 // sample_rate, 1280)
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(shape, generator=generator) for _ in range(33)]
        return {
            "encoded_audio": layers[-1],
            "encoded_audio_all_layers": layers,
            "audio_samples": waveform.shape[-1],
        }


class ControlPatch(torch.nn.Module):
    """What a patch of Qwen Image's blocks has beside its layers, which no other model calls."""

    additional_in_dim = 0

    def process_input_latent_image(self, latent: torch.Tensor) -> torch.Tensor:
        return latent


def patch() -> Any:
    """A model patch, as its loader gives it."""
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    return ModelPatcher(ControlPatch(), load_device=cpu, offload_device=cpu)


def flux_clip() -> Any:
    """CLIP-L and a T5 of the demo world's text's width, with their own tokenizers."""
    from comfy.text_encoders.flux import FluxTokenizer

    return _with_t5("CLIP-L and T5-XXL (Flux)", FluxTokenizer())


def ltx_clip() -> Any:
    """LTX Video's T5, of that width too, with its tokenizer."""
    from comfy.text_encoders.lt import LTXVT5Tokenizer

    return _with_t5("T5-XXL (LTX-Video)", LTXVT5Tokenizer())


def _with_t5(name: str, tokenizer: Any) -> Any:
    encoder = ENCODERS[name]
    t5 = {**encoder.sizes["t5xxl"], "d_model": TEXT, "vocab_size": 32128}
    clip = toy_clip(replace(encoder, sizes={**encoder.sizes, "t5xxl": t5}))
    clip.tokenizer = tokenizer
    return clip


def write_film(to: Path, frames: int, side: int) -> None:
    """A film of noise."""
    import av

    generator = np.random.default_rng(1)
    with av.open(str(to), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = side
        for _ in range(frames):
            pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        file.mux(stream.encode())


def other(comfy, family: str) -> Any:
    """A toy of a family that some templates load beside, or in place of, the model that makes the image; its LoRA."""
    one = next(one for one in (*U_NETS, *VIDEOS) if one.config == family)
    if family == "LTXV":  # as wide as its latents and the demo world's text
        one = replace(one, unet={**one.unet, "in_channels": 128, "caption_channels": TEXT})
    model = make(one)
    layers = named(comfy.anatomy.model_info(model), "lora_unet_", sliced=False)
    save_lora(comfy.loras / OTHERS[family], layers, 4, 5, size=0.3)
    return model


def is_lotus(inputs: dict) -> bool:
    """Whether a loader is asked for the model that makes a picture of depth."""
    return "lotus" in inputs.get("unet_name", "")


def stand_in(real: type, made: Callable[[dict], tuple]) -> type:
    """A class with a loader's inputs, which gives what ``made`` makes of their values."""
    inputs = {
        part: {name: ("STRING", {}) for name in said}
        for part, said in real.INPUT_TYPES().items()
        if part in ("required", "optional")
    }
    members = {"INPUT_TYPES": classmethod(lambda cls: inputs), "RETURN_TYPES": real.RETURN_TYPES}
    return type(real.__name__, (), members | {"FUNCTION": "run", "CATEGORY": "test", "run": lambda self, **v: made(v)})
