"""ComfyUI's own templates with Guard behind each checkpoint loader: the pictures of the merge, attested."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drop_in import SAFETY
from support.graphs import node
from support.templates import PICTURE, find, graph_of, small

TEMPLATES = (
    "default",
    "embedding_example",
    "image2image",
    "inpaint_example",
    "inpaint_model_outpainting",
    "lora",
    "lora_multiple",
    "hiresfix_latent_workflow",
    "latent_upscale_different_prompt_model",
    "sdxl_simple_example",
    "sdxl_refiner_prompt_example",
    "sdxlturbo_example",
    "flux_dev_checkpoint_example",
    "flux_schnell",
    "sd3.5_simple_example",
)
EXTRAS = ("post_processing", "sd3", "flux", "mask", "images")
LOADER = "CheckpointLoaderSimple"


@pytest.fixture(scope="module", autouse=True)
def nodes(comfy, loras) -> Iterator[None]:
    before = set(comfy.nodes.NODE_CLASS_MAPPINGS)
    folder = Path(comfy.nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        asyncio.run(comfy.nodes.load_custom_node(str(folder / f"nodes_{name}.py"), module_parent="comfy_extras"))
    inputs = Path(comfy.folder_paths.get_input_directory())
    inputs.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 4), np.uint8)
    Image.fromarray(pixels).save(inputs / PICTURE)
    yield
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - before:
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


def with_guards(graph: dict) -> dict:
    """A Guard behind each checkpoint loader, and no other change but the links that now come from it."""
    made = copy.deepcopy(graph)
    for name in [name for name, one in graph.items() if one["class_type"] == LOADER]:
        _moved(made, name, f"guard_{name}", {0: 0, 1: 1, 2: 2})
        links = {"model": [name, 0], "clip": [name, 1], "vae": [name, 2]}
        made[f"guard_{name}"] = node("ModularLoraGuard", lora_name=SAFETY, strength=1.0, **links)
    return made


def with_merges(graph: dict) -> dict:
    made = copy.deepcopy(graph)
    for name in [name for name, one in graph.items() if one["class_type"] == LOADER]:
        _moved(made, name, f"merge_{name}", {0: 0, 1: 1})
        both = {"model": [name, 0], "clip": [name, 1], "strength_model": 1.0, "strength_clip": 1.0}
        made[f"merge_{name}"] = node("LoraLoader", lora_name=SAFETY, **both)
    return made


def _moved(graph: dict, source: str, to: str, slots: dict[int, int]) -> None:
    for one in graph.values():
        for key, link in one["inputs"].items():
            if isinstance(link, list) and link[0] == source and link[1] in slots:
                one["inputs"][key] = [to, slots[link[1]]]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_one_node_more_gives_the_merges_pictures_attested(comfy, run_graph, name, matrix):
    path = find(name)
    assert path is not None, "the templates package that ComfyUI asks for has no such template"
    graph = small(graph_of(path, comfy.nodes.NODE_CLASS_MAPPINGS))
    decodes = [key for key, one in graph.items() if one["class_type"] == "VAEDecode"]
    ours, merge, alone = (
        {key: results[key][0].clone() for key in decodes}
        for results in (run_graph(made) for made in (with_guards(graph), with_merges(graph), graph))
    )
    known = [comfy.ledger.known(image) for key in decodes for image in ours[key]]
    errors, effects = [], []
    for key in decodes:
        errors.append(float((ours[key] - merge[key]).abs().max()))
        effects.append(float((merge[key] - alone[key]).abs().max()))
    assert all(one.guarded for one in known)
    assert min(effects) > 4 / 255
    assert max(errors) <= 1 / 255
    said = "; ".join(dict.fromkeys(one.status for one in known))
    matrix("templates.json", name, said, max(e / by for e, by in zip(errors, effects, strict=True)))
