"""torch.compile: no graph breaks in the branches, no compilation more than the stock model's, counts that are right.

The backend is "eager": everything that dynamo does, nothing of what it hands the graphs to.
"""

from __future__ import annotations

import pytest
import torch
from support.errors import refuses
from support.giving_way import calibrated
from support.graphs import save_lora
from support.small_unet import sampled, small_unet

dynamo = pytest.importorskip("torch._dynamo", reason="this torch has no dynamo")


@pytest.fixture(autouse=True)
def counts(monkeypatch, comfy):
    """Dynamo's counters; attention in one operation, since ComfyUI's for the CPU reads /proc and breaks the graph."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    dynamo.reset()
    dynamo.utils.counters.clear()
    with torch.inference_mode():
        yield dynamo.utils.counters
    dynamo.reset()


@pytest.fixture
def model(comfy):
    return small_unet()


@pytest.fixture
def guard(comfy, model, tmp_path):
    """Guards the model with one safety LoRA and a task LoRA of the rank and seed that are asked for."""
    info = comfy.anatomy.model_info(model)
    named = {}
    for name, key in info.key_map.items():
        if name.startswith("lora_unet_") and key in info.specs and not info.specs[key].problem:
            named.setdefault(key, name)
    layers = {name: info.specs[key] for key, name in named.items()}

    def make(rank: int = 4, seed: int = 1, combine: str = "sum"):
        lora, g = [], comfy.host_guard
        for r, s in ((3, 0), (rank, seed)):
            save_lora(tmp_path / f"{s}.safetensors", layers, r, s, size=0.2)
            lora.append(comfy.host_files.read_lora(tmp_path / f"{s}.safetensors"))
        if combine != "sum":
            base_sha256 = comfy.anatomy.model_sha256(model)
            lora[0] = calibrated(lora[0], tmp_path / "told.safetensors", 0.1, 0.2, base_sha256)
        tasks = (g.TaskLora(lora[1], 0.6, 0.6),)
        return comfy.host.unwrap(
            comfy.host.guard(model, None, (g.SafetyLora(lora[0], 1.0),), tasks, False, g.GuardLimits(combine=combine))[
                0
            ]
        )

    return make


def compiled(patcher, **options):
    """What the node TorchCompileModel gives."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend="eager", **options)
    return clone


RUNS = ({}, {"steps": 3}, {"batch": 2}, {"size": 16}, {"batch": 3, "size": 12}, {})


def graphs_over(patcher, counts) -> int:
    """Graphs that were compiled over runs of several steps, sizes and batches; no graph breaks."""
    counts.clear()
    dynamo.reset()
    for run in RUNS:
        sampled(patcher, **run)
    assert not counts["graph_break"]
    return counts["stats"]["unique_graphs"]


def test_no_breaks_and_no_more_graphs_than_the_stock_model(comfy, model, guard, counts):
    patcher = compiled(guard(), fullgraph=True)
    stock = graphs_over(compiled(model, fullgraph=True), counts)
    assert graphs_over(patcher, counts) <= stock
    measured = sum(min(run.get("steps", 1), 2) for run in RUNS)  # the first and a drawn evaluation run eagerly
    assert patcher.branches.evaluated == {"diffusion_model": measured}
    assert comfy.host.attestation(patcher).status == "guarded"


def test_compiled_and_eager_runs_are_the_same_and_are_counted_alike(comfy, guard):
    patcher = guard()
    eager = sampled(patcher, steps=2)
    clone = compiled(patcher)
    assert torch.allclose(sampled(clone, steps=2), eager, atol=1e-5)
    found = [comfy.host.attestation(p) for p in (patcher, clone)]
    assert found[0].evaluations == found[1].evaluations == 2
    assert found[0].firings == found[1].firings == 2 * len(patcher.branches.layers)


def test_task_loras_act_at_their_share_in_compiled_runs_too(comfy, guard, monkeypatch):
    from modular_lora_guard.modular_lora.guard import safety_first

    patcher, images = guard(combine="safety first"), []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(safety_first, "shares", lambda *_, share=share: (share,))
        eager, clone = sampled(patcher, steps=4), compiled(patcher)
        images.append(sampled(clone, steps=4))
        assert torch.allclose(images[-1], eager, atol=1e-5)
        found = [comfy.host.attestation(one) for one in (patcher, clone)]
        assert [one.task_share for one in found] == [share, share]
        assert found[0].firings == found[1].firings == 4 * len(patcher.branches.layers)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    assert not torch.allclose(images[1], images[2], atol=1e-2)


def test_another_lora_of_the_same_rank_compiles_nothing(comfy, guard, counts):
    first = compiled(guard(seed=1))
    outputs = [sampled(first)]
    graphs = counts["stats"]["unique_graphs"]
    for seed in range(2, 12):  # more than dynamo's recompile limit of 8
        patcher = guard(seed=seed)
        outputs.append(sampled(compiled(patcher)))
        assert torch.allclose(outputs[-1], sampled(patcher), atol=1e-5)
        assert comfy.host.attestation(patcher).status == "guarded"
    assert counts["stats"]["unique_graphs"] == graphs
    assert not torch.allclose(outputs[-1], outputs[-2], atol=1e-2)


def test_other_ranks_compile_once_or_twice_in_all(guard, counts):
    sampled(compiled(guard(rank=4, seed=1)))
    graphs = counts["stats"]["unique_graphs"]
    for rank in (5, 6, 7, 9, 12):
        sampled(compiled(guard(rank=rank, seed=rank)))
    assert counts["stats"]["unique_graphs"] <= graphs + 2


def test_a_compiled_model_is_the_stock_model_without_the_guard(model, guard):
    base = sampled(model)
    patcher, stock = compiled(guard()), compiled(model)
    for _ in range(2):
        assert not torch.allclose(sampled(patcher), base, atol=1e-2)
        assert torch.equal(sampled(stock), base)


def test_a_branch_that_is_lost_inside_a_compiled_model_stops_the_run(comfy, guard):
    patcher = compiled(guard())
    sampled(patcher)
    path = next(iter(patcher.branches.layers))

    def take_off(executor, *args, **kwargs):
        stand_in = executor.class_obj.get_submodule(path).__dict__.pop("forward")
        try:
            return executor(*args, **kwargs)
        finally:
            executor.class_obj.get_submodule(path).__dict__["forward"] = stand_in

    patcher.add_wrapper_with_key("apply_model", "test", take_off)
    with refuses("run.short", "1 of"):
        sampled(patcher)
