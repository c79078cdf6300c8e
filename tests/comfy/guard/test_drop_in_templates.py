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
from support import audio_nodes, drop_in, template_toys, video_toys
from support.errors import refuses
from support.graphs import node
from support.mutations import ancestors
from support.templates import FILM, FILM_FILE, IMAGE_FILE, LARGER, LORAS, PIXELS, SOUND_FILE, find, graph_of, small

CHECKPOINT = (  # on the demo world's checkpoint, with small files of what else they load
    *("default", "embedding_example", "image2image", "inpaint_example", "inpaint_model_outpainting"),
    *("lora", "lora_multiple", "hiresfix_latent_workflow", "latent_upscale_different_prompt_model"),
    *("sdxl_simple_example", "sdxl_refiner_prompt_example", "sdxlturbo_example"),
    *("flux_dev_checkpoint_example", "flux_schnell", "sd3.5_simple_example"),
    *("area_composition", "area_composition_square_area_for_subject", "controlnet_example", "depth_controlnet"),
    *("mixing_controlnets", "2_pass_pose_worship", "esrgan_example", "hiresfix_esrgan_workflow"),
    *("gligen_textbox_example", "sd3.5_large_blur", "sd3.5_large_canny_controlnet_example"),
    *("image_netayume_lumina_t2i", "sdxl_revision_text_prompts", "image_to_video", "txt_to_image_to_video"),
    *("depth_t2i_adapter", "sd3.5_large_depth"),
)
SPLIT = (  # the same, with stand-ins for the loaders of the diffusion model and of the text encoder
    *("flux1_krea_dev", "flux_fill_inpaint_example", "flux_fill_outpaint_example", "image_qwen_image"),
    *("image_z_image_turbo", "image_chroma_text_to_image", "hidream_i1_dev", "image_omnigen2_t2i"),
    *("hidream_i1_fast", "hidream_i1_full", "hidream_e1_1", "hidream_e1_full", "image_omnigen2_image_edit"),
    *("flux_canny_model_example", "flux_kontext_dev_basic", "image_qwen_image_union_control_lora"),
    *("image_flux2", "image_flux2_fp8", "image_chroma1_radiance_text_to_image"),
    *("image_qwen_image_edit", "image_qwen_image_edit_2509", "01_qwen_t2i_subgraphed"),
    *("02_qwen_Image_edit_subgraphed", "image_flux.1_fill_dev_OneReward"),
    *("image_qwen_image_instantx_inpainting_controlnet", "image_qwen_image_instantx_controlnet"),
    *("flux_depth_lora_example", "image_lotus_depth_v1_1", "flux_redux_model_example"),
    *("flux_dev_full_text_to_image", "flux_schnell_full_text_to_image", "image_qwen_image_controlnet_patch"),
)
VIDEO = (  # on a toy of Wan 2.1, with stand-ins for all loaders
    *("text_to_video_wan", "video_wan2_2_14B_t2v", "hunyuan_video_text_to_video", "mochi_text_to_video_example"),
    *("video_wan2_2_14B_i2v", "video_wan2_2_14B_flf2v", "03_video_wan2_2_14B_i2v_subgraphed"),
    *("video_wan2_2_14B_fun_inpaint", "video_wan2_2_14B_fun_camera", "video_wan2_2_14B_fun_control"),
    *("video_wan2_2_5B_ti2v", "video_wan2_2_5B_fun_inpaint", "video_wan2_2_5B_fun_control"),
    *("video_wan2.1_alpha_t2v_14B", "video_wan2.1_fun_camera_v1.1_1.3B", "video_wan2.1_fun_camera_v1.1_14B"),
    *("image_to_video_wan", "wan2.1_flf2v_720_f16", "video_wan_ati", "image_chrono_edit_14B"),
    *("video_wan_vace_14B_t2v", "video_wan_vace_14B_ref2v", "video_wan_vace_14B_v2v", "video_wan_vace_flf2v"),
    *("video_wan_vace_inpainting", "video_wan_vace_outpainting", "ltxv_text_to_video"),
    *("video_hunyuan_video_1.5_720p_t2v", "video_humo", "video_wan2_2_14B_s2v"),
)
LTX = ("ltxv_image_to_video",)  # on a toy of LTX Video and of its VAE, as the node makes latents of their shape
REFUSED = {  # templates in which attention is multiplied or evaluations are skipped -> the code
    "wan2.1_fun_inp": "model.refused",
    "wan2.1_fun_control": "model.refused",
    "flux1_dev_uso_reference_image_gen": "model.patched",
}
FLUX_TEXT = ("flux_dev_full_text_to_image", "flux_schnell_full_text_to_image")
TEMPLATES = (*CHECKPOINT, *SPLIT, *VIDEO, *LTX)
EXTRAS = (  # of comfy_extras, whose nodes the templates hold
    *("attention_multiply", "camera_trajectory", "canny", "cfg", "chroma_radiance", "compositing", "cond"),
    *("controlnet", "differential_diffusion", "easycache", "edit_model", "flux", "hidream", "hunyuan"),
    *("images", "ip2p", "latent", "lotus", "lt", "mask", "mochi", "model_advanced", "model_patch"),
    *("post_processing", "primitive", "qwen", "rebatch", "rope", "sd3", "slg", "string", "upscale_model"),
    *("video", "video_model", "wan"),
)
VAE_LOADER = "VAELoader"
OWN = "SD15"  # the family of the demo world's model
KEPT = {VAE_LOADER: "vae_name", template_toys.CHECKPOINT: "ckpt_name"}
DECODERS, SHOWN = ("VAEDecode", "VAEDecodeTiled"), ("PreviewImage", "MaskPreview", "SaveImage", "SaveAnimatedWEBP")
NO_EDITS = ("ImageInvert", "JoinImageWithAlpha")


