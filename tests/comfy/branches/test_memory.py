"""The branches in ComfyUI's memory management: counted, fitted into what is free, given back with the model.

This machine has one device, so ComfyUI is told how much of it is free (``get_free_memory``) and that it counts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.changes import Bias, Dense, Gain, Kron, LowRank, Rotation, Term
from modular_lora_guard.modular_lora.branches.fusing import Fused, count
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from support.graphs import guarded_graph
from support.small_unet import sampled

CPU, MB = torch.device("cpu"), 2**20


@pytest.fixture
def management(comfy):
    from comfy import model_management

    model_management.unload_all_models()
    with torch.inference_mode():
        yield model_management
    model_management.unload_all_models()


@pytest.fixture
def patcher(comfy, management, run_graph, loras):
    found = comfy.host.unwrap(run_graph(guarded_graph())["guard"][0])
    management.unload_all_models()
    return found


@pytest.fixture
def free(management, monkeypatch):
    """Sets how many bytes beside those of an evaluation are free on the device."""
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)

    def give(size: int) -> None:
        monkeypatch.setattr(management, "get_free_memory", free_memory(management.minimum_inference_memory() + size))

    return give


def free_memory(size: float):
    """ComfyUI's get_free_memory, with a second number where PyTorch's own reserve is asked for."""
    return lambda device=None, torch_free_too=False: (size, size) if torch_free_too else size


def test_the_estimate_is_weights_and_branches(patcher, loaded):
    branches, weights = patcher.branches.size(torch.float32), loaded[0].model_size()
    assert branches > 1.25 * MB
    assert patcher.model_size() == weights + branches
    assert patcher.clone().clone().model_size() == weights + branches
    sampled(patcher)
    assert patcher.branches.nbytes() == branches
    assert patcher.loaded_size() == weights + branches


def test_what_is_held_for_a_run_is_the_fused_set_and_nothing_else(patcher):
    sampled(patcher)
    held = [t for layer in patcher.branches.layers.values() for f in layer._fused.values() for t in f.tensors]
    counters = sum(layer.calls_compiled.nbytes for layer in patcher.branches.layers.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(storages.values()) + counters <= 1.01 * patcher.branches.size(torch.float32)


def test_a_partial_load_leaves_room_for_the_branches(patcher, management, free, loaded):
    full, weights = sampled(patcher), loaded[0].model_size()
    management.unload_all_models()
    budget = weights // 2
    free(budget)
    partial = sampled(patcher)
    assert patcher.model.model_lowvram
    assert 0 < patcher.model.model_loaded_weight_memory <= budget - patcher.branches.size(torch.float32)
    assert patcher.branches.nbytes() == patcher.branches.size(torch.float32)
    assert torch.allclose(partial, full, atol=1e-4)


def test_a_budget_below_the_branches_loads_no_weights_and_still_runs(patcher, management, free):
    full = sampled(patcher)
    management.unload_all_models()
    free(MB)
    assert torch.allclose(sampled(patcher), full, atol=1e-4)
    assert patcher.model.model_loaded_weight_memory == 0


def test_unloading_gives_the_branches_back_and_the_next_run_is_the_same(comfy, patcher, management):
    first = sampled(patcher)
    assert patcher.branches.nbytes()
    management.unload_all_models()
    assert patcher.branches.nbytes() == 0
    assert patcher.loaded_size() == 0
    assert torch.equal(sampled(patcher), first)
    assert comfy.host.attestation(patcher).status == "guarded"


def test_smart_offload_between_runs_keeps_the_guard(comfy, patcher, management, monkeypatch):
    first = sampled(patcher)
    patcher.partially_unload(CPU, 30 * MB)
    assert patcher.model.model_lowvram
    assert torch.equal(sampled(patcher), first)
    monkeypatch.setattr(management, "get_free_memory", free_memory(0))
    management.free_memory(1e30, CPU)
    assert patcher.branches.nbytes() == 0
    monkeypatch.undo()
    assert torch.equal(sampled(patcher), first)
    assert comfy.host.attestation(patcher).status == "guarded"


def test_an_unguarded_run_in_between_keeps_the_branches_warm(patcher, loaded):
    first = sampled(patcher)
    base = sampled(loaded[0])
    assert patcher.branches.nbytes() == patcher.branches.size(torch.float32)
    assert torch.equal(sampled(patcher), first)
    assert not torch.allclose(first, base, atol=0.1)


def test_another_compute_dtype_replaces_the_branches(patcher):
    sampled(patcher)
    half = patcher.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    sampled(half)
    assert half.branches.nbytes() == half.branches.size(torch.bfloat16)
    sampled(patcher)
    assert patcher.branches.nbytes() == patcher.branches.size(torch.float32)


def test_the_text_encoder_is_counted_and_given_back_too(comfy, management, run_graph, loras):
    _, clip = run_graph(guarded_graph("safety_te.safetensors", "task_te.safetensors", clip=True))["guard"][:2]
    branches = clip.patcher.branches
    clip.encode_from_tokens(clip.tokenize("cat"))
    assert branches.nbytes() == branches.size(torch.float32) > 0
    management.unload_all_models()
    assert branches.nbytes() == 0


@st.composite
def terms(draw) -> tuple[LayerSpec, list[Term]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    out, inside = 4 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    bias = random(out) if draw(st.booleans()) else None
    rank = draw(st.integers(1, 9))
    parts = (
        LowRank(random(rank, inside), random(out, rank)),
        Dense(random(out, inside)),
        Kron(random(2, 2), random(out // 2, inside // 2)),
        Gain(random(out), bias),
        Rotation(random(2, out // 2, out // 2), bias),
        Bias(random(out)),
    )
    chosen = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=4))
    return LayerSpec("w", (out, inside)), [Term("task", part, 0.5) for part in chosen]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(terms())
def test_the_size_is_known_before_anything_is_fused(made):
    spec, found = made
    fused = Fused(spec, found, torch.float16, CPU)
    assert count(spec, found) * 2 == sum(t.nbytes for t in fused.tensors)


def test_the_report_says_what_the_branches_take(comfy, run_graph, loras):
    model, *report = run_graph(guarded_graph())["guard"]
    size = comfy.host.unwrap(model).branches.size(torch.float32) / 1e6
    assert f"branches: {size:.1f} MB beside the weights; warm cache: " in str(report)
