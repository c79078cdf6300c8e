"""What is kept warm: files and guards come back as they were, and only where nothing that they depend on changed."""

from __future__ import annotations

import copy
import gc
import os
import re
import sys

import pytest
import torch
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files.cache import forget_files, kept_lora, kept_sha256
from support.errors import refuses
from support.graphs import guarded_graph, save_lora


@pytest.fixture
def path(tmp_path):
    forget_files()
    file = tmp_path / "a.safetensors"
    save_lora(file, {"lora_unet_a": LayerSpec("a", (4, 4))}, 2, 0)
    yield file
    forget_files()


def test_a_file_is_read_once_and_anew_when_it_changes(path):
    first = kept_lora(path)
    assert kept_lora(path) is first
    assert kept_sha256(path) == first.sha256
    save_lora(path, {"lora_unet_a": LayerSpec("a", (4, 4))}, 2, 1)  # same size
    os.utime(path, ns=(0, 0))
    assert kept_sha256(path) == kept_lora(path).sha256 != first.sha256


def test_a_kept_file_is_still_held_against_the_expected_hash(path):
    first = kept_lora(path)
    assert kept_lora(path, first.sha256.upper() + " ") is first
    with refuses("file.other-sha256", "0000"):
        kept_lora(path, "0" * 64)


def test_a_file_that_cannot_be_loaded_still_has_a_hash(path):
    path.write_bytes(b"nothing")
    assert len(kept_sha256(path)) == 64
    with pytest.raises(LoraFileError):
        kept_lora(path)


@pytest.fixture
def warm(comfy, loras):
    """The guards that ComfyUI's copy of the pack keeps."""
    module = sys.modules["modular_lora_guard.comfy_host.guard_cache"]
    module.guards.clear()
    yield module.guards
    module.guards.clear()


@pytest.fixture
def toy(comfy, loras, warm):
    """guard(model, strength, name): the branches that Guard Model makes of the safety LoRA and one task LoRA."""
    g, read = comfy.host_guard, comfy.host_files.read_lora

    def guard(model, strength: float = 1.0, floor: float = 0.5, name: str = "task.safetensors"):
        safety, task = read(loras.folder / "safety.safetensors"), read(loras.folder / name)
        task = g.TaskLora(task, strength, strength)
        handle, _ = comfy.host.guard(model, None, (g.SafetyLora(safety, 1.0),), (task,), True, g.GuardLimits(floor))
        return comfy.host.unwrap(handle)

    return guard


@pytest.fixture
def model(comfy):
    return comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")[0]


def test_going_back_to_an_earlier_task_lora_builds_nothing(toy, model, warm):
    first, other, again = toy(model), toy(model, 0.5), toy(model.clone())
    assert again.branches is first.branches
    assert other.branches is not first.branches
    assert len(warm) == 2


def test_a_merged_lora_another_policy_or_a_replaced_layer_builds_a_guard_of_its_own(toy, model, comfy, loras):
    from comfy.model_management import load_models_gpu

    first = toy(model)
    load_models_gpu([first])
    assert toy(model, floor=0.4).branches is not first.branches
    merged, _ = comfy.nodes.LoraLoader().load_lora(model, None, "other.safetensors", 1.0, 0.0)
    assert toy(merged).branches is not first.branches
    path = next(iter(first.branches.layers))
    parent, _, name = path.rpartition(".")
    parent = model.model.get_submodule(parent)
    parent._modules[name] = copy.copy(parent._modules[name])
    assert toy(model).branches is not first.branches


def test_a_layer_that_became_another_in_place_is_looked_at_again(toy, model, warm):
    first = toy(model)
    layer = next(m for p in first.branches.layers if isinstance(m := model.model.get_submodule(p), torch.nn.Conv2d))
    layer.groups = 2
    try:
        with refuses("lora.not-whole"):
            toy(model, 0.9)
    finally:
        layer.groups = 1


def test_guards_go_with_their_model(toy, warm, comfy):
    other = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")[0]
    toy(other)
    assert len(warm) == 1
    del other
    gc.collect()
    assert len(warm) == 0


def test_the_node_says_how_many_guards_are_kept(run_graph, warm):
    assert re.search(r"warm cache: [1-9]\d* guards?, \d+ MB", run_graph(guarded_graph())["guard"][2])
