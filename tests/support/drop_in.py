"""Ordinary graphs of ComfyUI's own nodes, the same with the node Guard in them, and the same with everything merged."""

from __future__ import annotations

import copy

from support.graphs import base_graph, decode, node, sampler

SAFETY = "safety.safetensors"
SOCKETS = {0: "model", 1: "clip", 2: "vae"}  # outputs of a checkpoint loader, and what Guard calls them


def ordinary(*loaders: tuple[str, float], kind: str = "LoraLoader") -> dict:
    """Checkpoint, LoRA loaders in a chain, two prompts, KSampler, VAE Decode, Save Image."""
    graph = base_graph()
    model, clip = ["ckpt", 0], ["ckpt", 1]
    for i, (name, strength) in enumerate(loaders):
        inputs = {"model": model, "lora_name": name, "strength_model": strength}
        inputs |= {"clip": clip, "strength_clip": strength} if kind == "LoraLoader" else {}
        graph[f"lora{i}"] = node(kind, **inputs)
        model, clip = [f"lora{i}", 0], [f"lora{i}", 1] if kind == "LoraLoader" else clip
    graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = clip
    graph["sample"] = sampler(model)
    graph["decode"] = decode(["sample", 0], "VAEDecode")
    graph["save"] = node("SaveImage", images=["decode", 0], filename_prefix="d")
    return graph


def guarded(graph: dict, behind: str = "ckpt", safety: str = SAFETY, strength: float = 1.0) -> dict:
    """One node more, behind the node that is named: its MODEL and CLIP, and the checkpoint's VAE, go through it."""
    made = copy.deepcopy(graph)
    sources = {0: [behind, 0], 1: [behind, 1], 2: ["ckpt", 2]}
    for inputs in (one["inputs"] for one in made.values()):
        for key, link in inputs.items():
            if isinstance(link, list) and link in sources.values():
                inputs[key] = ["guard", next(i for i, source in sources.items() if source == link)]
    links = {SOCKETS[i]: link for i, link in sources.items()}
    made["guard"] = node("ModularLoraGuard", lora_name=safety, strength=strength, **links)
    assert moved(graph, made) <= {"MODEL", "CLIP", "VAE"}
    return made


def moved(before: dict, after: dict) -> set[str]:
    """Types of the links that are others now; AssertionError where more than one node came, or any other value changed."""
    assert set(after) - set(before) == {"guard"}
    assert set(before) <= set(after)
    found = set()
    for name, one in before.items():
        assert one["class_type"] == after[name]["class_type"]
        for key, value in one["inputs"].items():
            now = after[name]["inputs"][key]
            if now != value:
                assert now[0] == "guard"
                found.add(("MODEL", "CLIP", "VAE")[now[1]])
    return found


def merged(graph: dict, safety: str = SAFETY, strength: float = 1.0) -> dict:
    """The ordinary graph with the safety LoRA merged by ComfyUI's own loader, right behind the checkpoint."""
    made = copy.deepcopy(graph)
    for inputs in (one["inputs"] for one in made.values()):
        for key, link in inputs.items():
            if link in (["ckpt", 0], ["ckpt", 1]):
                inputs[key] = ["merged", link[1]]
    both = {"model": ["ckpt", 0], "clip": ["ckpt", 1]}
    made["merged"] = node("LoraLoader", lora_name=safety, strength_model=strength, strength_clip=strength, **both)
    return made
