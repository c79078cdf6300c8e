"""Every text encoder that ComfyUI knows, at toy width and depth: its own classes and options, random weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 3, "vocab_size": 1024}
BERT = {**CLIP, "vocab_size": 1024}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}
DEEP = {**LLAMA, "num_hidden_layers": 36}  # where layers far up are asked for
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_layers": 2}  # no option of ComfyUI's
WIDE = {"d_model": 4096}  # what SD3 and HiDream pad their CLIP halves to, fixed in ComfyUI
VISION_3 = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "depth": 2, "deepstack_visual_indexes": (0,)}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
PROMPT = [872, 198, *range(5, 27), 1]  # starts as a chat turn does, after which ComfyUI's Qwen encoders cut


@dataclass(frozen=True)
class Encoder:
    """One CLIP of ComfyUI: where its class is, options that shrink it, and the token streams that it asks for."""

    module: str
    made: str  # a class, or a function of ``options`` that makes one
    streams: tuple[str, ...]
    sizes: dict[str, dict]  # name of an encoder -> entries of its configuration
    options: dict | None = None


def _sd3(**parts: bool) -> Encoder:
    sizes = {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": {**T5, **WIDE}}
    return Encoder("text_encoders.sd3_clip", "sd3_clip", ("l", "g", "t5xxl"), sizes, parts)


def _hidream(**parts: bool) -> Encoder:
    sizes = {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": {**T5, **WIDE}, "llama": LLAMA}
    return Encoder("text_encoders.hidream", "hidream_clip", ("l", "g", "t5xxl", "llama"), sizes, parts)


def _t5(module: str, made: str, stream: str = "t5xxl", options: dict | None = None) -> Encoder:
    return Encoder(f"text_encoders.{module}", made, (stream,), {stream: T5}, options)


def _llama(module: str, made: str, stream: str, **options) -> Encoder:
    return Encoder(f"text_encoders.{module}", made, (stream,), {stream: LLAMA}, options)


ENCODERS = {
    "CLIP-L (SD1.x)": Encoder("sd1_clip", "SD1ClipModel", ("l",), {"clip_l": CLIP}),
    "CLIP-H (SD2.x)": Encoder("text_encoders.sd2_clip", "SD2ClipModel", ("h",), {"clip_h": CLIP}),
    "CLIP-L and CLIP-G (SDXL)": Encoder("sdxl_clip", "SDXLClipModel", ("l", "g"), {"clip_l": CLIP, "clip_g": CLIP}),
    "CLIP-G (SDXL refiner)": Encoder("sdxl_clip", "SDXLRefinerClipModel", ("g",), {"clip_g": CLIP}),
    "CLIP-G (Stable Cascade)": Encoder("sdxl_clip", "StableCascadeClipModel", ("g",), {"clip_g": CLIP}),
    "CLIP-L, CLIP-G and T5-XXL (SD3)": _sd3(),
    "CLIP-L and CLIP-G (SD3 without T5)": _sd3(t5=False),
    "T5-XXL (SD3 alone)": _sd3(clip_l=False, clip_g=False),
    "CLIP-L and T5-XXL (Flux)": Encoder(
        "text_encoders.flux", "flux_clip", ("l", "t5xxl"), {"clip_l": CLIP, "t5xxl": T5}, {}
    ),
    "Mistral 3 24B (Flux 2)": Encoder(
        "text_encoders.flux",
        "flux2_te",
        ("mistral3_24b",),
        {"mistral3_24b": {**LLAMA, "num_hidden_layers": 30}},
        {"pruned": True},
    ),
    "T5-XXL (PixArt, Chroma)": _t5("pixart_t5", "pixart_te", options={}),
    "T5-XXL (Mochi)": _t5("genmo", "mochi_te", options={}),
    "T5-XXL (LTX-Video)": _t5("lt", "ltxv_te", options={}),
    "old T5-XXL (Cosmos)": _t5("cosmos", "te", options={}),
    "Pile T5-XL (AuraFlow)": _t5("aura_t5", "AuraT5Model", "pile_t5xl"),
    "UMT5-XXL (Wan)": _t5("wan", "te", "umt5xxl", {}),
    "T5 base (Stable Audio)": _t5("sa_t5", "SAT5Model", "t5base"),
    "UMT5 base (ACE-Step)": Encoder("text_encoders.ace", "AceT5Model", ("umt5base", "lyrics"), {"": T5}),
    "BERT and mT5-XL (HunyuanDiT)": Encoder(
        "text_encoders.hydit", "HyditModel", ("hydit_clip", "mt5xl"), {"hydit_clip": BERT, "mt5xl": T5}
    ),
    "CLIP-L and Llama 3 8B (Hunyuan Video)": Encoder(
        "text_encoders.hunyuan_video", "hunyuan_video_clip", ("l", "llama"), {"clip_l": CLIP, "llama": LLAMA}, {}
    ),
    "Qwen2.5-VL and ByT5 (Hunyuan Image, Hunyuan Video 1.5)": Encoder(
        "text_encoders.hunyuan_image", "te", ("qwen25_7b", "byt5"), {"qwen25_7b": LLAMA, "": T5}, {}
    ),
    "Gemma 2 2B (Lumina 2)": _llama("lumina2", "te", "gemma2_2b"),
    "Gemma 3 4B (Lumina 2)": _llama("lumina2", "te", "gemma3_4b", model_type="gemma3_4b"),
    "Qwen3 4B (Z-Image)": _llama("z_image", "te", "qwen3_4b"),
    "Qwen2.5 3B (OmniGen 2)": _llama("omnigen2", "te", "qwen25_3b"),
    "Qwen2.5-VL 7B (Qwen-Image)": _llama("qwen_image", "te", "qwen25_7b"),
    "CLIP-L, CLIP-G, T5-XXL and Llama 3 8B (HiDream)": _hidream(),
    "CLIP-L and CLIP-G (HiDream without T5 and Llama)": _hidream(t5=False, llama=False),
    "Llama 3 8B (HiDream alone)": _hidream(clip_l=False, clip_g=False, t5=False),
    # of 0.33.0
    "Qwen3 0.6B (Anima)": Encoder("text_encoders.anima", "te", ("qwen3_06b", "t5xxl"), {"qwen3_06b": LLAMA}, {}),
    "Qwen2.5-VL 7B and CLIP-L (Kandinsky 5)": Encoder(
        "text_encoders.kandinsky5", "te", ("qwen25_7b", "l"), {"qwen25_7b": LLAMA, "clip_l": CLIP}, {}
    ),
    "Ministral 3 3B (Ernie Image)": _llama("ernie", "te", "ministral3_3b"),
    "T5-XXL (CogVideoX)": _t5("cogvideo", "cogvideo_te", options={}),
    "Qwen3 4B (Flux 2 Klein)": Encoder(
        "text_encoders.flux", "klein_te", ("qwen3_4b",), {"qwen3_4b": {**LLAMA, "num_hidden_layers": 28}}, {}
    ),
    "Qwen2.5-VL 7B (LongCat Image)": _llama("longcat_image", "te", "qwen25_7b"),
    "Gemma 2 2B (PixelDiT)": _llama("pixeldit", "pixeldit_te", "gemma2_2b"),
    "Qwen3 2B (Ovis)": _llama("ovis", "te", "qwen3_2b"),
    "Qwen3-VL 4B (Krea 2)": Encoder("text_encoders.krea2", "te", ("qwen3vl_4b",), {"qwen3vl_4b": DEEP}, {}),
    "Qwen3-VL 4B (Mage Flow)": _llama("mage_flow", "te", "qwen3vl_4b"),
    "Gemma 3 12B (LTX Video with sound)": Encoder(
        "text_encoders.lt", "ltxav_te", ("gemma3_12b",), {"gemma3_12b": LLAMA, "": LLAMA}, {}
    ),
    "Jina CLIP 2": Encoder(
        "text_encoders.jina_clip_2",
        "JinaClip2TextModelWrapper",
        ("jina_clip_2",),
        {"jina_clip_2": {**CLIP, "vocab_size": 1024}},
    ),
    "Qwen3-VL 8B (Boogu)": _llama("boogu", "te", "qwen3vl_8b"),
    "Qwen3-VL 8B (Ideogram 4)": Encoder(
        "text_encoders.ideogram4", "te_qwen3vl", ("qwen3vl_8b",), {"qwen3vl_8b": DEEP}, {}
    ),
}


def known(encoder: Encoder):
    """The class or function that makes the encoder, or None where this ComfyUI has none."""
    try:
        return getattr(importlib.import_module(f"comfy.{encoder.module}"), encoder.made, None)
    except ModuleNotFoundError:
        return None


def toy_clip(encoder: Encoder):
    """ComfyUI's CLIP around the encoder, made by its own constructor in fp32; the tokenizer is left out."""
    from comfy import sd

    if (made := known(encoder)) is None:
        pytest.skip(f"this ComfyUI has no {encoder.module}.{encoder.made}")
    model_options = {f"{name}_model_config": sizes for name, sizes in encoder.sizes.items()}
    made = made if encoder.options is None else made(**encoder.options)
    target = SimpleNamespace(params={}, clip=made, tokenizer=lambda **_: None)
    with small_eyes():
        clip = sd.CLIP(target, model_options={"dtype": torch.float32, **model_options})
    randomise(clip.cond_stage_model)
    return clip


