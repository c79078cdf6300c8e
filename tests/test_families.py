"""SD1.x, SD2.x, SDXL and its refiner at toy width, with ComfyUI's own model classes: guarded = merged, every layer."""

from __future__ import annotations

import pytest
import torch
from graphs import save_lora

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
SDXL = {"use_linear_in_transformer": True, "num_classes": "sequential"}
FAMILIES = {
    "SD15": {"context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None},
    "SD20": {"context_dim": 1024, "use_linear_in_transformer": True, "adm_in_channels": None},
    "SDXL": {**SDXL, "context_dim": 2048, "adm_in_channels": 2816},
    "SDXLRefiner": {**SDXL, "context_dim": 1280, "adm_in_channels": 2560},
}


@pytest.fixture
def toy(comfy):
    """A ModelPatcher of one family, random weights, made by ComfyUI's own classes."""

    def make(family: str):
        from comfy import model_patcher, supported_models

        config = getattr(supported_models, family)({**UNET, **FAMILIES[family]})
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = -1, 16
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.05
        cpu = torch.device("cpu")
        return model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)

    return make


def evaluate(patcher, width: int) -> torch.Tensor:
    from comfy.sample import sample_custom
    from comfy.samplers import ksampler

    generator = torch.Generator().manual_seed(1)
    cond = [
        [torch.randn(1, 77, width, generator=generator), {"pooled_output": torch.randn(1, 1280, generator=generator)}]
    ]
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    sigmas = torch.tensor([5.0, 0.0])
    return sample_custom(
        patcher, noise, 1.0, ksampler("euler"), sigmas, cond, cond, torch.zeros(1, 4, 8, 8), disable_pbar=True
    )


def layers(info, prefix: str) -> dict:
    """The first name under ``prefix`` of every layer that takes a branch."""
    found = {}
    for name, key in info.key_map.items():
        if name.startswith(prefix) and isinstance(key, str) and key in info.specs and not info.specs[key].problem:
            found.setdefault(key, name)
    return {name: info.specs[key] for key, name in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_guarded_equals_merged_on_every_layer_of_the_family(family, comfy, toy, tmp_path):
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    model, g = toy(family), comfy.host_guard
    named = layers(comfy.anatomy.model_info(model), "lora_unet_")
    files = [tmp_path / "safety.safetensors", tmp_path / "task.safetensors"]
    for seed, path in enumerate(files):
        save_lora(path, named, rank=3 + seed, seed=seed, size=0.2)
    safety, task = (comfy.host_files.read_lora(path) for path in files)
    handle, _ = comfy.host.guard(
        model, None, (g.SafetyLora(safety, 1.0),), (g.TaskLora(task, 0.6, 0.6),), False, g.Policy()
    )
    guarded = comfy.host.unwrap(handle)
    assert len(guarded.guard_state.part.branches.layers) == len(named) > 40
    width = FAMILIES[family]["context_dim"]
    ours, base = evaluate(guarded, width), evaluate(model, width)
    merged = model
    for path, strength in zip(files, (1.0, 0.6), strict=True):
        merged, _ = load_lora_for_models(merged, None, load_torch_file(str(path)), strength, 0.0)
    reference = evaluate(merged, width)
    effect = (reference - base).abs().max()
    assert effect > 0.01
    assert (ours - reference).abs().max() < 1e-3 * effect


@pytest.mark.parametrize(
    ("module", "cls", "prefixes"),
    [
        ("comfy.sd1_clip", "SD1ClipModel", ("lora_te_text_model_",)),
        ("comfy.text_encoders.sd2_clip", "SD2ClipModel", ("lora_te_text_model_",)),
        ("comfy.sdxl_clip", "SDXLClipModel", ("lora_te1_text_model_", "lora_te2_text_model_")),
        ("comfy.sdxl_clip", "SDXLRefinerClipModel", ("lora_te_text_model_", "lora_te2_text_model_")),
    ],
)
def test_text_encoder_layers_of_the_family_are_found_under_kohyas_names(module, cls, prefixes, comfy):
    import importlib
    from types import SimpleNamespace

    encoders = getattr(importlib.import_module(module), cls)(device="meta", dtype=torch.float16)
    info = comfy.anatomy.clip_info(SimpleNamespace(cond_stage_model=encoders))
    found = [len(layers(info, prefix)) for prefix in prefixes]
    blocks = sum(1 for name, _ in encoders.named_modules() if name.endswith(".self_attn"))
    assert max(found) > 0
    assert sum(found) >= blocks * 6
    roots = {info.specs[key].path.split(".transformer.")[0] for key in info.key_map.values() if key in info.specs}
    assert roots == {root.removesuffix(".transformer") for root in info.roots}
