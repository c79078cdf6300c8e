"""The Gram-trace figures against explicit dense products."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.matching import Match, Target
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer
from modular_lora_guard.modular_lora.guard.comparing import Factor, factor, factors, inner, join, norm
from modular_lora_guard.modular_lora.guard.interference import cancelled, interference
from support.errors import refuses
from torch import Tensor

FLOOR = 0.5
near = pytest.approx


def dense(a: Factor) -> Tensor:
    return a.scale * a.up.double() @ a.down.double()  # out in


def random_factor(generator: torch.Generator, out: int, inside: int, rank: int, scale: float = 1.0) -> Factor:
    up, down = (torch.randn(shape, generator=generator) for shape in ((out, rank), (rank, inside)))
    return Factor(up, down, scale)


def lora(seed: int, layers: int = 12, out: int = 24, inside: int = 32, rank: int = 2) -> dict[str, Factor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{index}": random_factor(generator, out, inside, rank) for index in range(layers)}


def scaled(task: dict[str, Factor], by: float) -> dict[str, Factor]:
    return {key: replace(item, scale=item.scale * by) for key, item in task.items()}


@st.composite
def factor_pairs(draw: st.DrawFn) -> tuple[Factor, Factor]:
    """Two factors of one weight, ranks up to beyond the weight's own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out, inside = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = (draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    scales = (draw(st.sampled_from([1.0, 0.25, -2.0])), draw(st.sampled_from([1.0, 0.5])))
    return tuple(random_factor(generator, out, inside, r, c) for r, c in zip(ranks, scales, strict=True))


@settings(max_examples=60, deadline=None)
@given(pair=factor_pairs())
def test_inner_product_and_norm_are_those_of_the_dense_matrices(pair):
    a, b = pair
    size = float(dense(a).norm() * dense(b).norm())
    assert norm(a) == near(float(dense(a).norm()))
    assert inner(a, b) == near(float((dense(a) * dense(b)).sum()), abs=1e-9 * size)
    assert inner(a, b) == near(inner(b, a), abs=1e-9 * size)


@settings(max_examples=60, deadline=None, derandomize=True)  # a chance singular factor would need another tolerance
@given(pair=factor_pairs(), strength=st.sampled_from([1.0, 0.3, -0.7]))
def test_overlaps_are_those_of_dense_projections(pair, strength):
    a, b = pair
    result = interference({"w": a}, 1.0, [("task", {"w": b}, strength)], FLOOR)
    [layer] = result.layers
    S, T = dense(a), strength * dense(b)
    U, D, B = a.up.double(), a.down.double(), b.down.double()
    P, Q = U @ torch.linalg.pinv(U), torch.linalg.pinv(D) @ D  # out out, in in
    assert layer.energy_overlap == near(float((P @ T @ Q).norm() ** 2 / T.norm() ** 2), abs=1e-7)
    assert layer.row_overlap == near(float((B @ Q).norm() ** 2 / B.norm() ** 2), abs=1e-7)
    assert layer.cosine == near(float((S * T).sum() / S.norm() / T.norm()), abs=1e-7)
    assert layer.net_strength == near(1 + float((S * T).sum() / S.norm() ** 2), abs=1e-7)
    assert (result.energy_overlap, result.row_overlap) == near((layer.energy_overlap, layer.row_overlap))


