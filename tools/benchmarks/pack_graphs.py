"""What people do with other packs' nodes, as graphs on the demo world: ordinary ones, in which nothing is guarded yet.

Widgets that a graph leaves out are filled from what the server says of the node (`packs.completed`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modular_lora_guard.tools.demo.graphs import Graph, Link, node

from ..world import CHECKPOINT, TASK_LORA

WORDS, SEED, STEPS, CFG, SIDE = "gloss, racing car", 7, 4, 3.0, 64
TAG = f"<lora:{TASK_LORA.removesuffix('.safetensors')}:1>"
SAMPLING = {"steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple"}
MODEL, CLIP, VAE = ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2]
LINKS = {"model": MODEL, "clip": CLIP, "vae": VAE}
CONDS = {"positive": ["positive", 0], "negative": ["negative", 0]}
LORA = {"lora_name": TASK_LORA, "strength_model": 1.0, "strength_clip": 1.0}


@dataclass(frozen=True)
class Case:
    """One use of a pack.

    Attributes:
        pack: The pack's folder.
        use: What is done with it, in words.
        graph: The ordinary graph; "save" writes its images.
        links: The MODEL, CLIP and VAE that go through the guard.
    """

    pack: str
    use: str
    graph: Graph
    links: dict[str, Link]


_made: list[tuple[str, str, dict[str, Link], Callable[[Graph], None]]] = []


def use(pack: str, what: str, links: dict[str, Link] = LINKS):
    """A function that changes the ordinary graph into one that uses a pack."""

    def register(change: Callable[[Graph], None]) -> Callable[[Graph], None]:
        _made.append((pack, what, links, change))
        return change

    return register


def cases() -> Iterator[Case]:
    """Every use, in the order in which they stand here."""
    for pack, what, links, change in _made:
        graph = ordinary()
        change(graph)
        yield Case(pack, what, graph, links)


def ordinary() -> Graph:
    """Checkpoint, two prompts, KSampler, VAE Decode, Save Image."""
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": node("CLIPTextEncode", text=WORDS, clip=CLIP),
        "negative": node("CLIPTextEncode", text="", clip=CLIP),
        "latent": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "sample": node(
            "KSampler", model=MODEL, seed=SEED, denoise=1.0, latent_image=["latent", 0], **CONDS, **SAMPLING
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=VAE),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="packs"),
    }


def guarded(case: Case, safety: str) -> Graph:
    """One node more: *Guard* behind what loads the checkpoint."""
    return _through(case, node("ModularLoraGuard", lora_name=safety, strength=1.0, **case.links), tuple(LINKS))


def merged(case: Case, safety: str) -> Graph:
    """The safety LoRA merged by ComfyUI's own loader in that place."""
    links = {key: link for key, link in case.links.items() if key != "vae"}
    return _through(
        case,
        node("LoraLoader", lora_name=safety, strength_model=1.0, strength_clip=1.0, **links),
        ("model", "clip"),
    )


def _through(case: Case, one: dict[str, Any], outputs: tuple[str, ...]) -> Graph:
    made = copy.deepcopy(case.graph)
    for inputs in (other["inputs"] for other in made.values()):
        for key, link in inputs.items():
            through = [i for i, name in enumerate(outputs) if link == case.links[name]]
            inputs[key] = ["safe", through[0]] if through else link
    return made | {"safe": one}


def loader(graph: Graph, kind: str, **inputs: Any) -> None:
    """A loader of LoRAs between the checkpoint and all that uses it."""
    graph["lora"] = node(kind, model=MODEL, clip=CLIP, **inputs)
    _use(graph, ["lora", 0], ["lora", 1])


def task(graph: Graph) -> None:
    """The task LoRA by ComfyUI's own loader."""
    loader(graph, "LoraLoader", **LORA)


def _use(graph: Graph, model: Link, clip: Link | None = None) -> None:
    graph["sample"]["inputs"]["model"] = model
    for name in ("positive", "negative") if clip else ():
        graph[name]["inputs"]["clip"] = clip


def sampler(graph: Graph, kind: str, **changes: Any) -> None:
    """Another node in KSampler's place, with KSampler's inputs as they are here."""
    inputs = graph["sample"]["inputs"] | changes
    graph["sample"] = node(kind, **{key: value for key, value in inputs.items() if value is not None})


def image(graph: Graph, kind: str, key: str = "image", **inputs: Any) -> None:
    """A node between decoding and saving."""
    graph["edit"] = node(kind, **{key: ["decode", 0]}, **inputs)
    graph["save"]["inputs"]["images"] = ["edit", 0]


