"""Nodes of other packs that try to get round a policy: hidden loaders, nodes that expand, that sample by themselves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from helper_nodes import ANY

CHECKPOINT = "world.safetensors"


def _node(run: Callable, returns: tuple = (), output: bool = False, **inputs) -> type:
    """A V1 node class around a function."""

    def input_types(cls):
        return {"required": inputs}

    def given_out(made):
        return made if isinstance(made, dict) and made.keys() & {"ui", "expand"} else (made,)

    def execute(self, **given):
        return given_out(run(**given))

    async def execute_later(self, **given):
        return given_out(await run(**given))

    execute = execute_later if inspect.iscoroutinefunction(run) else execute
    members = {"INPUT_TYPES": classmethod(input_types), "RETURN_TYPES": returns, "OUTPUT_NODE": output, "run": execute}
    return type("EscNode", (), members | {"FUNCTION": "run", "CATEGORY": "test"})


def install(mapping: dict[str, type], between: Callable[[], None]) -> None:
    """Register the nodes; ``EscCall`` calls ``between`` when it runs, again for another number."""
    loader = mapping["CheckpointLoaderSimple"]

    def load():
        return loader().load_checkpoint(CHECKPOINT)

    def sample(model=None):
        model, clip, _ = (model, *load()[1:]) if model is not None else load()
        cond = mapping["CLIPTextEncode"]().encode(clip, "cat")[0]
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return mapping["KSampler"]().sample(model, 1, 2, 2.0, "euler", "normal", cond, cond, latent)[0]

    def apply(value=None):
        model = load()[0].model
        noise, sigma = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
        return {"samples": model.apply_model(noise, sigma, c_crossattn=torch.zeros(1, 77, 768))}

    def in_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.inference_mode()(sample)).result()

    async def later():
        await asyncio.sleep(0.01)
        return sample()

    def call(value, number):
        between()
        return value

    mapping |= {
        "EscHidden": _node(lambda: load()[0], (ANY,)),
        "EscSample": _node(sample, ("LATENT",)),
        "EscThread": _node(in_thread, ("LATENT",)),
        "EscLater": _node(later, ("LATENT",)),
        "EscApply": _node(apply, ("LATENT",)),
        "EscBox": _node(lambda value: {"inside": value}, ("BOX",), value=(ANY,)),
        "EscUnbox": _node(lambda box: box["inside"], (ANY,), box=("BOX",)),
        "EscSampleBox": _node(lambda box: sample(box["inside"]), ("LATENT",), box=("BOX",)),
        "EscStack": _node(
            lambda name, strength: [(name, strength, strength)],
            ("LORA_STACK",),
            name=("STRING",),
            strength=("FLOAT", {"min": -10.0, "max": 10.0}),
        ),
        "EscText": _node(lambda text: text, (ANY,), text=("STRING",)),
        "EscCall": _node(call, (ANY,), value=(ANY,), number=("INT", {"max": 1 << 40})),
        "EscShow": _node(lambda value: {"ui": {"values": [str(value)]}}, output=True, value=(ANY,)),
        "EscExpand": _node(_expand, (ANY,), True, model=(ANY,)),
        "EscExpandAll": _node(_expand, (ANY,), True),
        "EscExpandLoader": _node(_expand_loader, (ANY,)),
        "EscLazy": _Lazy,
        "EscAlias": mapping["PreviewImage"],
    }


def _expand(model=None) -> dict:
    """To a graph that samples and shows; without a model it loads one."""
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    cond = graph.node("CLIPTextEncode", clip=loader.out(1), text="cat")
    latent = graph.node("EmptyLatentImage", width=64, height=64, batch_size=1)
    settings = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"positive": cond.out(0), "negative": cond.out(0), "latent_image": latent.out(0)}
    samples = graph.node("KSampler", model=loader.out(0) if model is None else model, **settings, **links)
    picture = graph.node("VAEDecode", samples=samples.out(0), vae=loader.out(2))
    graph.node("PreviewImage", images=picture.out(0))
    return {"result": (picture.out(0),), "expand": graph.finalize()}


def _expand_loader() -> dict:
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    return {"result": (loader.out(0),), "expand": graph.finalize()}


class _Lazy:
    """A switch that asks for one of its inputs only as it runs."""

    RETURN_TYPES, FUNCTION, CATEGORY = (ANY,), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        lazy = (ANY, {"lazy": True})
        return {"required": {"first": ("BOOLEAN", {"default": False})}, "optional": {"a": lazy, "b": lazy}}

    def check_lazy_status(self, first, a=None, b=None):
        return ["a"] if first else ["b"]

    def run(self, first, a=None, b=None):
        return (a if first else b,)
