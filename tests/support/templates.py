"""ComfyUI's own templates (package comfyui_workflow_templates) as graphs in API format, small enough for a test."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from support.graphs import node
from support.template_toys import FILE

PARTS = ("core", "media_api", "media_image", "media_other", "media_video")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # what stands behind a seed in the values of a node
MUTED, BYPASSED = 2, 4  # modes of a node
NOTES = ("Note", "MarkdownNote")
IMAGE_FILE, PIXELS, LARGER = "template.png", 64, 96
FILM = {"width": PIXELS, "height": PIXELS, "length": 9, "batch_size": 1}
LORAS = ("task.safetensors", "other.safetensors")


def find(name: str) -> Path | None:
    """The file of a template, in whichever part of the package it lies."""
    for part in PARTS:
        spec = importlib.util.find_spec(f"comfyui_workflow_templates_{part}")
        for place in spec.submodule_search_locations or () if spec else ():
            if found := next(Path(place).rglob(f"{name}.json"), None):
                return found
    return None


def graph_of(path: Path, classes: dict) -> dict:
    """A template as a graph of node ids; AssertionError for what this reading of the front end's format leaves out."""
    said = json.loads(path.read_text(encoding="utf-8"))
    assert not said.get("definitions", {}).get("subgraphs")
    nodes = {one["id"]: one for one in said["nodes"] if one["type"] not in NOTES}
    assert all(one.get("mode", 0) in (0, MUTED, BYPASSED) for one in nodes.values())
    links = {link[0]: (link[1], link[2]) for link in said["links"]}
    return {
        f"n{number}": node(one["type"], **_inputs(one, nodes, links, classes))
        for number, one in nodes.items()
        if one["type"] not in ("PrimitiveNode", "Reroute") and one.get("mode", 0) == 0
    }


def _inputs(one: dict, nodes: dict, links: dict, classes: dict) -> dict:
    values = list(one.get("widgets_values") or ())
    linked = {given["name"]: given["link"] for given in one.get("inputs", ()) if given.get("link") is not None}
    found: dict = {}
    for name, (kind, options) in _declared(classes[one["type"]]):
        widget = (not isinstance(kind, str) or kind in WIDGETS) and not options.get("forceInput")
        if widget and values:
            found[name] = values.pop(0)
            if name in ("seed", "noise_seed") and values and values[0] in CONTROLS:
                values.pop(0)
        if name in linked:
            found[name] = _source(links[linked[name]], nodes, links)
    return found


def _declared(cls: type) -> Iterator[tuple[str, tuple]]:
    said = cls.INPUT_TYPES()
    for part in ("required", "optional"):
        for name, spec in said.get(part, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})


def _source(link: tuple[int, int], nodes: dict, links: dict):
    """What a link brings: an output, or the value that a primitive holds."""
    source = nodes[link[0]]
    if source["type"] == "PrimitiveNode":
        return source["widgets_values"][0]
    if source["type"] == "Reroute":
        return _source(links[source["inputs"][0]["link"]], nodes, links)
    if source.get("mode", 0) == BYPASSED:  # the first input of the output's type goes on in its place
        kind = source["outputs"][link[1]]["type"]
        taken = next(one["link"] for one in source["inputs"] if one["type"] == kind and one.get("link") is not None)
        return _source(links[taken], nodes, links)
    return [f"n{link[0]}", link[1]]


SMALL = {  # by node type: what the toy model asks for, and how large and long a test may be
    "CheckpointLoaderSimple": {"ckpt_name": "world.safetensors"},
    "EmptyLatentImage": {"width": PIXELS, "height": PIXELS, "batch_size": 1},
    "ConditioningSetArea": {"width": PIXELS, "height": PIXELS, "x": 0, "y": 0},
    "VAELoader": {"vae_name": FILE},
    "ControlNetLoader": {"control_net_name": FILE},
    "UpscaleModelLoader": {"model_name": FILE},
    "GLIGENLoader": {"gligen_name": FILE},
    **{f"Empty{name}LatentVideo": FILM for name in ("Hunyuan", "Mochi")},
    **{f"Wan{name}ToVideo": FILM for name in ("Image", "FirstLastFrame")},
    "VAEDecodeTiled": {"tile_size": 64, "overlap": 16},
    "BasicScheduler": {"steps": 2},
    "ImageScale": {"width": LARGER, "height": LARGER},
    "EmptySD3LatentImage": {"width": PIXELS, "height": PIXELS, "batch_size": 1},
    "LatentUpscale": {"width": LARGER, "height": LARGER},
    "ImageScaleToTotalPixels": {"megapixels": 0.01},
    "ImagePadForOutpaint": {"left": 16, "top": 0, "right": 16, "bottom": 0, "feathering": 8},
    "LoadImage": {"image": IMAGE_FILE},
    "KSampler": {"steps": 2, "sampler_name": "euler", "scheduler": "normal"},
    "KSamplerAdvanced": {"steps": 4, "sampler_name": "euler", "scheduler": "normal"},
    "KSamplerSelect": {"sampler_name": "euler"},
    "SDTurboScheduler": {"steps": 2},
}


def small(graph: dict, loras: tuple[str, ...]) -> dict:
    """The same for toy models and ``loras``, at a size and number of steps for a test."""
    names = iter(loras * len(graph))
    for one in graph.values():
        one["inputs"] |= SMALL.get(one["class_type"], {})
        if one["class_type"] in ("LoraLoader", "LoraLoaderModelOnly"):
            one["inputs"]["lora_name"] = next(names)
            one["inputs"] |= {key: 0.7 for key in ("strength_model", "strength_clip") if key in one["inputs"]}
        if one["class_type"] == "KSamplerAdvanced":  # the first half of the steps by one model, the rest by another
            one["inputs"]["start_at_step"] = 2 if one["inputs"]["start_at_step"] else 0
            one["inputs"]["end_at_step"] = 2 if one["inputs"]["end_at_step"] < 1000 else 10_000
    return graph