def larger(graph: Graph, side: int = 2 * SIDE) -> None:
    graph["latent"]["inputs"] |= {"width": side, "height": side}


# Loaders of LoRAs


@use("rgthree-comfy", "Power Lora Loader, two LoRAs, one of them off")
def _(graph: Graph) -> None:
    on = {"on": True, "lora": TASK_LORA, "strength": 1.0}
    loader(graph, "Power Lora Loader (rgthree)", lora_1=on, lora_2={**on, "on": False})


@use("rgthree-comfy", "Lora Loader Stack")
def _(graph: Graph) -> None:
    loader(graph, "Lora Loader Stack (rgthree)", lora_01=TASK_LORA)


@use("rgthree-comfy", "Power Prompt with a LoRA's tag, Context")
def _(graph: Graph) -> None:
    graph["prompt"] = node("Power Prompt (rgthree)", prompt=f"{WORDS} {TAG}", opt_model=MODEL, opt_clip=CLIP)
    given = {"model": ["prompt", 1], "clip": ["prompt", 2], "vae": VAE, "positive": ["prompt", 0]}
    graph["context"] = node("Context (rgthree)", **given, latent=["latent", 0])
    graph["sample"]["inputs"] |= {"model": ["context", 1], "positive": ["context", 4], "latent_image": ["context", 6]}
    graph["decode"]["inputs"]["vae"] = ["context", 3]


@use("ComfyUI-Inspire-Pack", "Lora Loader (Block Weight)")
def _(graph: Graph) -> None:
    vector = ",".join("1" if i % 3 else "0.6" for i in range(17))
    loader(graph, "LoraLoaderBlockWeight //Inspire", **LORA, block_vector=vector)


@use("ComfyUI-Inspire-Pack", "Wildcard Encode with a LoRA's tag")
def _(graph: Graph) -> None:
    words = f"{WORDS} {TAG}"
    inputs = {"wildcard_text": words, "populated_text": words, "mode": "populate", "weight_interpretation": "comfy"}
    graph["positive"] = node("WildcardEncode //Inspire", model=MODEL, clip=CLIP, seed=1, **inputs)
    graph["sample"]["inputs"] |= {"model": ["positive", 0], "positive": ["positive", 2]}


@use("ComfyUI-Impact-Pack", "Wildcard Encode with a LoRA's tag")
def _(graph: Graph) -> None:
    words = f"{WORDS} {TAG}"
    inputs = {"wildcard_text": words, "populated_text": words, "mode": True, "seed": 1}
    graph["positive"] = node("ImpactWildcardEncode", model=MODEL, clip=CLIP, **inputs)
    graph["sample"]["inputs"] |= {"model": ["positive", 0], "positive": ["positive", 2]}


@use("ComfyUI_Comfyroll_CustomNodes", "CR Load LoRA")
def _(graph: Graph) -> None:
    loader(graph, "CR Load LoRA", switch="On", **LORA)


@use("ComfyUI_Comfyroll_CustomNodes", "CR LoRA Stack, CR Apply LoRA Stack")
def _(graph: Graph) -> None:
    graph["stack"] = node("CR LoRA Stack", switch_1="On", lora_name_1=TASK_LORA, model_weight_1=1.0, clip_weight_1=1.0)
    loader(graph, "CR Apply LoRA Stack", lora_stack=["stack", 0])


@use("ComfyUI-Easy-Use", "easy loraStack, easy loraStackApply")
def _(graph: Graph) -> None:
    one = {"lora_1_name": TASK_LORA, "lora_1_strength": 1.0}
    graph["stack"] = node("easy loraStack", toggle=True, mode="simple", num_loras=1, **one)
    graph["lora"] = node("easy loraStackApply", lora_stack=["stack", 0], model=MODEL, optional_clip=CLIP)
    _use(graph, ["lora", 0], ["lora", 1])


@use("was-node-suite-comfyui", "Load Lora")
def _(graph: Graph) -> None:
    loader(graph, "Load Lora", **LORA)


@use("ComfyUI-Custom-Scripts", "Lora Loader of pysssss")
def _(graph: Graph) -> None:
    loader(graph, "LoraLoader|pysssss", **LORA)


@use("ComfyUI-Lora-Manager", "Lora Loader")
def _(graph: Graph) -> None:
    one = {"name": TASK_LORA.removesuffix(".safetensors"), "strength": 1.0, "clipStrength": 1.0, "active": True}
    loader(graph, "Lora Loader (LoraManager)", text="", loras={"__value__": [one]})


