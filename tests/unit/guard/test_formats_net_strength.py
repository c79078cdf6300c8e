"""Net strength and interference of LoRAs of every format, and what a task LoRA of any format cannot undo."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.changes import Dense, Gain, Kron, LowRank, Rotation
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.files.formats import (
    DiffLayer,
    DoraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    OftLayer,
    SetLayer,
    WideLoraLayer,
)
from modular_lora_guard.modular_lora.files.reader import LoraFile
from modular_lora_guard.modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora, build_part
from modular_lora_guard.modular_lora.guard.comparing import change
from modular_lora_guard.modular_lora.guard.interference import interference
from modular_lora_guard.modular_lora.guard.model_info import ModelInfo
from modular_lora_guard.modular_lora.guard.report import format_guard
from support.errors import refuses
from torch import Tensor, nn

near = pytest.approx
OUT, IN, FLOOR = 12, 8, 0.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PARTS = {
    "low rank": lambda seed: LowRank(random(3, IN, seed=seed), random(OUT, 3, seed=seed)),
    "dense": lambda seed: Dense(random(OUT, IN, seed=seed)),
    "kron": lambda seed: Kron(random(3, 2, seed=seed), random(4, 4, seed=seed)),
    "gain": lambda seed: Gain(random(OUT, seed=seed), None),
    "rotation": lambda seed: Rotation(random(3, 4, 4, seed=seed), None),
}


@st.composite
def changes(draw) -> tuple[list, Tensor]:
    """One or two parts on one weight with their scales, and their sum as one dense matrix; fp64."""
    kinds = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=2))
    scales, seed = st.sampled_from((1.0, 0.5, -2.0)), draw(st.integers(0, 2**20))
    parts = [(PARTS[kind](seed + index), draw(scales)) for index, kind in enumerate(kinds)]
    return parts, sum(scale * part.dense(weight).double() for part, scale in parts)


def weight() -> Tensor:
    return random(OUT, IN, seed=99)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(safety=changes(), tasks=st.lists(changes(), min_size=1, max_size=3), strength=st.sampled_from((1.0, 0.3, -0.7)))
def test_figures_are_those_of_the_dense_matrices(safety, tasks, strength):
    parts, S = safety
    others = [(f"t{i}", {"w": change(found, weight)}, strength) for i, (found, _) in enumerate(tasks)]
    result = interference({"w": change(parts, weight)}, 0.8, others, FLOOR)
    T = strength * sum(matrix for _, matrix in tasks)
    [layer] = result.layers
    assert result.net_strength == near(0.8 + float((S * T).sum() / S.norm() ** 2), abs=1e-5)
    assert layer.cosine == near(float((S * T).sum() / S.norm() / T.norm()), abs=1e-5)
    inside = T
    if all(isinstance(part, LowRank) for part, _ in parts):
        U = torch.cat([part.up.double() for part, _ in parts], 1)
        D = torch.cat([part.down.double() for part, _ in parts])
        inside = U @ torch.linalg.pinv(U) @ T @ torch.linalg.pinv(D) @ D
    assert layer.energy_overlap == near(float(inside.norm() ** 2 / T.norm() ** 2), abs=1e-5)


class Model(nn.Module):
    """One layer under a root."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = nn.Module()
        self.diffusion_model.w = nn.Linear(IN, OUT)
        self.diffusion_model.w.weight.data = weight()
        self.requires_grad_(False)


def info() -> ModelInfo:
    model, key = Model(), "diffusion_model.w.weight"
    specs = {key: layer_spec("diffusion_model.w", model.diffusion_model.w)}
    return ModelInfo("toy", {"w": key}, specs, ("diffusion_model",), dict(model.named_parameters()).get)


def file(layer, name: str) -> LoraFile:
    return LoraFile(Path(name), name, name, {}, {"w": layer})


DOWN, UP = random(2, IN, seed=1), random(OUT, 2, seed=2)
DELTA = UP @ DOWN
BLOCKS = random(3, 4, 4, seed=3)
SAFETY = LoraLayer("w", DOWN, UP, None)
ONES = (torch.ones(OUT, 1), torch.ones(1, IN))


def rotated() -> Tensor:
    """(R − I)·W0 of BLOCKS, as OFT defines it."""
    q, eye = BLOCKS - BLOCKS.transpose(1, 2), torch.eye(4)
    turn = (eye + q) @ torch.linalg.inv(eye - q) - eye
    return torch.einsum("knm,kni->kmi", turn, weight().reshape(3, 4, IN)).reshape(OUT, IN)


def lengths() -> Tensor:
    return weight().norm(dim=1, keepdim=True)


