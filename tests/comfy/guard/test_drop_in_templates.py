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
from support import drop_in, template_toys, video_toys
from support.graphs import node
from support.templates import IMAGE_FILE, LORAS, find, graph_of, small

CHECKPOINT = (  # on the demo world's checkpoint, with small files of what else they load
    *("default", "embedding_example", "image2image", "inpaint_example", "inpaint_model_outpainting"),
    *("lora", "lora_multiple", "hiresfix_latent_workflow", "latent_upscale_different_prompt_model"),
    *("sdxl_simple_example", "sdxl_refiner_prompt_example", "sdxlturbo_example"),
    *("flux_dev_checkpoint_example", "flux_schnell", "sd3.5_simple_example"),
    *("area_composition", "area_composition_square_area_for_subject", "controlnet_example", "depth_controlnet"),
    *("mixing_controlnets", "2_pass_pose_worship", "esrgan_example", "hiresfix_esrgan_workflow"),
    *("gligen_textbox_example", "sd3.5_large_blur"),
)
SPLIT = (  # the same, with stand-ins for the loaders of the diffusion model and of the text encoder
    *("flux1_krea_dev", "flux_fill_inpaint_example", "flux_fill_outpaint_example", "image_qwen_image"),
    *("image_z_image_turbo", "image_chroma_text_to_image", "hidream_i1_dev", "image_omnigen2_t2i"),
)
VIDEO = (  # on a toy of Wan 2.1, with stand-ins for all loaders
    *("text_to_video_wan", "video_wan2_2_14B_t2v", "hunyuan_video_text_to_video", "mochi_text_to_video_example"),
    "video_wan2_2_14B_i2v",
)
TEMPLATES = (*CHECKPOINT, *SPLIT, *VIDEO)
SHOWING = ("controlnet_example",)  # these show an image from outside, for which a policy must say so
EXTRAS = ("post_processing", "sd3", "flux", "mask", "images", "canny", "upscale_model", "hidream", "cond")
EXTRAS += ("video", "hunyuan", "mochi", "wan", "model_advanced")
LOADER, VAE_LOADER = "CheckpointLoaderSimple", "VAELoader"
DECODERS = ("VAEDecode", "VAEDecodeTiled")