@use("ComfyUI-Lora-Manager", "LoRA Text Loader")
def _(graph: Graph) -> None:
    loader(graph, "LoRA Text Loader (LoraManager)", lora_syntax=TAG)


@use("comfyui-prompt-control", "prompt with a LoRA's tag and weights")
def _(graph: Graph) -> None:
    prompt_control(graph, f"gloss, (racing car:1.2) {TAG}")


@use("comfyui-prompt-control", "prompt that changes at half of the steps")
def _(graph: Graph) -> None:
    prompt_control(graph, f"gloss, [racing car:helicopter:0.5] {TAG}")


@use("comfyui-prompt-control", "a LoRA for the first half of the steps")
def _(graph: Graph) -> None:
    prompt_control(graph, f"{WORDS} [{TAG}::0.5]")


def prompt_control(graph: Graph, words: str) -> None:
    graph["lora"] = node("PCLazyLoraLoader", model=MODEL, clip=CLIP, text=words)
    graph["positive"] = node("PCLazyTextEncode", clip=["lora", 1], text=words)
    graph["negative"] = node("PCLazyTextEncode", clip=["lora", 1], text="")
    graph["sample"]["inputs"]["model"] = ["lora", 0]


@use("cgem156-ComfyUI", "Multiple LoRA Loader, a LoRA from weights")
def _(graph: Graph) -> None:
    graph["weights"] = node("LoraLoaderWeightOnly|cgem156", lora_name=TASK_LORA, strength_model=0.5, lbw="")
    graph["first"] = node("LoraLoaderFromWeight|cgem156", lora=["weights", 0], model=MODEL, clip_optional=CLIP)
    one = {"lora_name_0": TASK_LORA, "strength_model_0": 0.5}
    graph["lora"] = node("MultipleLoraLoader3|cgem156", model=["first", 0], clip_optional=["first", 1], **one)
    _use(graph, ["lora", 0], ["lora", 1])


# Loaders and samplers of their own


@use("ComfyUI-Easy-Use", "easy fullLoader with a LoRA, fed by its overrides; preSampling, kSampler")
def _(graph: Graph) -> None:
    easy_loader(graph)
    graph["settings"] = node("easy preSampling", pipe=["loader", 0], seed=SEED, **SAMPLING)
    graph["decode"] = node("easy kSampler", pipe=["settings", 0], image_output="Hide")
    graph["save"]["inputs"]["images"] = ["decode", 1]
    del graph["sample"], graph["positive"], graph["negative"], graph["latent"]


@use("ComfyUI-Easy-Use", "easy fullkSampler")
def _(graph: Graph) -> None:
    easy_loader(graph)
    graph["decode"] = node("easy fullkSampler", pipe=["loader", 0], seed=SEED, image_output="Hide", **SAMPLING)
    graph["save"]["inputs"]["images"] = ["decode", 1]
    del graph["sample"], graph["positive"], graph["negative"], graph["latent"]


def easy_loader(graph: Graph) -> None:
    sizes = {"resolution": "width x height (custom)", "empty_latent_width": SIDE, "empty_latent_height": SIDE}
    said = {"ckpt_name": CHECKPOINT, "lora_name": TASK_LORA, "positive": WORDS, "clip_skip": -1}
    over = {"model_override": MODEL, "clip_override": CLIP, "vae_override": VAE}
    graph["loader"] = node("easy fullLoader", **said, **over, **sizes)


EFFICIENT = {"model": ["loader", 0], "clip": ["loader", 5], "vae": ["loader", 4]}


@use("efficiency-nodes-comfyui", "Efficient Loader with a LoRA, KSampler (Efficient)", EFFICIENT)
def _(graph: Graph) -> None:
    efficient(graph)


@use("efficiency-nodes-comfyui", "LoRA Stacker, KSampler (Efficient) with the HighRes-Fix Script", EFFICIENT)
def _(graph: Graph) -> None:
    efficient(graph, lora_name="None", lora_stack=["stack", 0])
    graph["stack"] = node("LoRA Stacker", input_mode="simple", lora_count=1, lora_name_1=TASK_LORA, lora_wt_1=1.0)
    graph["script"] = node("HighRes-Fix Script", upscale_type="latent", hires_steps=4, upscale_by=1.5, denoise=0.5)
    graph["decode"]["inputs"]["script"] = ["script", 0]


