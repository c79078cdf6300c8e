"""Nodes of other packs that try to get round a policy: hidden loaders, nodes that expand, that sample by themselves."""

from __future__ import annotations

import asyncio
import base64
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from support.helper_nodes import ANY

CHECKPOINT = "world.safetensors"
MARK = "picture as text: "  # before every text that is made of an image


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
        "EscLet": _node(_let, ("INT",), value=(ANY,), into=("STRING",), slot=("STRING",), form=("STRING",)),
        "EscText64": _node(_as_text, ("STRING",), value=(ANY,)),
        "EscTell": _node(lambda value: _telling(value), ("INT",), value=(ANY,)),
        "EscTellLater": _node(_tell_later, ("INT",), value=(ANY,)),
        "EscFail": _node(_fail, ("INT",), value=(ANY,)),
        "EscPreview": _node(_preview, ("INT",), value=(ANY,)),
        "EscMesh": _node(_mesh, (ANY,), value=(ANY,)),
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
    image = graph.node("VAEDecode", samples=samples.out(0), vae=loader.out(2))
    graph.node("PreviewImage", images=image.out(0))
    return {"result": (image.out(0),), "expand": graph.finalize()}


def _expand_loader() -> dict:
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    return {"result": (loader.out(0),), "expand": graph.finalize()}


FORMS: dict[str, Callable] = {  # ways to hand on an image b h w c
    "plain": lambda value: value,
    "list": lambda value: [value],
    "pictures in a list": lambda value: list(value),
    "dict of tuples": lambda value: {"a": (value, {"b": 1})},
    "key of a dict": lambda value: {value: 1},
    "set": lambda value: {value},
    "video of five dimensions": lambda value: value[None],
    "slice of a batch": lambda value: torch.cat((value, value))[1:],
    "one picture": lambda value: value[0],
    "mask": lambda value: value[..., 0],
    "row of a mask": lambda value: value[0, ..., 0],
    "vector": lambda value: value.flatten(),
    "bytes of colour": lambda value: (value * 255).to(torch.uint8),
    "half precision": lambda value: value.half(),
    "array": lambda value: value.numpy(),
    "pickled": lambda value: pickle.dumps(value.numpy()),
    "generator": iter,
    "function": lambda value: lambda: value,
    "nested": lambda value: _nested(value),
    "nested of PyTorch": lambda value: torch.nested.nested_tensor([value[0]]),
    "latent": lambda value: {"samples": value},
    "latent under another key": lambda value: {"latents": value, "samples": []},
    "sound": lambda value: {"waveform": value.movedim(-1, 1).reshape(len(value), 3, -1), "sample_rate": 16000},
    "sound beside sound": lambda value: {"waveform": [], "sample_rate": 16000, "more": value},
}


def _nested(value: torch.Tensor):
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([value, value])


MORE = {  # other inputs of the types that EscLet expands to
    "SaveAnimatedWEBP": {"fps": 6.0, "lossless": True, "quality": 90, "method": "default"},
    "ModularLoraSaveGated": {"format": "png", "quality": 90, "unfit": "refuse", "save_flagged": True},
    "ModularLoraSaveImage": {"unattested": "save and say so"},
}


def _let(value, into: str, slot: str, form: str) -> dict:
    """Expands to a node that gets the value in another form; what comes out is a number."""
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    graph.node(into, **{slot: FORMS[form](value), "filename_prefix": "let"}, **MORE.get(into, {}))
    return {"result": (1,), "expand": graph.finalize()}


def _as_text(value: torch.Tensor) -> str:
    return MARK + base64.b64encode(value.numpy().tobytes()).decode()


def _telling(value) -> dict:
    return {"ui": {"text": [_as_text(value)]}, "result": (1,)}


async def _tell_later(value) -> dict:
    await asyncio.sleep(0.01)
    return _telling(value)


def _fail(value):
    raise ValueError("no")


def _preview(value: torch.Tensor) -> int:
    import comfy.utils
    from PIL import Image

    image = Image.fromarray((value[0] * 255).to(torch.uint8).numpy())
    comfy.utils.ProgressBar(1).update_absolute(1, 1, ("PNG", image, None))
    return 1


def _mesh(value: torch.Tensor):
    from comfy_api.latest._util import MESH

    return MESH(value.reshape(1, -1, 3), torch.zeros(1, 1, 3, dtype=torch.int64))


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
