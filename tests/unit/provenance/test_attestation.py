"""What a run may say of itself, the ledger, and hashes over tensor contents."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from modular_lora_guard.modular_lora.branches.attachment import Branches, FusedLayer, Times
from modular_lora_guard.modular_lora.branches.changes import LowRank, Term
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.provenance.attestation import (
    Attestation,
    LoraRecord,
    Run,
)
from modular_lora_guard.modular_lora.tensor_hashing import row_digests, tensor_sha256, weights_sha256
from support.errors import refuses

ROOTS = ("unet", "text")
PATHS = ("unet.a", "unet.b", "text.a")


def counted() -> Branches:
    term = Term("safety", LowRank(torch.ones(1, 2), torch.ones(2, 1)), 1.0)
    return Branches({path: FusedLayer(LayerSpec(path, (2, 2)), [term]) for path in PATHS}, ROOTS)


def evaluate(branches: Branches, *paths: str, root: str = "unet") -> None:
    branches.evaluated[root] += 1
    for path in paths:
        branches.layers[path].calls += 1


def test_a_run_counts_from_where_it_started():
    branches = counted()
    evaluate(branches, "unet.a", "unet.b")
    run = Run(branches)
    for _ in range(3):
        evaluate(branches, "unet.a", "unet.b")
    evaluate(branches, "text.a", root="text")
    assert run.finish(may_be_empty=False) == (4, 7, 0)


def test_a_run_before_that_fell_short_does_not_spoil_the_next_one():
    branches = counted()
    evaluate(branches, "unet.a")
    run = Run(branches)
    evaluate(branches, "unet.a", "unet.b")
    assert run.finish(may_be_empty=False) == (1, 2, 0)


@pytest.mark.parametrize("may_be_empty", [False, True])
def test_a_layer_that_fell_short_stops_the_run_and_is_named(may_be_empty):
    branches = counted()
    run = Run(branches)
    for _ in range(2):
        evaluate(branches, "unet.a", "unet.b")
    evaluate(branches, "unet.a")
    with refuses("run.short", "1 of 3", "unet.b in 2 of 3"):
        run.finish(may_be_empty)


def test_a_layer_that_fired_too_often_stops_the_run_too():
    branches = counted()
    run = Run(branches)
    evaluate(branches, "unet.a", "unet.a", "unet.b")
    with refuses("run.short", "unet.a in 2 of 1"):
        run.finish(may_be_empty=False)


def test_branches_without_an_evaluation_of_their_root_stop_the_run():
    branches = counted()
    run = Run(branches)
    evaluate(branches, "unet.a", "unet.b", "text.a")
    with refuses("run.short", "text.a in 1 of 0"):
        run.finish(may_be_empty=False)


def test_zero_evaluations_stop_a_run_that_had_steps_and_are_reported_by_one_that_had_none():
    run = Run(counted())
    with refuses("run.never-evaluated"):
        run.finish(may_be_empty=False)
    assert run.finish(may_be_empty=True) == (0, 0, 0)


PARTS = {"unet.opt": Times(0, 1), "unet.again": Times(1, 2), "unet.many": Times(1, None), "unet.twice": Times(2, 2)}


def in_parts() -> Branches:
    term = Term("safety", LowRank(torch.ones(1, 2), torch.ones(2, 1)), 1.0)
    paths = ("unet.a", *(f"{part}.{name}" for part in PARTS for name in ("x", "y")))
    layers = {path: FusedLayer(LayerSpec(path, (2, 2)), [term]) for path in paths}
    return Branches(layers, ("unet",), {**PARTS, "unet.other": Times(0, 1)})


def run_parts(branches: Branches, **times: int) -> None:
    """One evaluation in which every part runs as often as named, else as often as it must."""
    evaluate(branches, "unet.a")
    for part, rule in PARTS.items():
        for _ in range(times.get(part.removeprefix("unet."), rule.least)):
            evaluate(branches, f"{part}.x", f"{part}.y", root=part)


def test_only_layers_inside_parts_are_said_to_vary():
    assert in_parts().varying == tuple(f"{part}.{name}" for part in PARTS for name in ("x", "y"))
    assert counted().varying == ()


@pytest.mark.parametrize(
    ("times", "counts"),
    [
        ({}, (2, 18, 2)),
        ({"opt": 1}, (2, 22, 0)),
        ({"again": 2}, (2, 22, 2)),
        ({"many": 7, "opt": 1}, (2, 46, 0)),
    ],
)
def test_parts_may_run_as_often_as_declared_and_idle_layers_are_counted(times, counts):
    branches = in_parts()
    run_parts(branches, opt=1)
    run = Run(branches)
    for _ in range(2):
        run_parts(branches, **times)
    assert run.finish(may_be_empty=False) == counts


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ({"opt": 2}, "unet.opt.x in 2 of 1"),
        ({"again": 0}, "unet.again.x in 0 of 1"),
        ({"again": 3}, "unet.again.x in 3 of 1"),
        ({"many": 0}, "unet.many.x in 0 of 1"),
        ({"twice": 1}, "unet.twice.x in 1 of 1"),
        ({"twice": 3}, "unet.twice.x in 3 of 1"),
    ],
)
def test_a_part_that_ran_too_rarely_or_too_often_stops_the_run(times, named):
    branches = in_parts()
    run = Run(branches)
    run_parts(branches, **times)
    with refuses("run.short", named):
        run.finish(may_be_empty=False)


@pytest.mark.parametrize("part", PARTS)
def test_a_layer_that_lost_its_branch_inside_a_part_stops_the_run(part):
    branches = in_parts()
    run = Run(branches)
    run_parts(branches, opt=1)
    branches.layers[f"{part}.y"].calls -= 1
    with refuses("run.short", "1 of 9", f"{part}.y"):
        run.finish(may_be_empty=False)


def test_a_part_that_ran_outside_an_evaluation_stops_the_run():
    branches = in_parts()
    run = Run(branches)
    evaluate(branches, "unet.many.x", "unet.many.y", root="unet.many")
    with refuses("run.short", "unet.many.x in 1 of 0"):
        run.finish(may_be_empty=True)


def test_a_run_in_which_no_guarded_layer_had_anything_to_do_is_never_called_guarded():
    term = Term("safety", LowRank(torch.ones(1, 2), torch.ones(2, 1)), 1.0)
    branches = Branches({"unet.opt.x": FusedLayer(LayerSpec("unet.opt.x", (2, 2)), [term])}, ("unet",), PARTS)
    run = Run(branches)
    evaluate(branches)
    with refuses("run.idle"):
        run.finish(may_be_empty=False)


@pytest.mark.parametrize("roles", [(), ("safety",), ("task",)])
def test_an_audit_pass_with_some_roles_off_never_claims_firings(roles):
    branches = counted()
    with branches.only(*roles):
        run = Run(branches)
        evaluate(branches, "unet.a")
        assert run.finish(may_be_empty=False) == (1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_hash_depends_on_contents_only_not_on_memory_layout(dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    padded = torch.zeros(2, 3, 9, dtype=dtype)
    padded[..., 2:6] = tensor
    turned = tensor.transpose(0, 2).contiguous().transpose(0, 2)
    assert tensor_sha256(padded[..., 2:6]) == tensor_sha256(turned) == tensor_sha256(tensor)
    if torch.cuda.is_available():
        assert tensor_sha256(tensor.cuda()) == tensor_sha256(tensor)


def test_a_tensor_hash_tells_shape_dtype_and_a_single_bit_apart():
    zeros = torch.zeros(2, 3)
    minus = zeros.clone()
    minus[1, 2] = -0.0
    others = [zeros.reshape(3, 2), zeros.half(), zeros.int(), minus, zeros[:, :2], zeros[:0], zeros.half()[:0]]
    hashes = [tensor_sha256(t) for t in (zeros, *others)]
    assert len(set(hashes)) == len(hashes)


def test_a_tensor_hash_takes_scalars_inference_tensors_and_tensors_with_gradients():
    with torch.inference_mode():
        made = torch.ones(3)
    leaf = torch.ones(3, requires_grad=True)
    assert tensor_sha256(made) == tensor_sha256(leaf) == tensor_sha256(torch.ones(3))
    assert tensor_sha256(torch.tensor(1.0)) != tensor_sha256(torch.tensor([1.0]))


def test_row_digests_name_every_row_whatever_its_precision_and_neighbours():
    rows = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).half()  # b n d
    found = row_digests(rows)
    assert len(found) == len(set(found)) == 10
    assert row_digests(rows.float()) == found
    assert row_digests(rows[1, 3]) == (found[8],)
    assert row_digests(torch.cat([rows[1:], rows[:1]], 1)) == (*found[5:], *found[:5])


def test_a_weights_hash_depends_on_names_shapes_and_values_only():
    half = {"b": torch.randn(3, 4).half(), "a": torch.randn(2), "n": torch.tensor(7)}
    full = {name: half[name].float() if half[name].is_floating_point() else half[name] for name in ("n", "a", "b")}
    whole = weights_sha256(half.items())
    assert weights_sha256(iter(full.items())) == whole
    others = [
        {**full, "c": torch.zeros(1)},
        {"a": full["a"], "b": full["b"]},
        {**full, "b": full["b"].reshape(4, 3)},
        {**full, "b": full["b"] + 1e-3},
        {**full, "n": torch.tensor(8)},
        {"b": full["a"], "a": full["b"], "n": full["n"]},
    ]
    assert len({whole, *(weights_sha256(other.items()) for other in others)}) == len(others) + 1


def record() -> Attestation:
    loras = (
        LoraRecord("safety", "s.safetensors", "1" * 64, 1.0, 1.0),
        LoraRecord("task", "t", "2" * 64, 0.7, -0.1, "1"),
    )
    return Attestation("not sampled", "pack 1", "SD15", "3" * 64, False, loras, {"s.safetensors": 0.93}, layers=7)


def test_an_attestation_survives_json():
    sampled = record().of(status="guarded", evaluations=4, firings=28, embeddings_sha256=("4" * 64, "5" * 64))
    fields = json.loads(sampled.to_json())
    assert "\n" not in sampled.to_json()
    fields["loras"] = tuple(LoraRecord(**item) for item in fields["loras"])
    fields |= {name: tuple(fields[name]) for name in ("embeddings_sha256", "weighted", "edits", "others")}
    assert Attestation(**fields) == sampled


def test_a_changed_copy_leaves_the_record_alone():
    first = record()
    second = first.of(status="guarded", evaluations=1)
    assert (first.status, first.evaluations) == ("not sampled", 0)
    assert asdict(second) == asdict(first) | {"status": "guarded", "evaluations": 1}


def test_the_same_attestation_always_has_the_same_json():
    assert record().to_json() == record().to_json()
    keys = list(json.loads(record().to_json()))
    assert keys == sorted(keys)
