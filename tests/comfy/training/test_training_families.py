"""SD2.x and SDXL trained for a step at toy width with ComfyUI's own model classes, under names that the guard loads."""

from __future__ import annotations

import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from modular_lora_guard.tools.bootstrap.paths import ROOT
from support.families import make as toy
from support.families_image import U_NETS
from support.graphs import bits

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

IMAGES = ROOT / "tools" / "world" / "assets" / "gloss" / "10_gloss"
FAMILIES = {family.config: family for family in reversed(U_NETS)}  # the first of each class
SMALL = {"num_hidden_layers": 3, "intermediate_size": 32}
TE1, TE2 = "lora_te1_text_model_", "lora_te2_text_model_"
ENCODERS = {  # and how many layers act: both take the last but one, and SDXL's second encoder is pooled at its end
    "SD20": ("comfy.text_encoders.sd2_clip", "SD2ClipModel", "SD2Tokenizer", {"lora_te_text_model_": 12}),
    "SDXL": ("comfy.sdxl_clip", "SDXLClipModel", "SDXLTokenizer", {TE1: 12, TE2: 18}),
}
LDM = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
DIFFUSERS = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def part(comfy, name: str):
    return importlib.import_module(f"modular_lora_guard.{name}")


@pytest.fixture
def parts(comfy):
    """(MODEL, CLIP, VAE) of a family: ComfyUI's classes with random weights, few layers; the VAE pools and repeats."""

    def make(family: str):
        sd, patcher = importlib.import_module("comfy.sd"), importlib.import_module("comfy.model_patcher")
        module, model, tokenizer, _ = ENCODERS[family]
        module, cpu = importlib.import_module(module), torch.device("cpu")
        target = SimpleNamespace(params={}, clip=getattr(module, model), tokenizer=getattr(module, tokenizer))
        options = {f"{name}_model_config": SMALL for name in ("clip_l", "clip_g", "clip_h")}
        options |= {"dtype": torch.float32} | ({"model_name": "clip_h"} if family == "SD20" else {})
        clip = sd.CLIP(target, model_options=options)
        generator = torch.Generator().manual_seed(2)
        for p in clip.cond_stage_model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.02
        for p in (m.weight for m in clip.cond_stage_model.modules() if isinstance(m, torch.nn.LayerNorm)):
            p.data.fill_(1)
        vae = SimpleNamespace(
            patcher=patcher.ModelPatcher(torch.nn.Linear(1, 1), cpu, cpu),
            spacial_compression_encode=lambda: 8,
            downscale_ratio=8,
            upscale_ratio=8,
            encode=lambda pixels: F.avg_pool2d(F.pad(pixels.movedim(-1, 1), (0, 0, 0, 0, 0, 1)), 8),
        )
        return toy(FAMILIES[family]), clip, vae

    return make


@pytest.mark.parametrize("family", ENCODERS)
def test_a_step_of_training_reaches_every_layer_under_kohyas_names(family, comfy, parts, tmp_path):
    folder = tmp_path / "data" / "1_x"
    folder.mkdir(parents=True)
    for stem in ("crown", "balloon"):
        for ending in (".png", ".txt"):
            shutil.copy(IMAGES / f"{stem}{ending}", folder)
    host_model, task = part(comfy, "comfy_host.trainer_model"), part(comfy, "training.task.train")
    options = part(comfy, "training.options").TaskOptions(
        output_dir=str(tmp_path),
        train_data_dir=str(tmp_path / "data"),
        network_dim=2,
        network_alpha=2.0,
        target="conv",
        max_train_steps=1,
        train_batch_size=2,
        resolution=64,
        network_train_text_encoder=True,
        save_precision="float",
    )
    watch = SimpleNamespace(check=lambda: None, stage=lambda *_: None, say=lambda *_: None, step=lambda *_: None)
    model, clip, vae = parts(family)
    infos = comfy.anatomy.model_info(model), comfy.anatomy.clip_info(clip)
    before = [bits(m) for m in (model.model, clip.cond_stage_model)]
    with host_model.opened(model, clip, vae, options, True) as opened:
        assert opened.schedule.prediction == "epsilon"
        cond = opened.encode(["a cat", ""])
        assert cond.cross.shape == (2, *FAMILIES[family].context)
        trained = task.train_task(opened, options, watch, engine="test")
    for old, m in zip(before, (model.model, clip.cond_stage_model), strict=True):
        assert all(torch.equal(old[k], v) for k, v in bits(m).items())
    lora = trained.lora
    assert all(layer.up.norm() > 0 for layer in lora.layers.values())
    for prefix, count in ENCODERS[family][3].items():
        assert sum(name.startswith(prefix) for name in lora.layers) == count
    assert (LDM in lora.layers, DIFFUSERS in lora.layers) == (family == "SDXL", family != "SDXL")
    guard = comfy.host_guard
    for name, info in zip(("model", "text"), infos, strict=True):
        (line,) = guard.build_part(name, info, (guard.SafetyLora(lora, 1.0),), (), guard.GuardLimits()).lines
        assert (line.unmatched, line.matched > 10) == ((), True)
    assert lora.metadata["ss_base_model_version"] == {"SD20": "sd_v2", "SDXL": "sdxl_base_v1-0"}[family]


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (3, 6, 8, 5), (1, 6, 16, 16), (2, 6, 16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_small_convolutions_as_products_answer_as_they_did(shape, bias, comfy):
    from comfy import ops

    network = torch.nn.ModuleList(
        [ops.disable_weight_init.Conv2d(6, 7, 3, padding=1, bias=bias), torch.nn.Conv2d(6, 7, 3, stride=2, padding=1)]
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    kinds = [type(module) for module in network]
    x = torch.randn(shape, generator=generator, requires_grad=True)

    def run() -> list[torch.Tensor]:
        y = network[0](x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, network[0].weight])]

    stock = run()
    with part(comfy, "comfy_host.convolutions").small_as_products(network, True):
        assert type(network[0]) is not kinds[0]
        assert type(network[1]) is kinds[1]
        ours = run()
    assert [type(module) for module in network] == kinds
    for a, b in zip(ours, stock, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_on_a_cpu_without_it_is_said(comfy, monkeypatch):
    notes = part(comfy, "comfy_host.trainer_model").slow_notes
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    (line,) = notes(cpu, torch.bfloat16)
    assert "use mixed_precision no" in line
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not list(notes(cpu, torch.bfloat16))
    assert not list(notes(cpu, torch.float32))
    assert not list(notes(torch.device("cuda"), torch.bfloat16))
