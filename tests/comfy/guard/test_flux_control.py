"""Flux control LoRAs (BFL's files): more inputs for img_in, biases, replaced norms; unmerged equals core's merge."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import GENERIC, Noise, evaluate, make, named
from support.families_image import IMAGE
from support.graphs import bits, save_lora

FLUX = next(family for family in IMAGE if family.name == "Flux dev")
COND = FLUX.cond | {"concat_latent_image": Noise((1, *FLUX.latent))}


@pytest.fixture
def model():
    return make(FLUX)


@pytest.fixture
def files(comfy, model, tmp_path):
    """(safety LoRA, control LoRA), read; the latter under BFL's names: all Linears with biases, all q, k norms."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    rand = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    for path, m in model.model.named_modules():
        name = path.removeprefix(GENERIC)
        if isinstance(m, torch.nn.Linear):
            inputs = m.in_features * (2 if name == "img_in" else 1)
            tensors[f"{name}.lora_A.weight"] = rand(2, inputs) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = rand(m.out_features, 2) * 0.2
            tensors[f"{name}.lora_B.bias"] = rand(m.out_features) * 0.1
        elif name.endswith("_norm") and (gains := list(m.parameters())):  # 0.33.0 calls them weight; files say scale
            tensors[f"{name}.scale"] = 1 + rand(*gains[0].shape) / 5
    save_file(tensors, tmp_path / "control.safetensors")
    save_lora(tmp_path / "safety.safetensors", named(comfy.anatomy.model_info(model), GENERIC, False), 1, 0, size=0.2)
    return [comfy.host_files.read_lora(tmp_path / f"{name}.safetensors") for name in ("safety", "control")]


def guarded(comfy, model, safety, control, strength: float):
    g = comfy.host_guard
    tasks = (g.TaskLora(control, strength, 0.0),)
    handle, _ = comfy.host.guard(model, None, (g.SafetyLora(safety, 1.0),), tasks, False, g.GuardLimits())
    return handle, comfy.host.unwrap(handle)


def merged(model, *loras):
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    for lora, strength in loras:
        model, _ = load_lora_for_models(model, None, load_torch_file(str(lora.path)), strength, 0.0)
    return model


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_control_lora_acts_beside_the_safety_lora_as_core_merges_it(comfy, model, files, matrix, strength):
    safety, control = files
    before, base = bits(model.model), evaluate(model, FLUX, COND)
    handle, patcher = guarded(comfy, model, safety, control, strength)
    assert control.name in handle.report
    ours = evaluate(patcher, FLUX, COND)
    assert comfy.host.attestation(patcher).status == "guarded, outside start"  # by the control image
    after = bits(model.model)
    assert [name for name, old in before.items() if not after[name].equal(old)] == []
    reference = evaluate(merged(model, (safety, 1.0), (control, strength)), FLUX, COND)
    effect = (reference - base).abs().max()
    assert effect > 0.05 * base.abs().max()
    error = float((ours - reference).abs().max() / effect)
    if strength != 1:
        matrix("formats.json", "Flux control LoRA (BFL)", "works", error)
    assert error < 1e-4


def test_the_control_image_is_drawn_while_the_guard_is_on_and_not_afterwards(comfy, model, files):
    images = [FLUX.cond | {"concat_latent_image": torch.full((1, *FLUX.latent), value)} for value in (-1.0, 1.0)]
    _, patcher = guarded(comfy, model, *files, 1.0)
    first, second = (evaluate(patcher, FLUX, cond) for cond in images)
    assert (first - second).abs().max() > 0.05 * first.abs().max()
    plain = [evaluate(model, FLUX, cond) for cond in images]  # W0 has no room for an image
    assert torch.equal(*plain)
    img_in = model.model.diffusion_model.img_in
    assert "weight" not in vars(img_in)
    assert "forward" not in vars(img_in)


def test_other_loras_of_the_widened_layer_read_the_inputs_that_w0_has(comfy, model, files, tmp_path):
    """The safety LoRA changes img_in as well: beside a control LoRA of strength 0 elsewhere it is what it is alone."""
    safety, control = files
    tensors = load_file(control.path)
    quiet = {k: t * 0 if k.startswith("img_in.lora_B") else t for k, t in tensors.items()}
    save_file(quiet, tmp_path / "quiet.safetensors")
    quiet = comfy.host_files.read_lora(tmp_path / "quiet.safetensors")
    _, patcher = guarded(comfy, model, safety, quiet, 1.0)
    layer = patcher.branches.layers["diffusion_model.img_in"]
    assert (layer.spec.narrow, layer.spec.inputs) == (64, 128)
    x = torch.randn(1, 3, 128)
    with torch.no_grad():
        change = layer.add(torch.zeros(1, 3, layer.spec.outputs), x, frozenset({"safety"}))
        down, up = safety.plain["diffusion_model.img_in"].down, safety.plain["diffusion_model.img_in"].up
        assert torch.allclose(change, x[..., :64] @ down.T @ up.T, atol=1e-6)


def test_a_width_that_does_not_fit_is_counted_and_no_image_is_drawn(comfy, model, files, tmp_path):
    tensors = load_file(files[1].path)
    tensors["img_in.lora_A.weight"] = tensors["img_in.lora_A.weight"][:, :32].contiguous()
    save_file(tensors, tmp_path / "thin.safetensors")
    handle, patcher = guarded(comfy, model, files[0], comfy.host_files.read_lora(tmp_path / "thin.safetensors"), 1.0)
    assert "1 layers are left out (first diffusion_model.img_in (LoRA with more inputs with a bias) is" in handle.report
    assert "concat_cond" not in patcher.object_patches
