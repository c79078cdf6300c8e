"""Nodes that call ComfyUI as other packs' do: loaders of LoRAs and checkpoints, pipes, samplers, a ControlNet."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch

SEED, STEPS, CFG = 1, 2, 2.0


def _node(run, *returns: str, **inputs) -> type:
    """A node class around a function of its inputs."""
    required = {name: kind if isinstance(kind, tuple) else (kind,) for name, kind in inputs.items()}
    members = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": required}),
        "RETURN_TYPES": returns,
        "FUNCTION": "run",
        "CATEGORY": "test",
        "run": lambda self, **given: run(**given),
    }
    return type("PackNode", (), members)


def _async_node(run, *returns: str, **inputs) -> type:
    """The same around a coroutine."""

    async def execute(self, **given):
        return await run(**given)

    made = _node(run, *returns, **inputs)
    made.run = execute
    return made


def _file(name: str) -> dict:
    import comfy.utils
    import folder_paths

    return comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)


def _parsed(said: str) -> list[tuple[str, float]]:
    return [(name.strip(), float(strength)) for name, strength in (one.split(":") for one in said.split(","))]


def power_loader(model, clip, loras: str):
    """Several LoRAs on one node, as rgthree's Power Lora Loader and the stacks of Comfyroll and Easy-Use."""
    from comfy.sd import load_lora_for_models

    for name, strength in _parsed(loras):
        model, clip = load_lora_for_models(model, clip, _file(name), strength, strength)
    return model, clip


def block_loader(model, clip, lora_name: str, first: float, others: float):
    """One call of add_patches for every key, each with a strength of its own, as Inspire's block weights."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
    loaded = comfy.lora.load_lora(_file(lora_name), keys)
    model, clip = model.clone(), clip.clone()
    for i, (key, value) in enumerate(loaded.items()):
        strength = first if i % 2 == 0 else others
        model.add_patches({key: value}, strength)
        clip.add_patches({key: value}, strength)
    return model, clip


def scaling_loader(model, lora_name: str, factor: float):
    """A loader that multiplies the strength into the values."""
    from comfy.sd import load_lora_for_models

    scaled = {key: value * factor if "lora_up" in key else value for key, value in _file(lora_name).items()}
    return (load_lora_for_models(model, None, scaled, 1.0, 0.0)[0],)


def one_node(model, clip, vae, text: str, tiled: bool):
    """A node that encodes, samples and decodes by itself, as detailers and upscalers do."""
    import comfy.sample

    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(said)) for said in (text, "")]
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, SEED, None)
    made = comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", *conds, latent, denoise=1.0, seed=SEED)
    return (vae.decode_tiled(made, tile_x=8, tile_y=8, overlap=2) if tiled else vae.decode(made),)


def idle_first(model, positive, negative, noise: float):
    """Samples with a sampler that does nothing, as RES4LYF does to load the model, and then in earnest."""
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(1, 4, 8, 8)
    given = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED)) * noise
    idle = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **_: x)
    comfy.sample.sample_custom(model, given, CFG, idle, torch.linspace(1, 0, 4), negative, negative, latent)
    start, conds = comfy.sample.prepare_noise(latent, SEED, None), (positive, negative)
    made = comfy.sample.sample(model, start, STEPS, CFG, "euler", "normal", *conds, latent, denoise=1.0, seed=SEED)
    return ({"samples": made},)


def registered_hook(model, clip, lora_name: str, strength: float):
    """A LoRA hook that is registered on MODEL and CLIP at once, as AnimateDiff-Evolved's Register LoRA Hook."""
    import comfy.hooks

    return comfy.hooks.load_hook_lora_for_models(model, clip, _file(lora_name), strength, strength)


def control_net(model, size: float):
    """A ControlNet for this very model, with random weights."""
    from comfy import ops
    from comfy.cldm import cldm
    from comfy.controlnet import ControlNet

    left = ("out_channels", "disable_unet_model_creation")
    settings = {k: v for k, v in model.model.model_config.unet_config.items() if k not in left}
    network = cldm.ControlNet(**settings, hint_channels=3, operations=ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * size
    return (ControlNet(network.eval(), load_device=torch.device("cpu")),)


def whole_weights(model, strength: float):
    """A difference with a whole weight that is wider than the model's, as IC-Light's."""
    key = "diffusion_model.input_blocks.0.0.weight"
    weight = model.model.state_dict()[key]
    model = model.clone()
    wide = torch.zeros(weight.shape[0], 8, *weight.shape[2:])
    model.add_patches({key: ("diff", (wide, {"pad_weight": True}))}, strength)
    return (model,)


def own_clone(model):
    """A clone that sets its class itself, called as a function, as ComfyUI-GGUF's loader does."""
    from comfy.model_patcher import ModelPatcher

    made = ModelPatcher.clone(model)
    made.__class__ = ModelPatcher
    return (made,)


class Pipe:
    """What packs hand on between nodes of their own."""

    def __init__(self, **parts):
        self.parts, self.first = parts, parts.get("model")


@dataclasses.dataclass(frozen=True)
class Frozen:
    model: object
    rest: tuple


class Named(NamedTuple):
    model: object
    clip: object
    vae: object


CARRIERS = {
    "tuple": lambda m, c, v: (m, c, v, None),
    "named tuple": Named,
    "list": lambda m, c, v: [m, [c, v]],
    "dict": lambda m, c, v: {"model": m, "rest": {"clip": c, "vae": v}},
    "object": lambda m, c, v: Pipe(model=m, clip=c, vae=v),
    "frozen": lambda m, c, v: Frozen(m, (c, v)),
}
_hidden: list = []  # a loader's own cache


@functools.cache  # as packs keep what they loaded
def _loaded(ckpt_name: str) -> tuple:
    import comfy.sd
    import folder_paths

    path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)[:3]