@use("efficiency-nodes-comfyui", "XY Plot over seeds", EFFICIENT)
def _(graph: Graph) -> None:
    efficient(graph)
    graph["seeds"] = node("XY Input: Seeds++ Batch", batch_count=2)
    graph["plot"] = node("XY Plot", X=["seeds", 0], dependencies=["loader", 6], ksampler_output_image="Images")
    graph["decode"]["inputs"]["script"] = ["plot", 0]


def efficient(graph: Graph, **changes: Any) -> None:
    """The loader's own conditionings were encoded before the guard; a safety LoRA with a CLIP half refuses those."""
    said = {"ckpt_name": CHECKPOINT, "lora_name": TASK_LORA, "positive": WORDS, "negative": "", "clip_skip": -1}
    graph["loader"] = node("Efficient Loader", empty_latent_width=SIDE, empty_latent_height=SIDE, **said | changes)
    links = {"positive": ["loader", 1], "negative": ["loader", 2], "latent_image": ["loader", 3]}
    graph["decode"] = node(
        "KSampler (Efficient)", model=["loader", 0], optional_vae=["loader", 4], seed=SEED, **links, **SAMPLING
    )
    graph["decode"]["inputs"] |= {"preview_method": "auto", "vae_decode": "true", "denoise": 1.0}
    graph["save"]["inputs"]["images"] = ["decode", 5]
    for name in ("checkpoint", "positive", "negative", "latent", "sample"):
        del graph[name]


@use("ComfyUI_tinyterraNodes", "pipeLoader with a LoRA's tag, fed by its overrides; pipeKSampler")
def _(graph: Graph) -> None:
    sizes = {"empty_latent_aspect": "width x height [custom]", "empty_latent_width": SIDE, "empty_latent_height": SIDE}
    said = {"ckpt_name": CHECKPOINT, "loras": TAG, "positive": WORDS, "negative": "", "seed": SEED}
    graph["loader"] = node("ttN pipeLoader_v2", model_override=MODEL, clip_override=CLIP, **said, **sizes)
    graph["decode"] = node(
        "ttN pipeKSampler_v2", pipe=["loader", 0], image_output="Hide", seed=SEED, optional_vae=VAE, **SAMPLING
    )
    graph["save"]["inputs"]["images"] = ["decode", 7]
    for name in ("positive", "negative", "latent", "sample"):
        del graph[name]


@use("ComfyUI_tinyterraNodes", "tinyKSampler with a LoRA")
def _(graph: Graph) -> None:
    given = {"latent": ["latent", 0], "vae": VAE, "clip": CLIP, "lora_name": TASK_LORA, "lora_strength": 1.0}
    graph["decode"] = node("ttN KSampler_v2", model=MODEL, seed=SEED, image_output="Hide", **given, **CONDS, **SAMPLING)
    graph["save"]["inputs"]["images"] = ["decode", 6]
    del graph["sample"]


@use("ComfyUI-Inspire-Pack", "KSampler with a variation seed")
def _(graph: Graph) -> None:
    task(graph)
    sampler(graph, "KSampler //Inspire", noise_mode="CPU", variation_seed=3, variation_strength=0.2)


@use("ComfyUI-Inspire-Pack", "KSampler Advanced")
def _(graph: Graph) -> None:
    task(graph)
    sampler(graph, "KSamplerAdvanced //Inspire", seed=None, denoise=None, noise_seed=SEED, noise_mode="CPU")


@use("was-node-suite-comfyui", "KSampler (WAS), Image Resize")
def _(graph: Graph) -> None:
    task(graph)
    graph["seed"] = node("Seed", seed=SEED)
    sampler(graph, "KSampler (WAS)", seed=["seed", 0])
    image(graph, "Image Resize", mode="rescale", rescale_factor=2.0, resampling="bicubic", supersample="false")


@use("ComfyUI_essentials", "KSampler Variations with Noise Injection, Image Resize")
def _(graph: Graph) -> None:
    task(graph)
    sampler(graph, "KSamplerVariationsWithNoise+", seed=None, main_seed=SEED, variation_seed=5)
    image(graph, "ImageResize+", width=96, height=96)


@use("RES4LYF", "ClownsharKSampler")
def _(graph: Graph) -> None:
    task(graph)
    sampler(graph, "ClownsharKSampler_Beta", sampler_name="multistep/res_2m", eta=0.5)