CANCELLING = {  # a safety LoRA and a task LoRA at strength 1 that takes it back out
    "LoRA": (SAFETY, LoraLayer("w", DOWN, -UP, None)),
    "LoHa": (SAFETY, LohaLayer("w", UP, -DOWN, *ONES, None, None, None)),
    "LoKr": (SAFETY, LokrLayer("w", torch.ones(1, 1), None, None, -DELTA, None, None, None, None)),
    "full difference": (SAFETY, DiffLayer("w", -DELTA, None)),
    "DoRA": (SAFETY, DoraLayer("w", LoraLayer("w", DOWN, -UP, None), lengths(), False)),
    "DoRA of PEFT": (
        SAFETY,
        DoraLayer("w", LoraLayer("w", DOWN, -UP, None), (weight() - DELTA).norm(dim=1), True),
    ),
    "OFT": (DiffLayer("w", -rotated(), None), OftLayer("w", BLOCKS, None)),
    "OFT as safety": (OftLayer("w", BLOCKS, None), DiffLayer("w", -rotated(), None)),
    "LoKr as safety": (LokrLayer("w", torch.ones(1, 1), None, None, DELTA, None, None, None, None), SAFETY),
    "DoRA as safety": (
        DoraLayer("w", SAFETY, 1.5 * lengths(), False),
        DiffLayer("w", -(1.5 * (weight() + DELTA) - weight()), None),
    ),
    "replaced weight": (SAFETY, SetLayer("w", weight() - DELTA)),
    "LoRA with more inputs": (SAFETY, WideLoraLayer("w", torch.cat([DOWN, random(2, 3)], 1), -UP, None)),
    "bias": (DiffLayer("w", None, torch.ones(OUT)), DiffLayer("w", None, -torch.ones(OUT))),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_a_task_lora_of_any_format_that_cancels_the_safety_lora_is_an_error(name):
    safety, task = CANCELLING[name]
    strength = {"LoKr as safety": -1.0, "replaced weight": 0.3}.get(name, 1.0)
    loras = (SafetyLora(file(safety, "safety"), 1.0),), (TaskLora(file(task, "task"), strength, 0.0),)
    part = build_part("model", info(), *loras, GuardLimits(), enforce=False)
    assert part.interference[0][1].net_strength == near(0, abs=1e-5)
    with refuses("guard.net-strength", "0.00", "1.00", "0.50"):
        build_part("model", info(), *loras, GuardLimits())


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_the_strength_of_an_oft_counts_twice_as_in_core(strength):
    """At strength s the OFT turns by s²: a difference of s²·(R − I)·W0 the other way leaves nothing of it."""
    loras = (SafetyLora(file(OftLayer("w", BLOCKS, None), "safety"), strength),)
    task = TaskLora(file(DiffLayer("w", -rotated(), None), "task"), strength**2, 0.0)
    part = build_part("model", info(), loras, (task,), GuardLimits(), enforce=False)
    assert part.interference[0][1].net_strength == near(0, abs=1e-5)


def test_block_weights_count_in_every_format():
    loras = (SafetyLora(file(SAFETY, "safety"), 1.0),)
    for name, (_, task) in CANCELLING.items():
        if name not in ("LoHa", "LoKr", "full difference", "DoRA"):
            continue
        tasks = (TaskLora(file(task, "task"), 1.0, 0.0, "0.25"),)
        part = build_part("model", info(), loras, tasks, GuardLimits(), enforce=False)
        assert part.interference[0][1].net_strength == near(0.75, abs=1e-5)
        assert {term.scale for term in part.branches.layers["diffusion_model.w"].terms if term.role == "task"} == {0.25}


@pytest.mark.parametrize(
    "layer",
    [
        LokrLayer("w", torch.zeros(1, 1), None, None, DELTA, None, None, None, None),
        LohaLayer("w", UP, torch.zeros(2, IN), *ONES, None, None, None),
        DiffLayer("w", torch.zeros(OUT, IN), None),
        OftLayer("w", torch.zeros(3, 4, 4), None),
        SetLayer("w", weight()),
        DoraLayer("w", LoraLayer("w", DOWN, torch.zeros(OUT, 2), None), lengths(), False),
        DoraLayer("w", LoraLayer("w", DOWN, torch.zeros(OUT, 2), None), lengths().half(), False),
    ],
    ids=["LoKr", "LoHa", "difference", "OFT", "replaced weight", "DoRA", "DoRA in fp16"],
)
def test_a_safety_layer_that_changes_nothing_is_an_error_in_every_format(layer):
    with refuses("lora.zero-layer"):
        build_part("model", info(), (SafetyLora(file(layer, "safety"), 1.0),), (), GuardLimits())


def test_a_replaced_bias_acts_as_the_difference_to_the_own_one():
    model, stored = Model(), random(OUT, seed=11)
    key, bias = "diffusion_model.w.bias", model.diffusion_model.w.bias.detach()
    toy = replace(info(), key_map={"w": key}, weight=dict(model.named_parameters()).get)
    part = build_part("model", toy, (SafetyLora(file(SetLayer("w", stored), "safety"), 1.0),), (), GuardLimits())
    [term] = part.branches.layers["diffusion_model.w"].terms
    torch.testing.assert_close(term.scale * term.part.bias, stored - bias)
    with refuses("lora.zero-layer"):
        build_part("model", toy, (SafetyLora(file(SetLayer("w", bias), "same"), 1.0),), (), GuardLimits())


def test_formats_are_on_the_lines_of_the_report():
    tasks = tuple(TaskLora(file(CANCELLING[n][1], n), 0.1, 0.0) for n in ("LoHa", "LoKr", "full difference", "DoRA"))
    part = build_part("model", info(), (SafetyLora(file(SAFETY, "safety"), 1.0),), tasks, GuardLimits())
    lines = [line.strip() for line in format_guard("toy", "0" * 64, [part], []).splitlines()]
    assert "safety safety: 1 layers, LoRA rank 2, strength 1" in lines[2]
    kinds = ("LoHa rank 2", "LoKr, strength", "full difference, strength", "DoRA over LoRA rank 2")
    assert all(words in line for words, line in zip(kinds, lines[3:], strict=False))


def test_a_function_of_w0_needs_w0():
    blind = copy.copy(info())
    object.__setattr__(blind, "weight", ModelInfo("", {}, {}, ()).weight)
    tasks = (TaskLora(file(OftLayer("w", BLOCKS, None), "t"), 1.0, 0.0),)
    with refuses("layer.value-unknown"):
        build_part("model", blind, (SafetyLora(file(SAFETY, "s"), 1.0),), tasks, GuardLimits())
