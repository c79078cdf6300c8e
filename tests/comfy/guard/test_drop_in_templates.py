"""ComfyUI's own templates with Guard behind each checkpoint loader: the images of the merge, attested."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import new_executor
from PIL import Image
from support.drop_in import SAFETY
from support.graphs import node
from support.templates import IMAGE_FILE, find, graph_of, small

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
    Image.fromarray(pixels).save(inputs / IMAGE_FILE)
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


def template(comfy, name: str) -> dict:
    """A template's graph, small."""
    path = find(name)
    assert path is not None, "the templates package that ComfyUI asks for has no such template"
    return small(graph_of(path, comfy.nodes.NODE_CLASS_MAPPINGS))


def decoded(graph: dict, results: dict) -> dict:
    """What each VAE Decode of a graph gave."""
    return {key: results[key][0].clone() for key, one in graph.items() if one["class_type"] == "VAEDecode"}


@pytest.fixture
def judged(comfy, run_graph, matrix) -> Callable[[str, str, dict, dict], None]:
    """Compares a template's images with those of the merge, and notes a row of what is known of them."""

    def judge(file: str, name: str, graph: dict, ours: dict) -> None:
        known = [comfy.ledger.known(image) for images in ours.values() for image in images]
        merge, alone = (decoded(graph, run_graph(made)) for made in (with_merges(graph), graph))
        errors = [float((ours[key] - merge[key]).abs().max()) for key in ours]
        effects = [float((merge[key] - alone[key]).abs().max()) for key in ours]
        assert all(one.guarded for one in known)
        assert min(effects) > 4 / 255
        assert max(errors) <= 1 / 255
        said = "; ".join(dict.fromkeys(one.status for one in known))
        matrix(file, name, said, max(e / by for e, by in zip(errors, effects, strict=True)))

    return judge


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_one_node_more_gives_the_merges_images_attested(comfy, run_graph, name, judged):
    graph = template(comfy, name)
    judged("templates.json", name, graph, decoded(graph, run_graph(with_guards(graph))))


@pytest.fixture
def attached(comfy, operator, run_graph, sha256) -> Callable[[dict], dict]:
    """Queues a graph as it is under a policy that guards every model, and runs it."""
    one = f'{{sha256 = "{sha256(SAFETY)}", file = "{SAFETY}", min_net_strength = 0.9}}'

    def run(graph: dict) -> dict:
        operator.write(f'[guard]\nattach = "always"\nrequired = [{one}]\n')
        assert operator.queue(graph) == {}
        made = run_graph(copy.deepcopy(graph), new_executor(comfy))  # the server empties its cache for a policy
        operator.remove()
        return made

    return run


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_as_it_is_gives_the_merges_images_attested_under_a_policy_that_attaches(
    comfy, attached, name, judged
):
    graph = template(comfy, name)
    judged("templates_attach.json", name, graph, decoded(graph, attached(graph)))
