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
    """Types of the links that are others now; AssertionError where more than one node came or a value changed."""
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


# Graphs with Guard Model, as they are with Guard

STOCK = {
    "ModularLoraKSampler": "KSampler",
    "ModularLoraKSamplerAdvanced": "KSamplerAdvanced",
    "ModularLoraGuider": "CFGGuider",
    "ModularLoraDecode": "VAEDecode",
    "ModularLoraDecodeTiled": "VAEDecodeTiled",
}
GUARD_MODEL, AS_MODEL = "ModularLoraGuardModel", "ModularLoraGuardedAsModel"


def translated(graph: dict, savers: bool = True) -> dict | None:
    """A graph with Guard Model as one with Guard, loaders of LoRAs behind it, and ComfyUI's own nodes.

    Whatever else it holds stays. ``savers``: Save Attested Image becomes Save Image as well. None where handles of
    LoRAs go another way than from loader to guard, which has nothing that corresponds to it.
    """
    if not isinstance(graph, dict) or not all(map(_is_node, graph.values())):
        return None
    made = copy.deepcopy(graph)
    ways: dict[tuple[str, int], list] = {}  # old output -> new one
    for name in [n for n, one in graph.items() if one["class_type"] == GUARD_MODEL]:
        inputs = made[name]["inputs"]
        safety = _chain(graph, inputs.get("safety_lora"), "safety_lora", "ModularLoraLoadSafety")
        tasks = _chain(graph, inputs.get("task_lora"), "task_lora", "ModularLoraLoadTask")
        if not safety or tasks is None or "lora_stack" in inputs:
            return None
        own = {key: safety[0][key] for key in ("lora_name", "strength")}
        links = {key: inputs[key] for key in ("model", "clip") if key in inputs}
        more = {"safety_lora": safety[0]["safety_lora"]} if "safety_lora" in safety[0] else {}
        made[name] = node(
            "ModularLoraGuard", **links, **own, **more, **({"vae": ["ckpt", 2]} if "ckpt" in made else {})
        )
        last = {"model": [name, 0], "clip": [name, 1]}
        for i, task in enumerate(tasks):
            last = _behind(made, f"{name}_task{i}", last, task, "clip" in inputs)
        ways |= {(name, 0): last["model"], (name, 1): last["clip"], (name, 2): [name, 3]}
    guard = next((n for n, one in made.items() if one["class_type"] == "ModularLoraGuard"), None)
    for name, one in graph.items():
        if one["class_type"] == AS_MODEL:
            ways[name, 0] = made.pop(name)["inputs"].get("guarded_model")
        elif one["class_type"] in STOCK:
            made[name]["class_type"] = STOCK[one["class_type"]]
        elif savers and one["class_type"] == "ModularLoraSaveImage":
            made[name]["class_type"] = "SaveImage"
            made[name]["inputs"].pop("unattested", None)
    for name, one in made.items():
        for key, link in list(one["inputs"].items()):
            for _ in range(3):  # Guarded Model as MODEL, behind Guard Model, behind another
                if isinstance(link, list) and len(link) == 2 and name.partition("_task")[0] != link[0]:
                    link = ways.get((link[0], link[1]), link) if isinstance(link[1], int) else link
            one["inputs"][key] = [guard, 2] if link == ["ckpt", 2] and guard and _decodes(one) else link
            if link is None:  # nothing was connected
                del one["inputs"][key]
    return made


def without_node(graph: dict) -> dict:
    """A graph without Guard: what came from it comes from what went into it, as where every model is guarded."""
    made = copy.deepcopy(graph)
    while name := next((n for n, one in made.items() if one["class_type"] == "ModularLoraGuard"), None):
        inputs = made.pop(name)["inputs"]
        for one in made.values():
            for key, link in list(one["inputs"].items()):
                if isinstance(link, list) and len(link) == 2 and link[0] == name:
                    one["inputs"][key] = inputs.get(SOCKETS.get(link[1], ""))
                    if one["inputs"][key] is None:
                        del one["inputs"][key]
    return made


def _decodes(one: dict) -> bool:
    return one["class_type"] in ("VAEDecode", "VAEDecodeTiled")


def _is_node(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("class_type"), str) and isinstance(one.get("inputs"), dict)


def _chain(graph: dict, link: object, key: str, kind: str) -> list[dict] | None:
    """The inputs of a chain of loaders, the last first; None where another node is in it."""
    found = []
    while link is not None:
        one = graph.get(link[0]) if isinstance(link, list) else None
        if one is None or one["class_type"] != kind or len(found) > len(graph):
            return None
        if not isinstance(one["inputs"].get("lora_name"), str) or "lora_stack" in one["inputs"]:
            return None
        found.append(one["inputs"])
        link = one["inputs"].get(key)
    return found


def _behind(made: dict, name: str, last: dict, task: dict, both: bool) -> dict:
    """A stock loader for what Load Task LoRA loaded."""
    strengths = {"lora_name": task["lora_name"], "strength_model": task.get("strength_model", 1.0)}
    if not both:
        made[name] = node("LoraLoaderModelOnly", model=last["model"], **strengths)
        return {"model": [name, 0], "clip": last["clip"]}
    made[name] = node("LoraLoader", **last, **strengths, strength_clip=task.get("strength_clip", 1.0))
    return {"model": [name, 0], "clip": [name, 1]}
