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
INPUTS = -10  # the id, in a subgraph, of what its inputs come out of
NOTES = ("Note", "MarkdownNote")
IMAGE_FILE, FILM_FILE, SOUND_FILE, PIXELS, LARGER = "template.png", "template.mp4", "template.flac", 64, 96
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


def graph_of(path: Path, classes: dict, before: str = "n") -> dict:
    """A template as a graph of node ids; AssertionError for a mode of a node that this reading does not know.

    Nodes of a subgraph have the ids on the way to them, as the front end sends them. A widget that a subgraph shows has
    the value that it has inside.

    Args:
        path: The template.
        classes: Of ComfyUI's nodes.
        before: What each id begins with. ComfyUI keeps a node's object from one prompt to the next by its id and type.
    """
    read = _Workflow(json.loads(path.read_text(encoding="utf-8")), before)
    return {
        f"{before}{place}": node(one["type"], **_inputs(read, place, one, classes))
        for place, one in read.nodes.items()
        if one["type"] not in ("PrimitiveNode", "Reroute", *read.subgraphs) and one.get("mode", 0) == 0
    }


class _Workflow:
    """The nodes of a saved workflow, those in its subgraphs too, and where links come from.

    A place is the ids of the subgraphs' nodes and of the node itself, with colons between them.
    """

    def __init__(self, said: dict, before: str):
        self.before = before
        self.subgraphs = {one["id"]: one for one in said.get("definitions", {}).get("subgraphs") or ()}
        self.nodes: dict[str, dict] = {}
        self.links: dict[str, tuple[str, int]] = {}  # place of a link -> the node that it comes from, which output
        self._add(said, "")

    def _add(self, said: dict, before: str) -> None:
        for one in said["links"]:
            number, source, output = one[:3] if isinstance(one, list) else _ends(one)
            self.links[f"{before}{number}"] = (f"{before}{source}", output)
        for one in said["nodes"]:
            assert one.get("mode", 0) in (0, MUTED, BYPASSED)
            if one["type"] not in NOTES:
                self.nodes[f"{before}{one['id']}"] = one
            if one["type"] in self.subgraphs and one.get("mode", 0) == 0:
                self._add(self.subgraphs[one["type"]], f"{before}{one['id']}:")

    def source(self, place: str, link: int | None):
        """What a link to the node at ``place`` brings: an output, the value that a primitive holds, or None."""
        before = place[: place.rfind(":") + 1]
        if link is None:
            return None
        found, output = self.links[f"{before}{link}"]
        if found == f"{before}{INPUTS}":  # from outside of the subgraph
            outer = before[:-1]
            name = self.subgraphs[self.nodes[outer]["type"]]["inputs"][output]["name"]
            return self.source(outer, _linked(self.nodes[outer]).get(name))
        one = self.nodes[found]
        if one["type"] == "PrimitiveNode":
            return one["widgets_values"][0]
        if one["type"] == "Reroute":
            return self.source(found, one["inputs"][0]["link"])
        if one.get("mode", 0) == BYPASSED:  # the first input of the output's type goes on in its place
            kind = one["outputs"][output]["type"]
            taken = (given for given in one.get("inputs", ()) if given["type"] == kind)
            return self.source(found, next((given["link"] for given in taken if given.get("link") is not None), None))
        if one.get("mode", 0) == MUTED:
            return None
        if one["type"] in self.subgraphs:
            return self.source(f"{found}:", self.subgraphs[one["type"]]["outputs"][output]["linkIds"][0])
        return [f"{self.before}{found}", output]


def _ends(link: dict) -> tuple[int, int, int]:
    return link["id"], link["origin_id"], link["origin_slot"]


def _linked(one: dict) -> dict[str, int]:
    """Input -> link."""
    return {given["name"]: given["link"] for given in one.get("inputs", ()) if given.get("link") is not None}


def _inputs(read: _Workflow, place: str, one: dict, classes: dict) -> dict:
    values, linked = list(one.get("widgets_values") or ()), _linked(one)
    found: dict = {}
    for name, (kind, options) in _declared(classes[one["type"]]):
        widget = (not isinstance(kind, str) or kind in WIDGETS) and not options.get("forceInput")
        if widget and values:
            found[name] = values.pop(0)
            if name in ("seed", "noise_seed") and values and values[0] in CONTROLS:
                values.pop(0)
        if name in linked and (brought := read.source(place, linked[name])) is not None:
            found[name] = brought
    return found


def _declared(cls: type) -> Iterator[tuple[str, tuple]]:
    said = cls.INPUT_TYPES()
    for part in ("required", "optional"):
        for name, spec in said.get(part, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})


SMALL = {  # by node type: what the toy model asks for, and how large and long a test may be
    "CheckpointLoaderSimple": {"ckpt_name": "world.safetensors"},
    "EmptyLatentImage": {"width": PIXELS, "height": PIXELS, "batch_size": 1},
    "ConditioningSetArea": {"width": PIXELS, "height": PIXELS, "x": 0, "y": 0},
    "VAELoader": {"vae_name": FILE},
    "ControlNetLoader": {"control_net_name": FILE},
    "UpscaleModelLoader": {"model_name": FILE},
    "GLIGENLoader": {"gligen_name": FILE},
    **{f"Empty{name}LatentVideo": FILM for name in ("Hunyuan", "Mochi")},
    **{
        f"Wan{name}ToVideo": FILM
        for name in (
            *("Image", "FirstLastFrame", "Vace", "FunInpaint", "FunControl", "CameraImage", "Track"),
            *("HuMoImage", "SoundImage"),
        )
    },
    "Wan22FunControlToVideo": FILM,
    "LTXVImgToVideo": FILM,
    "WanSoundImageToVideoExtend": {"length": FILM["length"]},
    "LoadAudio": {"audio": SOUND_FILE},
    **dict.fromkeys(("EmptyLTXVLatentVideo", "EmptyHunyuanVideo15Latent", "Wan22ImageToVideoLatent"), FILM),
    "ImageBlur": {"blur_radius": 4, "sigma": 1.0},
    "WanCameraEmbedding": {key: FILM[key] for key in ("width", "height", "length")},
    "EmptyFlux2LatentImage": {"width": 2 * PIXELS, "height": 2 * PIXELS, "batch_size": 1},
    "Flux2Scheduler": {"steps": 2, "width": PIXELS, "height": PIXELS},
    "EmptyChromaRadianceLatentImage": {"width": 16, "height": 16, "batch_size": 1},  # as large as what it stands for
    "SVD_img2vid_Conditioning": {"width": PIXELS, "height": PIXELS, "video_frames": 2},
    "LoadVideo": {"file": FILM_FILE},
    "RepeatImageBatch": {"amount": FILM["length"]},
    "ImageScaleToMaxDimension": {"largest_size": LARGER},
    **{name: {"steps": 2} for name in ("BetaSamplingScheduler", "LTXVScheduler")},
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
