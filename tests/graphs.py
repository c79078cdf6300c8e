"""API-format graphs that the tests build on."""

from __future__ import annotations

STEPS, SIZE = 2, 64


class GraphError(RuntimeError):
    """A graph that ComfyUI refused (``stage`` "validation") or that stopped with an error ("execution")."""

    def __init__(self, stage: str, message: str, node_type: str = ""):
        super().__init__(message)
        self.stage, self.node_type = stage, node_type


def base_graph() -> dict:
    """Checkpoint, prompts and an empty latent."""
    encode = lambda text: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["ckpt", 1], "text": text}}  # noqa: E731
    return {
        "ckpt": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "world.safetensors"}},
        "pos": encode("gloss, cat"),
        "neg": encode(""),
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1}},
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
    return {"class_type": kind, "inputs": inputs | changes}


def decode(samples: list, kind: str = "ModularLoraDecode") -> dict:
    return {"class_type": kind, "inputs": {"samples": samples, "vae": ["ckpt", 2]}}


def guarded_graph(
    safety: str = "safety.safetensors", task: str | None = "task.safetensors", clip: bool = False
) -> dict:
    graph = base_graph()
    graph["safety"] = {"class_type": "ModularLoraLoadSafety", "inputs": {"lora_name": safety, "strength": 1.0}}
    graph["guard"] = {
        "class_type": "ModularLoraGuardModel",
        "inputs": {"model": ["ckpt", 0], "safety_lora": ["safety", 0]},
    }
    if task:
        strengths = {"lora_name": task, "strength_model": 0.7, "strength_clip": 0.7}
        graph["task"] = {"class_type": "ModularLoraLoadTask", "inputs": strengths}
        graph["guard"]["inputs"]["task_lora"] = ["task", 0]
    if clip:
        graph["guard"]["inputs"]["clip"] = ["ckpt", 1]
        graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = ["guard", 1]
    graph["sample"] = sampler(["guard", 0], "ModularLoraKSampler")
    graph["decode"] = decode(["sample", 0])
    graph["save"] = {
        "class_type": "ModularLoraSaveImage",
        "inputs": {"images": ["decode", 0], "filename_prefix": "t", "unattested": "refuse"},
    }
    return graph
