"""API-format graphs that the tests build on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

STEPS, SIZE = 2, 64


class GraphError(RuntimeError):
    """A graph that ComfyUI refused (``stage`` "validation") or that stopped with an error ("execution").

    ``code``: of the error that a node raised; "" for one that has none.
    """

    def __init__(self, stage: str, message: str, node_type: str = "", code: str = ""):
        super().__init__(message)
        self.stage, self.node_type, self.code = stage, node_type, code


def keeping_code(executor):
    """A PromptExecutor that has the code of the error that ended its last failed run as ``code``.

    ComfyUI tells its clients the error's message alone.
    """
    tell = executor.handle_execution_error

    def note(*given) -> None:
        executor.code = getattr(given[-1], "code", "")  # the error comes last
        tell(*given)

    executor.handle_execution_error = note
    return executor


def node(kind: str, **inputs) -> dict:
    """A node of a graph: its class and its inputs, values or links ([node, output])."""
    return {"class_type": kind, "inputs": inputs}


def base_graph() -> dict:
    """Checkpoint, prompts and an empty latent."""
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="world.safetensors"),
        "pos": node("CLIPTextEncode", clip=["ckpt", 1], text="gloss, cat"),
        "neg": node("CLIPTextEncode", clip=["ckpt", 1], text=""),
        "latent": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
    }


def sampler(model: list, kind: str = "KSampler", **changes) -> dict:
    inputs = {
        "model": model,
        "seed": 1,
        "steps": STEPS,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": ["pos", 0],
        "negative": ["neg", 0],
        "latent_image": ["latent", 0],
        "denoise": 1.0,
    }
    return node(kind, **inputs | changes)


def decode(samples: list, kind: str = "ModularLoraDecode") -> dict:
    return node(kind, samples=samples, vae=["ckpt", 2])


def guarded_graph(
    safety: str = "safety.safetensors", task: str | None = "task.safetensors", clip: bool = False
) -> dict:
    graph = base_graph()
    graph["safety"] = node("ModularLoraLoadSafety", lora_name=safety, strength=1.0)
    graph["guard"] = node("ModularLoraGuardModel", model=["ckpt", 0], safety_lora=["safety", 0])
    if task:
        graph["task"] = node("ModularLoraLoadTask", lora_name=task, strength_model=0.7, strength_clip=0.7)
        graph["guard"]["inputs"]["task_lora"] = ["task", 0]
    if clip:
        graph["guard"]["inputs"]["clip"] = ["ckpt", 1]
        graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = ["guard", 1]
    graph["sample"] = sampler(["guard", 0], "ModularLoraKSampler")
    graph["decode"] = decode(["sample", 0])
    graph["save"] = node("ModularLoraSaveImage", images=["decode", 0], filename_prefix="t", unattested="refuse")
    return graph


def save_lora(
    path: Path, layers: dict, rank: int, seed: int, size: float = 0.05, alpha: float | None = None, **metadata
):
    """A kohya LoRA with random factors on ``layers`` (name -> LayerSpec); ‖ΔW‖ is about ``size``·√out."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in layers.items():
        out, *rest = spec.weight_shape
        fan_in = max(1, torch.Size(rest).numel())
        down = torch.randn(rank, *rest, generator=generator) / fan_in**0.5
        up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) * size / rank**0.5
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", **metadata})


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all of a module's tensors as bytes: what ComfyUI leaves uninitialised may be NaN, unequal to itself."""
    return {name: t.detach().clone().reshape(-1).view(torch.uint8) for name, t in module.state_dict().items()}


def layers_of(info, prefix: str) -> Iterator[tuple]:
    """Name and form of every layer that takes a branch, once each, by its name with this prefix."""
    seen = set()
    for name, key in info.key_map.items():
        spec = info.specs.get(key) if isinstance(key, str) else None
        if name.startswith(prefix) and spec and not spec.problem and key not in seen:
            seen.add(key)
            yield name, spec