@settings(max_examples=30, deadline=None)
@given(pair=factor_pairs(), strengths=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_a_joined_factor_is_the_sum(pair, strengths):
    total = sum(strength * dense(item) for item, strength in zip(pair, strengths, strict=True))
    assert torch.allclose(dense(join(list(zip(pair, strengths, strict=True)))), total, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_many_weights_at_once_are_each_weight_by_itself(data):
    weights = [f"w{index}" for index in range(5)]

    def drawn(seed: int) -> dict[str, Factor]:
        some = data.draw(st.lists(st.sampled_from(weights), unique=True)) if seed else weights
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
        ranks = {key: data.draw(st.integers(1, 3)) for key in some}
        return {key: random_factor(generator, 9 + int(key[1]), 12, rank, 0.5) for key, rank in ranks.items()}

    safety, strengths = drawn(0), (1.0, -0.4, 0.0)
    others = [(f"t{index}", drawn(index + 1), strength) for index, strength in enumerate(strengths)]
    together = interference(safety, 1.0, others, FLOOR)
    alone = []
    for key, a in safety.items():
        mine = [(name, {key: changes[key]} if key in changes else {}, strength) for name, changes, strength in others]
        alone += interference({key: a}, 1.0, mine, FLOOR).layers
    assert [layer.layer for layer in together.layers] == [layer.layer for layer in alone]
    for found, expected in zip(together.layers, alone, strict=True):
        assert astuple(found)[1:] == near(astuple(expected)[1:], abs=1e-9)


def test_slices_of_a_large_weight_joined_meet_a_lora_of_the_whole_weight():
    generator = torch.Generator().manual_seed(0)
    slices, whole = random_factor(generator, 640, 1280, 32), random_factor(generator, 640, 1280, 32)
    a = join([(slices, 0.5), (slices, 0.5)])  # fp64, beside fp32
    for s, t in ((a, whole), (whole, a)):
        [layer] = interference({"w": s}, 1.0, [("task", {"w": t}, 1.0)], FLOOR).layers
        assert layer.net_strength == near(1 + float((dense(s) * dense(t)).sum() / dense(s).norm() ** 2), abs=1e-6)


def test_large_factors_whose_products_are_in_fp32_give_the_same_figures():
    generator = torch.Generator().manual_seed(0)
    a, b = (random_factor(generator, 640, 1280, rank) for rank in (32, 48))
    result = interference({"w": a}, 1.0, [("task", {"w": b}, -0.7)], FLOOR)
    S, T = dense(a), -0.7 * dense(b)
    U, D = a.up.double(), a.down.double()
    inside = U @ torch.linalg.pinv(U) @ T @ torch.linalg.pinv(D) @ D
    assert result.net_strength == near(1 + float((S * T).sum() / S.norm() ** 2), abs=1e-6)
    assert result.energy_overlap == near(float(inside.norm() ** 2 / T.norm() ** 2), rel=1e-4)
    assert interference({"w": a}, 1.0, [("same", {"w": a}, -1.0)], FLOOR).net_strength == near(0, abs=1e-9)
    u, d = a.up[:, :16], a.down[:16]
    assert norm(Factor(torch.cat([u, -u], 1), torch.cat([d, d]))) == 0
    left = Factor(torch.cat([u, -0.999 * u], 1), torch.cat([d, d]))
    assert norm(left) == near(1e-3 * float((u @ d).norm()), rel=1e-3)


def test_factors_that_cancel_have_norm_zero():
    a = random_factor(torch.Generator().manual_seed(0), 8, 8, 2)
    assert norm(join([(a, 1.0), (a, -1.0)])) == 0


def test_the_safety_file_at_minus_one_leaves_nothing():
    safety = lora(0)
    result = interference(safety, 1.0, [("safety.safetensors", safety, -1.0)], FLOOR)
    assert result.net_strength == near(0, abs=1e-12)
    assert result.lowest_net[1] == near(0, abs=1e-12)
    assert result.layers_below_floor == result.shared_layers == len(safety)
    assert result.mean_cosine == near(-1)
    sentence = cancelled(result, 1.0, FLOOR, "safety.safetensors")
    assert sentence.startswith("safety.safetensors: a net strength of ")
    assert "0.00 is left of 1.00, below the floor of 0.50" in sentence


@settings(max_examples=30, deadline=None)
@given(strengths=st.lists(st.floats(-1, 1), min_size=3, max_size=3), order=st.permutations(range(3)))
def test_the_order_of_task_loras_does_not_matter(strengths, order):
    safety = lora(0, 4)
    others = [(f"t{index}", lora(index + 1, 4), strength) for index, strength in enumerate(strengths)]
    first = interference(safety, 1.0, others, FLOOR)
    second = interference(safety, 1.0, [others[index] for index in order], FLOOR)
    for field in ("mean_cosine", "energy_overlap", "row_overlap", "net_strength"):
        assert getattr(first, field) == near(getattr(second, field), abs=1e-9)
    assert sorted(first.warnings) == sorted(second.warnings)


def test_weights_that_no_task_lora_changes_count_with_their_own_strength():
    safety = lora(0, 2)
    task = {"w0": replace(safety["w0"], scale=-1.0), "elsewhere": safety["w0"]}
    result = interference(safety, 0.8, [("task", task, 0.8)], FLOOR)
    share = norm(safety["w1"]) ** 2 / (norm(safety["w0"]) ** 2 + norm(safety["w1"]) ** 2)
    assert result.net_strength == near(0.8 * share)
    assert result.lowest_net == ("w0", near(0, abs=1e-12))
    assert (result.layers_below_floor, result.shared_layers) == (1, 1)
    assert result.warnings[-1].startswith("1 of 2 layers keep a net safety strength below 0.50, lowest ")


def test_without_task_loras_the_strength_is_whole():
    for others in ([], [("task", lora(1), 0.0)], [("task", scaled(lora(1), 0.0), 1.0)]):
        result = interference(lora(0), 1.0, others, FLOOR)
        assert (result.net_strength, result.shared_layers, result.layers, result.warnings) == (1.0, 0, (), ())
        assert (result.mean_cosine, result.cosine_z, result.energy_overlap) == (0.0, 0.0, 0.0)


def test_independent_loras_give_no_warning():
    result = interference(lora(0), 1.0, [("task", lora(1), 1.0)], FLOOR)
    assert result.warnings == ()
    assert result.row_overlap == near(2 / 32, abs=0.05)
    assert abs(result.cosine_z) < 3


@pytest.mark.parametrize("strength", [1.0, 0.2, -1.0])
def test_a_task_lora_that_undoes_the_safety_lora_is_told_at_any_strength(strength):
    safety, free = lora(0, 40), lora(1, 40)
    task = {key: join([(free[key], 1.0), (safety[key], -0.2)]) for key in safety}
    result = interference(safety, 1.0, [("task.safetensors", task, strength)], FLOOR)
    [sentence] = [text for text in result.warnings if "2412.00357" in text]
    assert sentence.startswith("task.safetensors: mean cosine")
    assert "retrain it on the original base W0" in sentence
    assert math.copysign(1, result.mean_cosine) == -math.copysign(1, strength)


def test_a_shared_random_initialisation_is_told():
    safety, free = lora(0), lora(1)
    task = {key: replace(free[key], down=safety[key].down) for key in safety}
    result = interference(safety, 1.0, [("task.safetensors", task, 1.0)], FLOOR)
    assert result.row_overlap == near(1)
    [sentence] = [text for text in result.warnings if "same seed" in text]
    assert sentence.startswith("task.safetensors: shares 1.00 of its rows with the safety LoRA, 0.06 expected")


def test_rows_shared_by_chance_are_no_warning():
    result = interference(lora(0, rank=24), 1.0, [("task", lora(1, rank=24), 1.0)], FLOOR)
    assert result.row_overlap > 0.5
    assert result.warnings == ()


def test_a_safety_lora_without_effect_is_an_error():
    with refuses("guard.nothing-to-compare"):
        interference({}, 1.0, [], FLOOR)
    a = random_factor(torch.Generator().manual_seed(0), 8, 8, 2)
    with refuses("lora.zero-layer", "w0"):
        interference({"w0": join([(a, 1.0), (a, -1.0)])}, 1.0, [], FLOOR)


@pytest.mark.parametrize("offset", [None, (0, 2, 3), (1, 1, 2)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_slice_of_a_weight_is_embedded_in_zeros(offset, kernel):
    shape = (6, 4, *kernel)
    part = [slice(None), slice(None)]
    if offset is not None:
        part[offset[0]] = slice(offset[1], offset[1] + offset[2])
    out, inside = (len(range(size)[cut]) for size, cut in zip(shape, part, strict=False))
    layer = LoraLayer("a", torch.randn(2, inside, *kernel).half(), torch.randn(out, 2).half(), 1.0)
    a = factor(layer, Target("w", offset), shape)
    expected = torch.zeros(shape, dtype=torch.float64)
    product = 0.5 * layer.up.double() @ layer.down.double().flatten(1)  # out in·k·k
    expected[tuple(part)] = product.reshape(out, inside, *kernel)
    assert a.up.dtype == a.down.dtype == torch.float32
    assert torch.equal(dense(a), expected.flatten(1))


def test_slices_of_one_weight_become_one_factor():
    layers = {name: LoraLayer(name, torch.randn(2, 4), torch.randn(3, 2), 1.0) for name in ("q", "k")}
    file = LoraFile(Path("a.safetensors"), "a.safetensors", "", {}, layers)
    match = Match({"q": Target("w", (0, 0, 3)), "k": Target("w", (0, 3, 3))}, (), ())
    found = factors(file, match, {"w": (6, 4)})
    expected = torch.cat([0.5 * layer.up @ layer.down for layer in layers.values()])
    assert list(found) == ["w"]
    assert torch.allclose(dense(found["w"]), expected.double(), atol=1e-6)