@pytest.fixture(scope="module", autouse=True)
def nodes(comfy, loras, loaded) -> Iterator[None]:
    before = dict(comfy.nodes.NODE_CLASS_MAPPINGS)
    folder = Path(comfy.nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        asyncio.run(comfy.nodes.load_custom_node(str(folder / f"nodes_{name}.py"), module_parent="comfy_extras"))
    for name in audio_nodes.NODES:
        audio_nodes.load(comfy, name)
    inputs = Path(comfy.folder_paths.get_input_directory())
    inputs.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[24:72, 24:72, 3] = 0  # the mask
    Image.fromarray(pixels).save(inputs / IMAGE_FILE)
    template_toys.write_film(inputs / FILM_FILE, FILM["length"], PIXELS)
    audio_nodes.write_sound(inputs / SOUND_FILE)
    with template_toys.files(comfy, loaded[0]):
        yield
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - set(before):
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


@pytest.fixture(scope="module")
def video(comfy) -> tuple:
    """The toy of a model of video, and LoRAs for it."""
    video_toys.write_loras(comfy)
    return video_toys.VideoLoader().run()


@pytest.fixture(scope="module")
def beside(comfy) -> tuple:
    """What some templates load besides: CLIP vision, a style model, toys of the families in ``OTHERS``."""
    others = (template_toys.other(comfy, family) for family in template_toys.OTHERS)
    return template_toys.vision(comfy.base), template_toys.style(), *others


@pytest.fixture(scope="module")
def flux_clip():
    """A text encoder for the templates whose prompts are for Flux's."""
    return template_toys.flux_clip()


@pytest.fixture
def toys(comfy, loaded, beside, request, monkeypatch) -> None:
    """Stand-ins for the loaders that a template has."""
    name, classes = request.node.callspec.params["name"], comfy.nodes.NODE_CLASS_MAPPINGS
    model, clip, vae = request.getfixturevalue("video") if _is_film(name) else loaded
    vision, style, lotus, film, ltx = beside
    if name in LTX:
        model, clip, vae = ltx, template_toys.ltx_clip(), video_toys.ltx_vae()
    if name in FLUX_TEXT:
        clip = request.getfixturevalue("flux_clip")
    made: dict[str, Callable[[dict], tuple]] = {template_toys.VISION: lambda given: (vision,)}
    made[template_toys.STYLE] = lambda given: (style,)
    made[template_toys.HEARING] = lambda given: (template_toys.Hearing(),)
    made[template_toys.PATCH] = lambda given: (template_toys.patch(),)
    made[template_toys.IMAGE_CHECKPOINT] = lambda given: (film, vision, vae)
    for kind in template_toys.MODELS:
        made[kind] = lambda given: (lotus if template_toys.is_lotus(given) else model,)
    made |= {kind: lambda given: (clip,) for kind in template_toys.CLIPS}
    if _is_film(name):
        made |= {template_toys.CHECKPOINT: lambda given: (model, clip, vae), VAE_LOADER: lambda given: (vae,)}
    for kind, one in made.items():
        monkeypatch.setitem(classes, kind, template_toys.stand_in(classes[kind], one))
    sizes = classes["FluxKontextImageScale"].execute.__func__.__globals__
    monkeypatch.setitem(sizes, "PREFERED_KONTEXT_RESOLUTIONS", [(LARGER, LARGER)])  # not a million pixels


def safety_of(name: str, loader: dict) -> str:
    """The safety LoRA for what a loader of a template gives."""
    if template_toys.is_lotus(loader["inputs"]):
        return template_toys.OTHERS["LotusD"]
    if loader["class_type"] == template_toys.IMAGE_CHECKPOINT:
        return template_toys.OTHERS["SVD_img2vid"]
    return template_toys.OTHERS["LTXV"] if name in LTX else video_toys.SAFETY if _is_film(name) else drop_in.SAFETY


def _is_film(name: str) -> bool:
    return name in (*VIDEO, *LTX) or name.startswith("wan2.1")


def sources(graph: dict) -> dict[str, dict[str, list]]:
    """What goes through each guard: of every loader of a diffusion model the MODEL, and the CLIP and VAE beside it.

    A CLIP or VAE that is loaded by itself goes through the first guard that has none in use. A VAE for which there is
    none has a guard of its own.
    """
    found: dict[str, dict[str, list]] = {}
    for name, one in graph.items():
        if one["class_type"] == template_toys.CHECKPOINT:
            found[name] = {"model": [name, 0], "clip": [name, 1], "vae": [name, 2]}
        elif one["class_type"] == template_toys.IMAGE_CHECKPOINT:
            found[name] = {"model": [name, 0], "vae": [name, 2]}
        elif one["class_type"] in template_toys.MODELS:
            found[name] = {"model": [name, 0]}
    used = [link for one in graph.values() for link in one["inputs"].values() if isinstance(link, list)]
    for name, one in graph.items():
        key = "vae" if one["class_type"] == VAE_LOADER else "clip" if one["class_type"] in template_toys.CLIPS else ""
        if key:
            free = next((links for links in found.values() if links.get(key) not in used), None)
            if free is None:
                free = found[name] = {}
            free[key] = [name, 0]
    return found


def with_guards(graph: dict, name: str) -> dict:
    """A Guard behind each loader of a model, and no other change but the links that now come from it."""
    made, found = copy.deepcopy(graph), sources(graph)
    first = next(iter(found))
    for loader, links in found.items():
        of = loader if "model" in links else first
        _moved(made, links, f"guard_{loader}", ("model", "clip", "vae"))
        given = {"model": found[of]["model"], **links, "lora_name": safety_of(name, graph[of]), "strength": 1.0}
        made[f"guard_{loader}"] = node("ModularLoraGuard", **given)
    return made


def with_merges(graph: dict, name: str) -> dict:
    made = copy.deepcopy(graph)
    for loader, links in sources(graph).items():
        links.pop("vae", None)
        if not links:
            continue
        _moved(made, links, f"merge_{loader}", ("model", "clip"))
        both = {f"strength_{key}": 1.0 for key in links}
        kind = "LoraLoader" if "clip" in links else "LoraLoaderModelOnly"
        made[f"merge_{loader}"] = node(kind, lora_name=safety_of(name, graph[loader]), **links, **both)
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
    by = "ltx" if name in LTX else "video" if _is_film(name) else "n"
    graph = small(graph_of(path, comfy.nodes.NODE_CLASS_MAPPINGS, by), (video_toys.TASK,) if _is_film(name) else LORAS)
    for one in graph.values():
        if one["class_type"] in KEPT and _is_film(name):  # ComfyUI keeps what the loader gave of the other file
            one["inputs"][KEPT[one["class_type"]]] = by
    return graph


def shows_unattested(graph: dict) -> bool:
    """Whether an image is shown that no VAE decoded, or that a node made which is no edit: a policy must say so."""
    behind = (ancestors(graph, name) for name, one in graph.items() if one["class_type"] in SHOWN)
    kinds = ({graph[name]["class_type"] for name in names} for names in behind)
    return any(not some & set(DECODERS) or some & set(NO_EDITS) for some in kinds)


def decoded(graph: dict, results: dict) -> dict:
    """What each VAE Decode of a graph gave."""
    return {key: results[key][0].clone() for key, one in graph.items() if one["class_type"] in DECODERS}


@pytest.fixture
def judged(comfy, run_graph, matrix) -> Callable[[str, str, dict, dict], None]:
    """Compares a template's images with those of the merge, and notes a row of what is known of them."""

    def judge(file: str, name: str, graph: dict, ours: dict) -> None:
        known = [comfy.ledger.known(image) for images in ours.values() for image in images]
        merge, alone = (decoded(graph, run_graph(made)) for made in (with_merges(graph, name), graph))
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
    judged("templates.json", name, graph, decoded(graph, run_graph(with_guards(graph, name))))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_multiplies_attention_or_skips_evaluations_is_refused(comfy, toys, run_graph, name):
    with refuses(REFUSED[name]):
        run_graph(with_guards(template(comfy, name), name))


def _required(sha256: str, file: str, family: str) -> str:
    said = f', family = "{family}"' if family else ""
    return f'{{sha256 = "{sha256}", file = "{file}", min_net_strength = 0.9{said}}}'


@pytest.fixture
def attached(comfy, operator, run_graph, sha256) -> Callable[[dict, str], dict]:
    """Queues a template's graph as it is under a policy that guards every model, and runs it."""

    def run(graph: dict, name: str) -> dict:
        loaders = [(graph[loader], links) for loader, links in sources(graph).items()]
        files = dict.fromkeys(safety_of(name, loader) for loader, links in loaders if "model" in links)
        families = dict(zip(template_toys.OTHERS.values(), template_toys.OTHERS, strict=True))
        some = [_required(sha256(file), file, families.get(file, OWN) if len(files) > 1 else "") for file in files]
        shown = "[open]\nunattested = true\n" if shows_unattested(graph) else ""
        operator.write(f'[guard]\nattach = "always"\nrequired = [{", ".join(some)}]\n{shown}')
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