@contextmanager
def small_eyes() -> Iterator[None]:
    """The parts that see images at toy size, for which ComfyUI has no options."""
    from comfy.text_encoders import llama, qwen_vl

    vision = qwen_vl.Qwen2VLVisionTransformer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", lambda **sizes: vision(**(sizes | VISION)))
        with suppress(ModuleNotFoundError):  # 0.33.0
            qwen3vl = importlib.import_module("comfy.text_encoders.qwen3vl")
            small = llama.GEMMA3_VISION_CONFIG | SIGLIP
            patch.setattr(llama.Gemma3_12B_Config, "vision_config", small)
            patch.setattr(qwen3vl, "QWEN3VL_VISION", dict.fromkeys(qwen3vl.QWEN3VL_VISION, VISION_3))
        yield


def randomise(module: torch.nn.Module) -> None:
    """Weights by fan-in, norms about one, so that signals neither die nor blow up in any depth."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in module.named_parameters():
        random = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            scale = 1.0 if id(p) in tables else p[0].numel() ** -0.5
            p.data = random * scale
        elif p.dim() == 1:
            p.data = random * 0.1 + ("norm" in name.lower() and name.endswith("weight"))


def tokens(encoder: Encoder, weight: float = 1.0) -> dict[str, list]:
    """One prompt as ComfyUI's tokenizers give it: (id, weight) of every token, in every stream that is asked."""
    width = {"l": 77, "g": 77, "h": 77}
    return {
        s: [[(t, weight if 9 < t < 15 else 1.0) for t in (PROMPT + [0] * 77)[: width.get(s, 25)]]]
        for s in encoder.streams
    }


def save_text_lora(path: Path, layers: dict, rank: int, seed: int, size: float = 0.2) -> None:
    """Random factors on ``layers`` (name -> LayerSpec); kohya's tensor names under kohya's layer names, else PEFT's."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, spec in layers.items():
        out, fan_in = spec.weight_shape
        kohya = name.startswith("lora_")
        down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        tensors[f"{name}.{down}.weight"] = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
        tensors[f"{name}.{up}.weight"] = torch.randn(out, rank, generator=generator) * size / rank**0.5
        if kohya:
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def save_norms(path: Path, layers: dict, size: float = 0.3) -> None:
    """Random changes of norms (name -> LayerSpec) under LyCORIS' names."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.w_norm": torch.randn(spec.weight_shape, generator=generator) for name, spec in layers.items()}
    tensors |= {f"{n}.b_norm": torch.randn(s.weight_shape, generator=generator) for n, s in layers.items() if s.bias}
    save_file({name: tensor * size for name, tensor in tensors.items()}, path)