@use("ComfyUI_TiledKSampler", "Tiled KSampler")
def _(graph: Graph) -> None:
    task(graph)
    larger(graph, 320)
    sampler(graph, "BNK_TiledKSampler", tile_width=256, tile_height=256, tiling_strategy="simple")


@use("ComfyUI-TiledDiffusion", "Tiled Diffusion")
def _(graph: Graph) -> None:
    task(graph)
    larger(graph)
    graph["tiled"] = node("TiledDiffusion", model=["lora", 0], tile_width=SIDE, tile_height=SIDE, tile_overlap=16)
    graph["sample"]["inputs"]["model"] = ["tiled", 0]


# Prompts


@use("ComfyUI_ADV_CLIP_emb", "weights as A1111 reads them, mean normalisation")
def _(graph: Graph) -> None:
    task(graph)
    words = {"text": "gloss, (racing car:1.3)", "token_normalization": "mean", "weight_interpretation": "A1111"}
    graph["positive"] = node("BNK_CLIPTextEncodeAdvanced", clip=["lora", 1], **words)


@use("ComfyUI_smZNodes", "CLIP Text Encode++ with A1111's parser")
def _(graph: Graph) -> None:
    task(graph)
    words = {"text": "gloss, (racing car:1.3)", "parser": "A1111"}
    graph["positive"] = node("smZ CLIPTextEncode", clip=["lora", 1], **words)


@use("ComfyUI-ppm", "CLIP NegPip, Attention Couple")
def _(graph: Graph) -> None:
    task(graph)
    graph["negpip"] = node("CLIPNegPip", model=["lora", 0], clip=["lora", 1])
    graph["mask"] = node("SolidMask", value=1.0, width=SIDE, height=SIDE)
    graph["couple"] = node("AttentionCouplePPM", model=["negpip", 0], base_cond=["positive", 0], base_mask=["mask", 0])
    _use(graph, ["couple", 0], ["negpip", 1])
    graph["positive"]["inputs"]["text"] = "gloss, racing car, (dark:-0.5)"


@use("cg-use-everywhere", "Anything Everywhere in the graph (the links are the front end's)")
def _(graph: Graph) -> None:
    task(graph)
    graph["everywhere"] = node("Anything Everywhere", anything=["lora", 0])


# Guidance, control and animation


@use("sd-perturbed-attention", "Perturbed-Attention Guidance")
def _(graph: Graph) -> None:
    task(graph)
    graph["pag"] = node("PerturbedAttention", model=["lora", 0], scale=2.0)
    graph["sample"]["inputs"]["model"] = ["pag", 0]


@use("Skimmed_CFG", "Skimmed CFG")
def _(graph: Graph) -> None:
    task(graph)
    graph["skim"] = node("Skimmed CFG", model=["lora", 0], Skimming_CFG=2.0)
    graph["sample"]["inputs"]["model"] = ["skim", 0]


@use("ComfyUI-Advanced-ControlNet", "a ControlNet (random weights) by its Apply node")
def _(graph: Graph) -> None:
    task(graph)
    graph["control"] = node("TrialControlNet", model=MODEL)
    graph["hint"] = node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0x3366CC)
    given = {"control_net": ["control", 0], "image": ["hint", 0], "strength": 0.7}
    graph["applied"] = node("ACN_AdvancedControlNetApply_v2", **CONDS, **given)
    graph["sample"]["inputs"] |= {"positive": ["applied", 0], "negative": ["applied", 1]}


@use("ComfyUI-AnimateDiff-Evolved", "Evolved Sampling of eight frames in context windows, no motion model")
def _(graph: Graph) -> None:
    task(graph)
    graph["latent"]["inputs"]["batch_size"] = 8
    graph["windows"] = node("ADE_StandardStaticContextOptions", context_length=4, context_overlap=2)
    graph["evolved"] = node("ADE_UseEvolvedSampling", model=["lora", 0], context_options=["windows", 0])
    graph["sample"]["inputs"]["model"] = ["evolved", 0]


@use("ComfyUI-AnimateDiff-Evolved", "a LoRA hook on the positive prompt")
def _(graph: Graph) -> None:
    graph["hook"] = node("ADE_RegisterLoraHook", model=MODEL, clip=CLIP, **LORA)
    graph["hooked"] = node("ADE_AttachLoraHookToConditioning", conditioning=["positive", 0], lora_hook=["hook", 2])
    _use(graph, ["hook", 0], ["hook", 1])
    graph["sample"]["inputs"]["positive"] = ["hooked", 0]


