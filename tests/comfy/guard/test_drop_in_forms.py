"""Guard: every form of change that ComfyUI hands to add_patches, slices of fused weights, and what is of no file."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.families import evaluate, make, named
from support.families_image import IMAGE
from support.graphs import save_lora
from support.lora_forms import FORMS, linear, stock

SAFETY, TASK = "safety.safetensors", "task.safetensors"
FAMILY = SimpleNamespace(latent=(4, 8, 8), context=(77, 768), cfg=2.0)
FUSED = [family for family in IMAGE if family.config in ("Flux", "SD3", "AuraFlow", "Chroma")]


def attached(comfy, model, path):
    from modular_lora_guard.comfy_host import drop_in

    g = comfy.host_guard
    return drop_in.attach(model, None, None, (g.SafetyLora(comfy.host_files.read_lora(path), 1.0),)).model


def tasks(patcher) -> list:
    return [lora for lora in patcher.guard_state.record.loras if lora.role == "task"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_behind_it_is_what_load_task_lora_makes_of_the_file(form, comfy, loaded, loras, tmp_path):
    generator = torch.Generator().manual_seed(3)
    layers = [(name, spec) for name, spec in loras.unet.items() if len(spec.weight_shape) == 2][:8]
    tensors = {}
    for name, spec in layers:
        tensors |= linear(name, spec, form, generator, loaded[0].model.get_submodule(spec.path).weight)
    path = tmp_path / "form.safetensors"
    save_file(tensors, path)
    ours = stock(attached(comfy, loaded[0], loras.folder / SAFETY), path, 0.7)
    (task,) = tasks(ours)
    assert (task.name, task.pending, task.strength_model) == (path.name, False, 0.7)
    g, file = comfy.host_guard, comfy.host_files.read_lora(path)
    safety = g.SafetyLora(comfy.host_files.read_lora(loras.folder / SAFETY), 1.0)
    asked = comfy.host.guard(loaded[0], None, (safety,), (g.TaskLora(file, 0.7, 0.7),), False, g.GuardLimits())[0]
    assert torch.equal(evaluate(ours, FAMILY, {}), evaluate(comfy.host.unwrap(asked), FAMILY, {}))


@pytest.mark.parametrize("family", FUSED, ids=lambda family: family.name)
def test_slices_of_fused_weights_and_rearranged_rows(family, comfy, tmp_path):
    model = make(family)
    info = comfy.anatomy.model_info(model)
    for prefix in family.names:
        if not (layers := named(info, prefix, sliced=True)):
            continue
        save_lora(tmp_path / TASK, layers, 2, 1, size=0.2)
        save_lora(tmp_path / SAFETY, layers, 1, 2, size=0.2)
        ours = stock(attached(comfy, model, tmp_path / SAFETY), tmp_path / TASK, 0.6)
        assert [one.pending for one in tasks(ours)] == [False]
        merged = stock(stock(model, tmp_path / TASK, 0.6), tmp_path / SAFETY, 1.0)
        got, want, base = (evaluate(one, family, family.cond) for one in (ours, merged, model))
        assert (got - want).abs().max() < 1e-3 * (want - base).abs().max()
        with refuses("lora.both-roles"):
            stock(attached(comfy, model, tmp_path / SAFETY), tmp_path / SAFETY, -1.0)


def test_a_pickle_acts_and_is_of_no_file(comfy, loaded, loras, tmp_path):
    path = tmp_path / "old.pt"
    torch.save(load_file(loras.folder / TASK), path)
    ours = stock(attached(comfy, loaded[0], loras.folder / SAFETY), path, 0.5)
    (task,) = tasks(ours)
    assert (task.name, task.pending) == ("old.pt", True)
    assert any(".pt" in note for one in ours.guard_added for note in one.task.lora.notes)
    want = stock(attached(comfy, loaded[0], loras.folder / SAFETY), loras.folder / TASK, 0.5)
    assert torch.equal(evaluate(ours, FAMILY, {}), evaluate(want, FAMILY, {}))


def test_a_file_that_was_written_over_meanwhile_is_not_taken_for_what_was_loaded(comfy, loaded, loras, tmp_path):
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    path = tmp_path / "changed.safetensors"
    save_file(load_file(loras.folder / TASK), path)
    tensors = {name: tensor.clone() for name, tensor in load_torch_file(str(path)).items()}
    read = load_torch_file(str(path))
    assert set(read) == set(tensors)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "next.safetensors")
    (tmp_path / "next.safetensors").replace(path)
    ours = load_lora_for_models(attached(comfy, loaded[0], loras.folder / SAFETY), None, read, 0.5, 0.0)[0]
    (task,) = tasks(ours)
    assert task.pending
    copied = load_lora_for_models(attached(comfy, loaded[0], loras.folder / SAFETY), None, tensors, 0.5, 0.0)[0]
    assert tasks(copied)[0].name == "a LoRA of another loader"


def test_what_a_loader_left_out_of_a_file_is_counted(comfy, loaded, loras, tmp_path):
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    tensors = load_torch_file(str(loras.folder / TASK))
    kept = sorted({name.partition(".")[0] for name in tensors})[:3]
    part = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in kept}
    ours = load_lora_for_models(attached(comfy, loaded[0], loras.folder / SAFETY), None, part, 0.5, 0.0)[0]
    (added,) = ours.guard_added
    assert f"3 of the {len(loras.unet)} layers of its file" in added.task.lora.notes[0]
    assert tasks(ours)[0].pending is False


def test_clones_share_what_was_put_onto_them_and_nothing_else(comfy, loaded, loras):
    base = attached(comfy, loaded[0], loras.folder / SAFETY)
    one = stock(base, loras.folder / TASK, 0.5)
    two = stock(one, loras.folder / "other.safetensors", 0.5)
    assert [len(patcher.guard_added) for patcher in (base, one, one.clone(), two, two.clone().clone())] == [
        0,
        1,
        1,
        2,
        2,
    ]
    before = evaluate(one, FAMILY, {})
    assert not torch.equal(before, evaluate(two, FAMILY, {}))
    assert torch.equal(before, evaluate(one.clone(), FAMILY, {}))
