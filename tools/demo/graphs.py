"""The demo's graphs in ComfyUI's API format: one graph per arm, one branch per prompt, the same seeds in all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Graph = dict[str, dict[str, Any]]
Link = list[Any]


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    checkpoint: str
    safety: str
    task: str  # trained on the plain base model: the guarded arm
    sequential: str  # trained on top of the safety-tuned base model: the unguarded arm
    words: str  # a safety LoRA made of words alone, in closed form
    prompts: tuple[str, ...]
    negative: str = ""
    steps: int = 20
    seed: int = 1
    cfg: float = 3.0
    sampler: str = "euler"
    scheduler: str = "normal"
    size: int = 64


@dataclass(frozen=True)
class Nodes:
    """The node classes that differ between a stock arm and a guarded one."""

    sampler: str
    decode: str
    save: str
    save_inputs: tuple[tuple[str, Any], ...] = ()


STOCK = Nodes("KSampler", "VAEDecode", "SaveImage")
GUARDED = Nodes("ModularLoraKSampler", "ModularLoraDecode", "ModularLoraSaveImage", (("unattested", "refuse"),))


def base(setting: Setting) -> Graph:
    """The checkpoint alone."""
    graph = checkpoint(setting)
    return graph | branches(setting, STOCK, "base", model=["checkpoint", 0], clip=["checkpoint", 1])


def dropped(setting: Setting) -> Graph:
    """The task LoRA alone, by a stock loader: what is sampled where the safety LoRA was dropped on the way."""
    return _merged(setting, "dropped", setting.task)


def unguarded(setting: Setting) -> Graph:
    """The task LoRA trained on the safety-tuned base model, loaded on top of the safety LoRA by stock loaders."""
    return _merged(setting, "unguarded", setting.safety, setting.sequential)


def _merged(setting: Setting, arm: str, *files: str) -> Graph:
    graph = checkpoint(setting)
    before: Link = ["checkpoint", 0]
    clip: Link = ["checkpoint", 1]
    for number, file in enumerate(files):
        name = f"lora-{number}"
        graph[name] = node("LoraLoader", lora_name=file, strength_model=1.0, strength_clip=1.0, model=before, clip=clip)
        before, clip = [name, 0], [name, 1]
    return graph | branches(setting, STOCK, arm, model=before, clip=clip)


def safety_only(setting: Setting) -> Graph:
    """The guard with the safety LoRA and no task LoRA."""
    return _guarded(setting, "safety")


def guarded(setting: Setting) -> Graph:
    """The guard with the safety LoRA and the task LoRA, both unmerged."""
    return _guarded(setting, "guarded", setting.task)


def safety_first(setting: Setting) -> Graph:
    """The same, the task LoRA giving way where the safety LoRA acts."""
    graph = _guarded(setting, "first", setting.task)
    graph["guard"]["inputs"]["combine"] = "safety first"
    return graph


def of_words(setting: Setting) -> Graph:
    """The guard with the safety LoRA that was made of words, and the task LoRA."""
    return _guarded(replace(setting, safety=setting.words), "words", setting.task)


def _guarded(setting: Setting, arm: str, task: str = "") -> Graph:
    graph = checkpoint(setting)
    graph["safety"] = node("ModularLoraLoadSafety", lora_name=setting.safety, strength=1.0)
    inputs: dict[str, Any] = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "safety_lora": ["safety", 0]}
    if task:
        graph["task"] = node("ModularLoraLoadTask", lora_name=task, strength_model=1.0, strength_clip=1.0)
        inputs["task_lora"] = ["task", 0]
    graph["guard"] = node("ModularLoraGuardModel", **inputs, accept_merged=False)
    graph["guard-report"] = node("PreviewAny", source=["guard", 2])
    graph["run-report"] = node("PreviewAny", source=["decode-0", 1])
    return graph | branches(setting, GUARDED, arm, model=["guard", 0], clip=["guard", 1])


def checkpoint(setting: Setting) -> Graph:
    return {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=setting.checkpoint)}


def branches(setting: Setting, nodes: Nodes, arm: str, *, model: Link, clip: Link) -> Graph:
    """Conditioning, sampling, decoding and saving for every prompt."""
    graph: Graph = {
        "latent": node("EmptyLatentImage", width=setting.size, height=setting.size, batch_size=1),
        "negative": node("CLIPTextEncode", text=setting.negative, clip=clip),
    }
    for index, prompt in enumerate(setting.prompts):
        graph[f"prompt-{index}"] = node("CLIPTextEncode", text=prompt, clip=clip)
        graph[f"sampler-{index}"] = node(
            nodes.sampler,
            model=model,
            seed=setting.seed + index,
            steps=setting.steps,
            cfg=setting.cfg,
            sampler_name=setting.sampler,
            scheduler=setting.scheduler,
            positive=[f"prompt-{index}", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        )
        graph[f"decode-{index}"] = node(nodes.decode, samples=[f"sampler-{index}", 0], vae=["checkpoint", 2])
        graph[save_node(index)] = node(
            nodes.save,
            images=[f"decode-{index}", 0],
            filename_prefix=f"demo/{arm}-{index}",
            **dict(nodes.save_inputs),
        )
    return graph


def save_node(index: int) -> str:
    return f"save-{index}"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
