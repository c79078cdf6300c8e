"""Parts that do not run exactly once an evaluation: each is needed, and a lost branch is found in them too."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict

import pytest
from modular_lora_guard.modular_lora.guard.report import format_attestation
from support.errors import refuses
from support.families import Family, evaluate, make, named
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.pairs import Pair

BY_NAME = {family.name: family for family in (*IMAGE, *DITS, *VIDEOS, *NEWER)}


@pytest.fixture
def declared(comfy) -> dict:
    return sys.modules["modular_lora_guard.comfy_host.call_counts"].PARTS


def runs(family: Family, wanted: re.Pattern) -> dict[str, set[float]]:
    """How often each part whose path fits runs in one evaluation of the stock model, over all kinds of inputs."""
    model, calls, found = make(family), Counter(), defaultdict(set)
    network = model.model.diffusion_model
    for path, module in network.named_modules():
        if path == "" or wanted.fullmatch(path):
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
            calls[path] = 0
    for change in ({}, *family.variants.values()):
        calls.update({path: -n for path, n in calls.items()})
        evaluate(model, family, family.cond | change)
        for path in calls:
            found[path].add(calls[path] / calls[""])
    return found


CLASSES = {
    "Flux": ("Flux dev",),
    "ChromaRadiance": ("Chroma Radiance",),
    "HunyuanVideo": (
        "Hunyuan Video",
        "Hunyuan Video I2V",
        "Hunyuan Video 1.5",
        "Hunyuan Video 1.5 super resolution",
        "Hunyuan Image 2.1 refiner",
    ),
    "WanModel": ("Wan 2.1 I2V", "Wan 2.1 Fun control"),
    "VaceWanModel": ("Wan 2.1 VACE",),
    "CameraWanModel": ("Wan 2.1 camera",),
    "HumoWanModel": ("Wan 2.1 HuMo",),
    "WanModel_S2V": ("Wan 2.2 S2V",),
    "AnimateWanModel": ("Wan 2.2 Animate",),
    "OmniGen2Transformer2DModel": ("OmniGen2",),
    "HunYuanDiTPlain": ("Hunyuan 3D 2.1",),
    "ACEStepTransformer2DModel": ("ACE-Step",),
    "BooguTransformer2DModel": ("Boogu",),
    "PixDiT_T2I": ("PixelDiT",),
    "Anima": ("Anima",),
    "LTXAVModel": ("LTX Video with sound", "LTX Video 2.3 with sound"),
    "MiniMaxH3Model": ("MiniMax H3",),
    "HiDreamO1Transformer": ("HiDream O1",),
    "LatentSeqMMFlowModel": ("TripoSplat",),
    "AceStepConditionGenerationModel": ("ACE-Step 1.5",),
    "SCAILWanModel": ("Wan 2.1 SCAIL",),
    "SCAIL2WanModel": ("Wan 2.1 SCAIL 2",),
    "WanDancerModel": ("Wan 2.2 Dancer",),
    "WanAnimate2Model": ("Wan Animate 2",),
    "CausalWanModel": ("Wan 2.1 causal",),
}
TEXT = {"CLIPTextModel_", "T5Stack", "Llama2_"}  # in test_text_encoders.py


def test_every_class_that_declares_parts_is_tried(declared):
    assert set(CLASSES) | TEXT == set(declared)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_declared_part_is_left_out_or_run_again_by_some_input(cls, comfy, declared):
    """By hooks on the stock models; the limits are as narrow as what is seen."""
    from comfy import supported_models

    if not hasattr(supported_models, BY_NAME[CLASSES[cls][0]].config):
        pytest.skip(f"this ComfyUI has no {cls}")
    patterns = dict(declared[cls])
    seen = defaultdict(set)
    for name in CLASSES[cls]:
        for path, counts in runs(BY_NAME[name], re.compile("|".join(patterns))).items():
            times = [t for pattern, t in patterns.items() if re.fullmatch(pattern, path)]
            if times:  # not the model itself; of two patterns the later one holds
                seen[re.sub(r"(?<=\.)\d+", "N", path), times[-1]] |= counts
    for (part, times), counts in seen.items():
        assert counts != {1}, part
        if times.most is None:
            assert max(counts) > 1, part
        else:
            assert (math.floor(min(counts)), math.ceil(max(counts))) == (times.least, times.most), part


def test_stable_cascade_b_runs_every_level_of_its_decoder_as_often_as_it_has_mappers(comfy):
    family = BY_NAME["Stable Cascade B"]
    parts = comfy.anatomy.model_info(make(family)).parts
    seen = runs(family, re.compile(r"(down|up)_blocks\.\d+\.\d+"))
    assert {path for path, counts in seen.items() if counts != {1}} == {
        p.removeprefix("diffusion_model.") for p in parts
    }
    assert all(seen[p.removeprefix("diffusion_model.")] == {t.least} == {t.most} for p, t in parts.items())


@pytest.mark.parametrize(
    "name", ["SD1.x", "SDXL", "SD3", "HiDream", "Chroma", "Qwen-Image", "Z-Image", "LTX Video", "Wan 2.1 T2V"]
)
def test_other_families_have_no_such_part(name, comfy):
    assert comfy.anatomy.model_info(make(BY_NAME[name], filled=False)).parts == {}


@pytest.fixture
def pair(comfy, tmp_path):
    """Guarded and merged, on every layer of a family."""

    def build(family: Family) -> Pair:
        model = make(family)
        return Pair(comfy, model, tmp_path, named(comfy.anatomy.model_info(model), "diffusion_model.", sliced=False))

    return build


@pytest.mark.parametrize(("given", "idle"), [({}, 0), ({"guidance": None}, 2)])
def test_the_attestation_says_how_many_layers_had_nothing_to_work_on(given, idle, comfy, pair):
    family = BY_NAME["Flux dev"]
    guarded = pair(family).guarded
    evaluate(guarded, family, family.cond | given)
    result = comfy.host.attestation(guarded)
    assert (result.status, result.varying_layers, result.idle_layers) == ("guarded", 2, idle)
    assert result.firings == result.evaluations * (result.layers - idle)
    text = format_attestation(result)
    assert f"2 layers depend on the inputs of the run, {idle} of them did not run" in text


@pytest.mark.parametrize(
    "path", ["ref_image_refiner.0.attn.to_q", "layers.0.attn.to_q", "ref_image_refiner.0.norm1.linear"]
)
def test_a_branch_that_is_taken_off_for_an_evaluation_stops_the_run_in_a_part_as_elsewhere(path, comfy, pair):
    family = BY_NAME["OmniGen2"]
    guarded = pair(family).guarded
    module = guarded.model.get_submodule(f"diffusion_model.{path}")

    def steal(apply, arguments):
        branch = module.__dict__.pop("forward")
        try:
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            module.__dict__["forward"] = branch

    guarded.set_model_unet_function_wrapper(steal)
    cond = family.cond | family.variants["OmniGen2 with references"]
    with refuses("run.short", "1 of", f"diffusion_model.{path} in 0"):
        evaluate(guarded, family, cond)


def test_a_safety_lora_on_optional_layers_alone_never_counts_as_guarding_a_run_without_them(comfy, tmp_path):
    family = BY_NAME["OmniGen2"]
    model = make(family)
    layers = named(comfy.anatomy.model_info(model), "diffusion_model.ref_image_refiner.", sliced=False)
    guarded = Pair(comfy, model, tmp_path, layers).guarded
    evaluate(guarded, family, family.cond | family.variants["OmniGen2 with references"])
    assert comfy.host.attestation(guarded).status == "guarded, outside start"  # by the reference
    with refuses("run.idle"):
        evaluate(guarded, family, family.cond)