@use("ComfyUI-VideoHelperSuite", "VAE Decode Batched, Select Every Nth Image, Video Combine")
def _(graph: Graph) -> None:
    task(graph)
    graph["latent"]["inputs"]["batch_size"] = 4
    graph["decode"] = node("VHS_VAEDecodeBatched", samples=["sample", 0], vae=VAE, per_batch=2)
    image(graph, "VHS_SelectEveryNthImage", "images", select_every_nth=2)
    graph["video"] = node("VHS_VideoCombine", images=["decode", 0], format="image/gif", save_output=True)


@use("ComfyUI-GGUF", "U-Net as Q8_0, a LoRA by ComfyUI's loader", LINKS | {"model": ["unet", 0]})
def _(graph: Graph) -> None:
    graph["unet"] = node("UnetLoaderGGUF", unet_name="trial.gguf")
    graph["lora"] = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=TASK_LORA, strength_model=1.0)
    graph["sample"]["inputs"]["model"] = ["lora", 0]


# Detailers, upscalers and inpainting


@use("ComfyUI-Impact-Pack", "FaceDetailer")
def _(graph: Graph) -> None:
    task(graph)
    face_detailer(graph)


@use("ComfyUI-Impact-Pack", "FaceDetailer whose wildcard names a LoRA")
def _(graph: Graph) -> None:
    face_detailer(graph, wildcard=f"{WORDS} {TAG}")


def face_detailer(graph: Graph, **changes: Any) -> None:
    model, clip = (["lora", 0], ["lora", 1]) if "lora" in graph else (MODEL, CLIP)
    graph["detector"] = node("TrialDetector")
    given = {"model": model, "clip": clip, "vae": VAE, "bbox_detector": ["detector", 0], "seed": SEED, "denoise": 0.5}
    sizes = {"guide_size": 64.0, "max_size": 64.0, "feather": 2, "bbox_crop_factor": 1.5, "wildcard": ""}
    image(graph, "FaceDetailer", **CONDS, **SAMPLING, **given, **sizes | changes)


@use("ComfyUI-Impact-Pack", "FaceDetailer of an image from outside")
def _(graph: Graph) -> None:
    task(graph)
    outside(graph)
    face_detailer(graph)
    graph["edit"]["inputs"]["image"] = ["outside", 0]


@use("ComfyUI-Impact-Pack", "FaceDetailer with a hook for its crops")
def _(graph: Graph) -> None:
    task(graph)
    graph["hook"] = node("DenoiseSchedulerDetailerHookProvider", schedule_for_cycle="simple", target_denoise=0.4)
    face_detailer(graph, detailer_hook=["hook", 0], feather=3)


@use("ComfyUI-Impact-Pack", "FaceDetailer (pipe)")
def _(graph: Graph) -> None:
    task(graph)
    face_detailer(graph, feather=4)
    given = graph["edit"]["inputs"]
    taken = {key: given.pop(key) for key in ("model", "clip", "vae", "bbox_detector", "wildcard", *CONDS)}
    choices = {f"Select to add {what}": f"Select the {what} to add to the text" for what in ("LoRA", "Wildcard")}
    graph["pipe"] = node("ToDetailerPipe", **taken, **choices)
    graph["edit"] = node("FaceDetailerPipe", detailer_pipe=["pipe", 0], **given)


@use("ComfyUI-Impact-Pack", "Detailer (SEGS, pipe) of what a detector finds")
def _(graph: Graph) -> None:
    task(graph)
    graph["detector"] = node("TrialDetector")
    found = {"bbox_detector": ["detector", 0], "image": ["decode", 0], "crop_factor": 1.5}
    graph["segs"] = node("BboxDetectorSEGS", dilation=2, **found)
    graph["pipe"] = node("ToBasicPipe", model=["lora", 0], clip=["lora", 1], vae=VAE, **CONDS)
    given = {"basic_pipe": ["pipe", 0], "segs": ["segs", 0], "seed": SEED, "denoise": 0.5}
    sizes = {"guide_size": 64.0, "max_size": 64.0, "feather": 2}
    image(graph, "DetailerForEachPipe", **SAMPLING, **given, **sizes)


@use("ComfyUI-Impact-Pack", "Detailer (SEGS) of a mask from outside")
def _(graph: Graph) -> None:
    segments(graph)
    outside(graph)
    graph["mask"] = node("ImageToMask", image=["outside", 0], channel="red")


@use("ComfyUI-Impact-Pack", "Detailer (SEGS) of a mask")
def _(graph: Graph) -> None:
    segments(graph)


