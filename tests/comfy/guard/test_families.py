"""Every diffusion model that ComfyUI knows, at toy size, with ComfyUI's own classes: guarded = merged, every layer."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from support.families import GENERIC, Family, evaluate, make, named
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.pairs import Pair

FAMILIES = (*IMAGE, *DITS, *VIDEOS, *NEWER)
LEFT = {  # what 0.33.0 knows besides, and why it has no toy
    "MiniMaxMusic3": "its sizes are fixed, too big for a test",
    "SeedVR2": "restores videos, takes no prompt",
    "Trellis2": "makes shapes of sparse voxels, takes no prompt",
    "RT_DETR_v4": "finds objects, nothing is sampled",
    "SAM3": "cuts objects out, nothing is sampled",
    "SAM31": "cuts objects out, nothing is sampled",
    "DepthAnything3": "estimates depth, nothing is sampled",
}


@pytest.fixture
def toy():
    """A family's ModelPatcher; a skip where this ComfyUI does not know it."""

    def build(family: Family, filled: bool = True):
        from comfy import supported_models

        if not hasattr(supported_models, family.config):
            pytest.skip(f"this ComfyUI has no {family.config}")
        return make(family, filled)

    return build


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_guarded_equals_merged_on_every_layer_under_every_name(family, comfy, toy, tmp_path, matrix):
    model = toy(family)
    info = comfy.anatomy.model_info(model)
    base = evaluate(model, family, family.cond)
    errors = []
    pictures = importlib.import_module("modular_lora_guard.comfy_host.image_values").PICTURES  # none of a guarded run's
    start = "guarded, outside start" if pictures & family.cond.keys() else "guarded"
    for number, prefix in enumerate((GENERIC, *family.names)):
        layers = named(info, prefix, sliced=number > 0)
        pair = Pair(comfy, model, tmp_path, layers)
        if number == 0:
            whole, takes = pair, {k for k, s in info.specs.items() if not s.problem and len(s.weight_shape) > 1}
            guarded = pair.guarded.guard_state.part.branches.layers
            assert {f"{path}.weight" for path in guarded} == {k for k in takes if k.startswith(GENERIC)}
        assert len(layers) > 3
        errors.append(pair.error(family, family.cond, base))
        assert comfy.host.attestation(pair.guarded).status == start
    matrix("families.json", family.name, "works", max(errors))
    for row, change in family.variants.items():
        cond = family.cond | change
        errors.append(whole.error(family, cond, evaluate(model, family, cond)))
        matrix("families.json", row, "works", errors[-1])
    assert max(errors) < 1e-4


def test_what_a_model_kept_of_an_unguarded_run_does_not_enter_a_guarded_one_nor_the_other_way(comfy, toy, tmp_path):
    """HiDream O1 keeps the prompt's keys and values from run to run, whatever its weights are by then."""
    family = next(f for f in FAMILIES if f.config == "HiDreamO1")
    model, other = toy(family), toy(family)
    layers = named(comfy.anatomy.model_info(model), GENERIC, sliced=False)
    alone = evaluate(Pair(comfy, other, tmp_path, layers).guarded, family, family.cond)
    base = evaluate(model, family, family.cond)
    guarded = Pair(comfy, model, tmp_path, layers).guarded
    assert torch.equal(evaluate(guarded, family, family.cond), alone)
    assert torch.equal(evaluate(model, family, family.cond), base)
    assert not torch.allclose(alone, base)


def test_every_diffusion_model_that_comfyui_knows_has_a_toy_or_a_reason(comfy):
    from comfy import supported_models

    known = {config.__name__ for config in supported_models.models}
    tried = {family.config for family in FAMILIES}
    assert known - tried - set(LEFT) == set()
    assert not tried & set(LEFT)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_layers_that_take_no_branch_are_the_known_ones(family, comfy, toy):
    specs = comfy.anatomy.model_info(toy(family, filled=False)).specs.values()
    bare = {s.path.removeprefix(GENERIC) for s in specs if s.problem and len(s.weight_shape) > 1}
    assert {path for path in bare if not any(re.fullmatch(p, path) for p in family.bare)} == set()
    assert all(any(re.fullmatch(p, path) for path in bare) for p in family.bare)


@pytest.mark.parametrize(
    ("module", "cls", "prefixes"),
    [
        ("sd1_clip", "SD1ClipModel", ("lora_te_text_model_",)),
        ("text_encoders.sd2_clip", "SD2ClipModel", ("lora_te_text_model_",)),
        ("sdxl_clip", "SDXLClipModel", ("lora_te1_text_model_", "lora_te2_text_model_")),
        ("sdxl_clip", "SDXLRefinerClipModel", ("lora_te_text_model_", "lora_te2_text_model_")),
    ],
)
def test_text_encoder_layers_of_a_u_nets_family_are_found_under_kohyas_names(module, cls, prefixes, comfy):
    encoders = getattr(importlib.import_module(f"comfy.{module}"), cls)(device="meta", dtype=torch.float16)
    info = comfy.anatomy.clip_info(SimpleNamespace(cond_stage_model=encoders, patcher=None))
    found = [len(named(info, prefix, sliced=False)) for prefix in prefixes]
    blocks = sum(1 for name, _ in encoders.named_modules() if name.endswith(".self_attn"))
    assert max(found) > 0
    assert sum(found) >= blocks * 6