@pytest.fixture(scope="module", autouse=True)
def nodes(comfy, loras, loaded) -> Iterator[None]:
    before = dict(comfy.nodes.NODE_CLASS_MAPPINGS)
    folder = Path(comfy.nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        asyncio.run(comfy.nodes.load_custom_node(str(folder / f"nodes_{name}.py"), module_parent="comfy_extras"))
    inputs = Path(comfy.folder_paths.get_input_directory())
    inputs.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[24:72, 24:72, 3] = 0  # the mask
    Image.fromarray(pixels).save(inputs / IMAGE_FILE)
    with template_toys.files(comfy, loaded[0]):
        yield
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - set(before):
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


@pytest.fixture(scope="module")
def video(comfy) -> tuple:
    """The toy of a model of video, and LoRAs for it."""
    video_toys.write_loras(comfy)
    return video_toys.VideoLoader().run()


@pytest.fixture
def toys(comfy, loaded, request, monkeypatch) -> None:
    """Stand-ins for the loaders that a template has."""
    name = request.node.callspec.params["name"]
    if name in CHECKPOINT:
        return
    model, clip, vae = request.getfixturevalue("video") if name in VIDEO else loaded
    classes = comfy.nodes.NODE_CLASS_MAPPINGS
    made = dict.fromkeys(template_toys.MODELS, model) | dict.fromkeys(template_toys.CLIPS, clip)
    for kind, one in (made | ({VAE_LOADER: vae} if name in VIDEO else {})).items():
        monkeypatch.setitem(classes, kind, template_toys.stand_in(classes[kind], one))


def safety_of(name: str) -> str:
    return video_toys.SAFETY if name in VIDEO else drop_in.SAFETY


def sources(graph: dict) -> dict[str, dict[str, list]]:
    """What goes through each guard: of every loader of a diffusion model the MODEL, and the CLIP and VAE beside it.

    Where a CLIP or VAE is loaded by itself, it goes through the first guard.
    """
    found = {}
    for name, one in graph.items():
        if one["class_type"] == LOADER:
            found[name] = {"model": [name, 0], "clip": [name, 1], "vae": [name, 2]}
        elif one["class_type"] in template_toys.MODELS:
            found[name] = {"model": [name, 0]}
    first = found[next(iter(found))]
    for name, one in graph.items():
        if one["class_type"] in template_toys.CLIPS:
            first["clip"] = [name, 0]
        if one["class_type"] == VAE_LOADER:
            first["vae"] = [name, 0]
    return found


def with_guards(graph: dict, safety: str) -> dict:
    """A Guard behind each loader of a model, and no other change but the links that now come from it."""
    made = copy.deepcopy(graph)
    for name, links in sources(graph).items():
        _moved(made, links, f"guard_{name}", ("model", "clip", "vae"))
        made[f"guard_{name}"] = node("ModularLoraGuard", lora_name=safety, strength=1.0, **links)
    return made


def with_merges(graph: dict, safety: str) -> dict:
    made = copy.deepcopy(graph)
    for name, links in sources(graph).items():
        links.pop("vae", None)
        _moved(made, links, f"merge_{name}", ("model", "clip"))
        both = {f"strength_{key}": 1.0 for key in links}
        kind = "LoraLoader" if "clip" in links else "LoraLoaderModelOnly"
        made[f"merge_{name}"] = node(kind, lora_name=safety, **links, **both)
    return made


def _moved(graph: dict, links: dict[str, list], to: str, outputs: tuple[str, ...]) -> None:
    """What came over these links comes out of another node."""
    for one in graph.values():
        for key, link in one["inputs"].items():
            if isinstance(link, list) and link in links.values():
                one["inputs"][key] = [to, outputs.index(next(k for k, v in links.items() if v == link))]


def template(comfy, name: str) -> dict:
    """A template's graph, small."""
    path = find(name)
    assert path is not None, "the templates package that ComfyUI asks for has no such template"
    graph = small(graph_of(path, comfy.nodes.NODE_CLASS_MAPPINGS), (video_toys.TASK,) if name in VIDEO else LORAS)
    for one in graph.values():
        if one["class_type"] == VAE_LOADER and name in VIDEO:
            one["inputs"]["vae_name"] = "video"  # ComfyUI keeps what the loader of this name gave of the other file
    return graph


def decoded(graph: dict, results: dict) -> dict:
    """What each VAE Decode of a graph gave."""
    return {key: results[key][0].clone() for key, one in graph.items() if one["class_type"] in DECODERS}


@pytest.fixture
def judged(comfy, run_graph, matrix) -> Callable[[str, str, dict, dict], None]:
    """Compares a template's images with those of the merge, and notes a row of what is known of them."""

    def judge(file: str, name: str, graph: dict, ours: dict) -> None:
        known = [comfy.ledger.known(image) for images in ours.values() for image in images]
        merge, alone = (decoded(graph, run_graph(made)) for made in (with_merges(graph, safety_of(name)), graph))
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
def test_a_template_with_one_node_more_gives_the_merges_images_attested(comfy, toys, run_graph, name, judged):
    graph = template(comfy, name)
    judged("templates.json", name, graph, decoded(graph, run_graph(with_guards(graph, safety_of(name)))))


@pytest.fixture
def attached(comfy, operator, run_graph, sha256) -> Callable[[dict, str], dict]:
    """Queues a template's graph as it is under a policy that guards every model, and runs it."""

    def run(graph: dict, name: str) -> dict:
        safety = safety_of(name)
        one = f'{{sha256 = "{sha256(safety)}", file = "{safety}", min_net_strength = 0.9}}'
        shown = "[open]\nunattested = true\n" if name in SHOWING else ""
        operator.write(f'[guard]\nattach = "always"\nrequired = [{one}]\n{shown}')
        assert operator.queue(graph) == {}
        made = run_graph(copy.deepcopy(graph), new_executor(comfy))  # the server empties its cache for a policy
        operator.remove()
        return made

    return run


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_as_it_is_gives_the_merges_images_attested_under_a_policy_that_attaches(
    comfy, toys, attached, name, judged
):
    graph = template(comfy, name)
    judged("templates_attach.json", name, graph, decoded(graph, attached(graph, name)))