def pipe_loader(ckpt_name: str, form: str):
    """A checkpoint as one value of a type of the pack's own, as Easy-Use, Impact and Efficiency hand it on."""
    return (CARRIERS[form](*_loaded(ckpt_name)),)


def pipe_sampler(pipe, form: str):
    """Takes it apart, encodes, samples and decodes by itself."""
    ways = {"dict": lambda p: (p["model"], *p["rest"].values()), "list": lambda p: (p[0], *p[1])}
    ways |= {"object": lambda p: (p.first, p.parts["clip"], p.parts["vae"]), "frozen": lambda p: (p.model, *p.rest)}
    return one_node(*ways.get(form, lambda p: p[:3])(pipe), text="gloss, cat", tiled=False)


def hiding_loader(ckpt_name: str):
    """A loader that keeps the models for the pack's own sampler and gives a name for them."""
    _hidden[:] = _loaded(ckpt_name)
    return ("key",)


def hiding_sampler(key: str, model=None):
    _, clip, vae = _hidden
    return one_node(_hidden[0] if model is None else model, clip, vae, text="gloss, cat", tiled=False)


def parts_loader(ckpt_name: str, part: int):
    """A MODEL, CLIP or VAE alone, as ComfyUI's loaders of single files give them."""
    return (_loaded(ckpt_name)[part],)


async def late_loader(ckpt_name: str):
    """A coroutine, as newer nodes are."""
    import asyncio

    await asyncio.sleep(0.01)
    return _loaded(ckpt_name)


def expanding_loader(ckpt_name: str):
    """A node that expands to others and hands a model on as it is."""
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    latent = graph.node("EmptyLatentImage", width=64, height=64, batch_size=1)
    return {"result": (*_loaded(ckpt_name), latent.out(0)), "expand": graph.finalize()}


def toy(family: str):
    """A small model of another family, and a conditioning for it."""
    from support.families import make
    from support.families_image import U_NETS

    one = next(one for one in U_NETS if one.name == family)
    generator = torch.Generator().manual_seed(1)
    return make(one), [[torch.randn(1, *one.context, generator=generator), {}]]


NODES = {
    "PackPipeLoader": _node(pipe_loader, "PACK_PIPE", ckpt_name="STRING", form="STRING"),
    "PackPipeSampler": _node(pipe_sampler, "IMAGE", pipe="PACK_PIPE", form="STRING"),
    "PackHidingLoader": _node(hiding_loader, "PACK_KEY", ckpt_name="STRING"),
    "PackHidingSampler": _node(hiding_sampler, "IMAGE", key="PACK_KEY"),
    "PackHalfHidingSampler": _node(hiding_sampler, "IMAGE", key="PACK_KEY", model="MODEL"),
    "PackModel": _node(lambda ckpt_name: parts_loader(ckpt_name, 0), "MODEL", ckpt_name="STRING"),
    "PackClip": _node(lambda ckpt_name: parts_loader(ckpt_name, 1), "CLIP", ckpt_name="STRING"),
    "PackCheckpoint": _node(_loaded, "MODEL", "CLIP", "VAE", ckpt_name="STRING"),
    "PackLateLoader": _async_node(late_loader, "MODEL", "CLIP", "VAE", ckpt_name="STRING"),
    "PackExpandingLoader": _node(expanding_loader, "MODEL", "CLIP", "VAE", "LATENT", ckpt_name="STRING"),
    "PackToy": _node(toy, "MODEL", "CONDITIONING", family="STRING"),
    "PackPowerLoader": _node(power_loader, "MODEL", "CLIP", model="MODEL", clip="CLIP", loras="STRING"),
    "PackBlockLoader": _node(
        block_loader, "MODEL", "CLIP", model="MODEL", clip="CLIP", lora_name="STRING", first="FLOAT", others="FLOAT"
    ),
    "PackScalingLoader": _node(scaling_loader, "MODEL", model="MODEL", lora_name="STRING", factor="FLOAT"),
    "PackOneNode": _node(one_node, "IMAGE", model="MODEL", clip="CLIP", vae="VAE", text="STRING", tiled="BOOLEAN"),
    "PackIdleFirst": _node(
        idle_first, "LATENT", model="MODEL", positive="CONDITIONING", negative="CONDITIONING", noise="FLOAT"
    ),
    "PackRegisteredHook": _node(
        registered_hook,
        "MODEL",
        "CLIP",
        "HOOKS",
        model="MODEL",
        clip="CLIP",
        lora_name="STRING",
        strength="FLOAT",
    ),
    "PackControlNet": _node(control_net, "CONTROL_NET", model="MODEL", size="FLOAT"),
    "PackWholeWeights": _node(whole_weights, "MODEL", model="MODEL", strength="FLOAT"),
    "PackOwnClone": _node(own_clone, "MODEL", model="MODEL"),
}
