"""The diffusion models of ComfyUI at toy size: how each is built by ComfyUI's own classes, and what it is asked with.

The tables are in families_image.py, families_dit.py and families_video.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import torch
from torch import nn

GENERIC = "diffusion_model."  # ComfyUI's own names, which every family has


@dataclass(frozen=True)
class Noise:
    """A random tensor of this shape."""

    shape: tuple[int, ...]


class Entries(dict):
    """Stays a dict; see drawn()."""


ONES = torch.ones(1, 12, dtype=torch.long)  # attention mask of 12 tokens
REFERENCE = {"reference_latents": [Noise((1, 16, 8, 8))]}


@dataclass(frozen=True)
class Family:
    """One diffusion model."""

    name: str  # row of the table
    config: str  # class in comfy.supported_models
    unet: dict  # what comfy.model_detection would read off a checkpoint
    latent: tuple  # channels, [frames,] height, width; of several latents in one a tuple of these
    context: tuple[int, int]  # tokens, width
    cond: dict = field(default_factory=dict)  # further conditioning; see drawn()
    names: tuple[str, ...] = ("lora_unet_",)  # how the family's LoRA files name layers, besides GENERIC
    state: Callable[[], dict] = dict  # weights that the class asks for when it is made
    variants: dict[str, dict] = field(default_factory=dict)  # row of the table -> other conditioning of the same model
    bare: tuple[str, ...] = ()  # patterns of the layers that take no branch
    on_meta: bool = True  # whether its class can be made without memory for weights
    cfg: float = 2.0  # 1: no negative prompt, where ComfyUI cannot put the two in one batch


PARAMETERS = {  # dataclasses of what a class is made with, to which newer versions add
    "flux": "flux.model.FluxParams",
    "flux2": "flux.model.FluxParams",
    "chroma": "chroma.model.ChromaParams",
    "chroma_radiance": "chroma_radiance.model.ChromaRadianceParams",
    "hunyuan_video": "hunyuan_video.model.HunyuanVideoParams",
}
NEWER = {
    "txt_ids_dims": [],
    "vec_in_dim": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
    "meanflow_sum": False,
}


def newer(unet: dict) -> dict:
    """What the installed version asks for beside ``unet`` (0.33.0)."""
    if (where := PARAMETERS.get(unet.get("image_model"))) is None:
        return {}
    module, _, name = where.rpartition(".")
    asked = {f.name for f in fields(getattr(importlib.import_module(f"comfy.ldm.{module}"), name))}
    return {k: v for k, v in NEWER.items() if k in asked and k not in unet}


def make(family: Family, filled: bool = True, dtype: torch.dtype = torch.float32):
    """A ModelPatcher of the family, made by ComfyUI's own classes; not ``filled``: shapes only."""
    from comfy import model_patcher, supported_models

    config = getattr(supported_models, family.config)(dict(family.unet))
    config.unet_config.update(family.unet | newer(family.unet))
    config.set_inference_dtype(dtype, None)
    with torch.no_grad():
        model = config.get_model(family.state(), "", device="meta" if family.on_meta and not filled else None)
    if filled:
        fill(model)
    cpu = torch.device("cpu")
    return model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def fill(model: nn.Module) -> None:
    """Seeded random weights of the size that keeps activations near 1, and what else a checkpoint brings."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        random = torch.randn(p.shape, generator=generator)
        gain = p.dim() < 2 and name.endswith(("weight", "scale", "gamma"))  # of a norm
        fan_in = p[0].numel() if p.dim() > 1 else 400
        p.data = (1 + random / 20 if gain else random / fan_in**0.5).to(p.dtype)
    buffers = dict(model.diffusion_model.named_buffers())
    for name in buffers.keys() & model.diffusion_model.state_dict().keys():
        if buffers[name].is_floating_point():
            buffers[name].data = torch.randn(buffers[name].shape, generator=generator)


def drawn(value, generator: torch.Generator):
    """``value`` with every Noise in it drawn; a dict stands for an object with these attributes, Entries for a dict."""
    if isinstance(value, Noise):
        return torch.randn(value.shape, generator=generator)
    if isinstance(value, list):
        return [drawn(v, generator) for v in value]
    if isinstance(value, Entries):
        return {k: drawn(v, generator) for k, v in value.items()}
    if isinstance(value, dict):
        return SimpleNamespace(**{k: drawn(v, generator) for k, v in value.items()})
    return value


def evaluate(patcher, family: Family, cond: dict) -> torch.Tensor:
    """One step of euler, or of ``cond["sampler"]``, with both prompts, through the function that KSampler calls."""
    from comfy.sample import sample_custom
    from comfy.samplers import ksampler

    generator = torch.Generator().manual_seed(1)
    further = {k: drawn(v, generator) for k, v in cond.items() if k != "sampler"}
    positive, negative = ([[torch.randn(1, *family.context, generator=generator), further]] for _ in range(2))
    noise, start = latents(family, generator)
    sigmas = torch.tensor([float(patcher.model.model_sampling.percent_to_sigma(0.5)), 0.0])
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        made = sample_custom(
            patcher,
            noise,
            family.cfg,
            ksampler(cond.get("sampler", "euler")),
            sigmas,
            positive,
            negative,
            start,
            disable_pbar=True,
            seed=0,
        )
    return torch.cat([one.flatten() for one in made.unbind()]) if getattr(made, "is_nested", False) else made


def latents(family: Family, generator: torch.Generator) -> tuple:
    """Noise and an empty latent; several in one where the family samples several at once (0.33.0)."""
    if not isinstance(family.latent[0], tuple):
        noise = torch.randn(1, *family.latent, generator=generator)
        return noise, torch.zeros_like(noise)
    from comfy.nested_tensor import NestedTensor

    noise = [torch.randn(1, *shape, generator=generator) for shape in family.latent]
    return NestedTensor(noise), NestedTensor([torch.zeros_like(one) for one in noise])


def named(info, prefix: str, sliced: bool) -> dict:
    """A name under ``prefix`` for every matrix or kernel that takes a branch: name -> LayerSpec of what it changes.

    ``sliced``: where core names slices of a weight (q, k and v of one fused weight), they stand instead of the whole.
    ``prefix`` "" means the bare paths of the layers.
    """
    whole, slices = {}, {}
    for name, entry in info.key_map.items():
        key, offset = (entry, None) if isinstance(entry, str) else entry[:2]
        spec = info.specs.get(key)
        known = GENERIC + name in info.key_map if prefix == "" else name.startswith(prefix)
        if spec is None or spec.problem or len(spec.weight_shape) < 2 or not known:
            continue
        if offset is None:
            whole.setdefault(key, (name, spec))
        else:
            shape = list(spec.weight_shape)
            shape[offset[0]] = offset[2]
            slices.setdefault(key, {}).setdefault(offset, (name, replace(spec, weight_shape=tuple(shape))))
    first, second = (slices, whole) if sliced else (whole, slices)
    chosen = second | first
    return dict(pair for found in chosen.values() for pair in (found.values() if isinstance(found, dict) else [found]))