def segments(graph: Graph) -> None:
    task(graph)
    graph["mask"] = node("MaskComposite", destination=["dark", 0], source=["bright", 0], x=16, y=16, operation="add")
    graph["dark"] = node("SolidMask", value=0.0, width=SIDE, height=SIDE)
    graph["bright"] = node("SolidMask", value=1.0, width=24, height=24)
    graph["segs"] = node("MaskToSEGS", mask=["mask", 0], crop_factor=1.5)
    given = {"model": ["lora", 0], "clip": ["lora", 1], "vae": VAE, "segs": ["segs", 0], "seed": SEED, "denoise": 0.5}
    sizes = {"guide_size": 64.0, "max_size": 64.0, "feather": 2}
    image(graph, "DetailerForEach", **CONDS, **SAMPLING, **given, **sizes)


@use("ComfyUI-Impact-Pack", "Regional Sampler of two prompts")
def _(graph: Graph) -> None:
    task(graph)
    graph["left"] = node("MaskComposite", destination=["dark", 0], source=["bright", 0], x=0, y=0, operation="add")
    graph["dark"] = node("SolidMask", value=0.0, width=SIDE, height=SIDE)
    graph["bright"] = node("SolidMask", value=1.0, width=SIDE // 2, height=SIDE)
    given = {"model": ["lora", 0], "clip": ["lora", 1], "vae": VAE}
    graph["pipe"] = node("ToBasicPipe", **given, **CONDS)
    graph["base"] = node("KSamplerAdvancedProvider", basic_pipe=["pipe", 0], cfg=CFG, sampler_name="euler")
    graph["region"] = node("RegionalPrompt", mask=["left", 0], advanced_sampler=["base", 0])
    graph["regions"] = node("CombineRegionalPrompts", regional_prompts1=["region", 0])
    given = {"samples": ["latent", 0], "base_sampler": ["base", 0], "regional_prompts": ["regions", 0]}
    graph["sample"] = node("RegionalSampler", seed=SEED, seed_2nd=SEED, steps=STEPS, base_only_steps=2, **given)


@use("ComfyUI-Impact-Pack", "Iterative Upscale of the image")
def _(graph: Graph) -> None:
    task(graph)
    pixel = {"scale_method": "bilinear", "seed": SEED, "denoise": 0.5, "use_tiled_vae": False}
    given = {"model": ["lora", 0], "vae": VAE}
    graph["upscaler"] = node("PixelKSampleUpscalerProvider", **given, **CONDS, **SAMPLING, **pixel)
    graph["larger"] = node("IterativeLatentUpscale", samples=["sample", 0], upscale_factor=1.5, steps=2)
    graph["larger"]["inputs"] |= {"upscaler": ["upscaler", 0], "temp_prefix": ""}
    graph["decode"]["inputs"]["samples"] = ["larger", 0]


@use("ComfyUI_UltimateSDUpscale", "Ultimate SD Upscale with an upscale model")
def _(graph: Graph) -> None:
    task(graph)
    graph["upscaler"] = node("TrialUpscaleModel")
    ultimate(graph, "UltimateSDUpscale", "image", upscale_model=["upscaler", 0], upscale_by=2.0)


@use("ComfyUI_UltimateSDUpscale", "Ultimate SD Upscale (Custom Sample)")
def _(graph: Graph) -> None:
    task(graph)
    graph["sampler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("BasicScheduler", model=["lora", 0], scheduler="simple", steps=STEPS, denoise=0.4)
    custom = {"custom_sampler": ["sampler", 0], "custom_sigmas": ["sigmas", 0]}
    ultimate(graph, "UltimateSDUpscaleCustomSample", "image", upscale_by=2.0, **custom)


@use("ComfyUI_UltimateSDUpscale", "Ultimate SD Upscale (No Upscale) of an image from outside")
def _(graph: Graph) -> None:
    task(graph)
    outside(graph)
    ultimate(graph, "UltimateSDUpscaleNoUpscale", "upscaled_image")
    graph["edit"]["inputs"]["upscaled_image"] = ["outside", 0]


@use("ComfyUI_UltimateSDUpscale", "Ultimate SD Upscale (No Upscale)")
def _(graph: Graph) -> None:
    task(graph)
    ultimate(graph, "UltimateSDUpscaleNoUpscale", "upscaled_image")
    graph["larger"] = node("ImageScaleBy", image=["decode", 0], upscale_method="bicubic", scale_by=2.0)
    graph["edit"]["inputs"]["upscaled_image"] = ["larger", 0]


def ultimate(graph: Graph, kind: str, key: str, **more: Any) -> None:
    tiles = {"tile_width": 64, "tile_height": 64, "mask_blur": 4, "tile_padding": 16, "denoise": 0.4, "seed": SEED}
    image(graph, kind, key, model=["lora", 0], vae=VAE, **CONDS, **SAMPLING, **tiles, **more)


@use("ComfyUI-Inpaint-CropAndStitch", "Inpaint Crop, KSampler, Inpaint Stitch")
def _(graph: Graph) -> None:
    task(graph)
    graph["mask"] = node("MaskComposite", destination=["dark", 0], source=["bright", 0], x=16, y=16, operation="add")
    graph["dark"] = node("SolidMask", value=0.0, width=SIDE, height=SIDE)
    graph["bright"] = node("SolidMask", value=1.0, width=24, height=24)
    sizes = {"output_target_width": SIDE, "output_target_height": SIDE, "mask_blend_pixels": 4}
    graph["crop"] = node("InpaintCropImproved", image=["decode", 0], mask=["mask", 0], **sizes)
    links = {"pixels": ["crop", 1], "mask": ["crop", 2], "vae": VAE, "noise_mask": True}
    graph["inpaint"] = node("InpaintModelConditioning", **links, **CONDS)
    given = {"positive": ["inpaint", 0], "negative": ["inpaint", 1], "latent_image": ["inpaint", 2]}
    graph["second"] = node("KSampler", model=["lora", 0], seed=SEED, denoise=0.8, **given, **SAMPLING)
    graph["decoded"] = node("VAEDecode", samples=["second", 0], vae=VAE)
    graph["stitch"] = node("InpaintStitchImproved", stitcher=["crop", 0], inpainted_image=["decoded", 0])
    graph["save"]["inputs"]["images"] = ["stitch", 0]


# Images that come out, alone or in a batch with one from outside


# in sizes that differ: what is known of an image is known by its content
RESIZED = (
    (
        "ComfyUI-KJNodes",
        "Image Resize v2",
        "ImageResizeKJv2",
        {"keep_proportion": "stretch", "device": "cpu", "width": 96, "height": 96},
    ),
    ("ComfyUI_essentials", "Image Resize", "ImageResize+", {"width": 88, "height": 88}),
    ("rgthree-comfy", "Image Resize", "Image Resize (rgthree)", {"width": 80, "height": 80}),
    ("was-node-suite-comfyui", "Image Resize", "Image Resize", {"mode": "rescale", "resampling": "bicubic"}),
)


def resize(kind: str, inputs: dict[str, Any]) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        task(graph)
        outside(graph)
        image(graph, kind, **inputs)
        graph["batch"] = node("ImageBatch", image1=["decode", 0], image2=["outside", 0])
        graph["edit"]["inputs"]["image"] = ["batch", 0]

    return change


def outside(graph: Graph) -> None:
    graph["outside"] = node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0x884422)


for _pack, _name, _kind, _inputs in RESIZED:
    use(_pack, f"{_name} of the image and one from outside")(resize(_kind, _inputs))


@use("ComfyUI-KJNodes", "Image Resize v2, Image Concatenate")
def _(graph: Graph) -> None:
    task(graph)
    image(graph, "ImageResizeKJv2", width=96, height=96, keep_proportion="stretch", device="cpu")
    graph["joined"] = node("ImageConcanate", image1=["edit", 0], image2=["decode", 0], match_image_size=True)
    graph["save"]["inputs"]["images"] = ["joined", 0]


@use("ComfyUI-KJNodes", "Image Concatenate with an image from outside")
def _(graph: Graph) -> None:
    task(graph)
    outside(graph)
    image(graph, "ImageConcanate", "image1", image2=["outside", 0], match_image_size=True)


@use("ComfyUI-Custom-Scripts", "Constrain Image")
def _(graph: Graph) -> None:
    task(graph)
    image(graph, "ConstrainImage|pysssss", "images", max_width=48, max_height=48)


@use("ComfyUI-Custom-Scripts", "Constrain Image of an image from outside")
def _(graph: Graph) -> None:
    task(graph)
    outside(graph)
    image(graph, "ConstrainImage|pysssss", "images", max_width=48, max_height=48)
    graph["both"] = node("ImageBatch", image1=["decode", 0], image2=["outside", 0])
    graph["edit"]["inputs"]["images"] = ["both", 0]
