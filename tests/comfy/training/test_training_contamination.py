"""Bases that carry a safety LoRA: the registry, the statistic T, and the refusals that hang on them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer, read_lora
from modular_lora_guard.modular_lora.guard.build import ModelInfo, SafetyLora, TaskLora, notes
from modular_lora_guard.training.contamination import Finding, KnownBase, check_base, check_start, known_bases, measure
from support.errors import refuses
from torch import Tensor

ASSETS = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets"
DEMO = "880b645c2c0c06f353b6f7b1e5317ff5f2d6545627339127eea3f2daba81ef96"
SHAPES = {f"layer_{i}": (48, 32 if i % 3 else 9 * 16) for i in range(24)}
near = pytest.approx


def weights(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}


def lora(seed: int, rank: int = 4, size: float = 0.2, name: str = "safety") -> LoraFile:
    g = torch.Generator().manual_seed(1000 + seed)
    made = {}
    for n, (out, inside) in SHAPES.items():
        up, down = torch.randn(out, rank, generator=g), torch.randn(rank, inside, generator=g)
        made[n] = LoraLayer(n, down, up * size / rank**0.5, rank / 2)
    return LoraFile(Path(name), name, f"{seed:064d}", {}, made)


def delta(layer: LoraLayer) -> Tensor:
    return layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)


def merged(base: Mapping[str, Tensor], safety: LoraFile, strength: float) -> dict[str, Tensor]:
    return {n: w + strength * delta(safety.layers[n]).reshape(w.shape) for n, w in base.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.0, 1.0, 0.5, -0.3]), rank=st.integers(1, 6))
def test_t_is_that_of_the_dense_matrices(seed, strength, rank):
    safety = lora(seed, rank)
    W = merged(weights(seed), safety, strength)
    D = {n: delta(x).double() for n, x in safety.layers.items()}
    expected = sum(float((W[n].double() * D[n]).sum()) for n in W) / sum(float((d * d).sum()) for d in D.values())
    assert measure(W, safety).strength == near(expected, abs=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.25])
def test_a_merged_safety_lora_is_found_at_its_strength_in_half_precision_too(strength):
    safety = lora(1)
    W = {n: w.half() for n, w in merged(weights(), safety, strength).items()}
    finding = measure(W, safety)
    assert finding.verdict == "contains"
    assert finding.strength == near(strength, abs=4 * finding.deviation)
    assert f"contains the safety LoRA safety at strength {finding.strength:.2f}" in str(finding)


def test_what_was_subtracted_is_told_and_other_loras_are_no_sign_of_this_one():
    safety = lora(1)
    finding = measure(merged(weights(), safety, -1), safety)
    assert finding.verdict == "subtracted"
    assert "had the safety LoRA safety subtracted at strength " in str(finding)
    assert measure(merged(weights(), lora(2), 1.0), safety).verdict == "clean"
    assert measure(merged(merged(weights(), lora(2), 1.0), safety, 1.0), safety).verdict == "contains"


def test_clean_bases_raise_no_alarm_and_z_is_what_it_says():
    safety = lora(1)
    findings = [measure(weights(seed), safety) for seed in range(300)]
    assert all(f.verdict == "clean" for f in findings)
    z = torch.tensor([f.z for f in findings])
    assert 0.7 < float(z.std()) < 1.1  # the larger of two estimates: a little on the safe side
    assert abs(float(z.mean())) < 0.2


def test_structure_that_weights_and_lora_share_widens_the_deviation():
    """Layers whose weights lean on the LoRA, half of them one way and half the other: random directions miss that."""
    safety, W = lora(1), weights()
    for i, n in enumerate(W):
        W[n] = W[n] + (3 if i % 2 else -3) * delta(safety.layers[n])
    finding = measure(W, safety)
    assert finding.verdict == "clean"
    assert finding.deviation > 0.3


def test_one_layer_has_no_spread_and_decides_nothing_by_itself():
    safety = lora(1, size=0.01)
    one = replace(safety, layers={"layer_1": safety.layers["layer_1"]})
    findings = [measure(weights(seed), one) for seed in range(50)]
    assert max(abs(f.strength) for f in findings) > 0.15
    assert all(f.verdict == "clean" for f in findings)


def test_with_a_trusted_base_the_strength_is_exact():
    safety, W0 = lora(1, size=1e-3), weights()
    blind, exact = (measure(merged(W0, safety, 0.25), safety, base=base) for base in (None, W0))
    assert blind.verdict == "clean"
    assert blind.least_seen > 1
    assert (exact.strength, exact.verdict) == (near(0.25, abs=1e-3), "contains")
    assert measure(W0, safety, base=W0).verdict == "clean"


def test_nothing_divides_by_zero():
    safety = lora(1)
    zero = {n: torch.zeros(s) for n, s in SHAPES.items()}
    assert measure(zero, safety).verdict == "clean"
    assert Finding("s", 0.5, 0.0, 1, 0).z == math.inf
    assert Finding("s", 0.14, 0.001, 9, 0).verdict == Finding("s", 0.9, 0.2, 9, 0).verdict == "clean"


def test_weights_are_read_one_after_the_other_and_missing_ones_counted():
    read = []

    class Streamed(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    W = weights()
    del W["layer_3"]
    finding = measure(Streamed(W), lora(1))
    assert sorted(read) == sorted(W)
    assert (finding.layers, finding.missing) == (23, 1)
    with refuses("base.no-such-layers", "safety", "24"):
        measure({}, lora(1))
    with refuses("base.other-shape", "safety", "layer_0", "[48, 144]", "[48, 7]"):
        measure({"layer_0": torch.zeros(48, 7)}, lora(1))


def test_with_a_model_layers_are_found_by_their_weights():
    safety = lora(1)
    names = {n: f"diffusion_model.{n}.weight" for n in SHAPES}
    info = ModelInfo("Toy", names, {key: LayerSpec(n, SHAPES[n]) for n, key in names.items()}, ())
    W = {names[n]: w for n, w in merged(weights(), safety, 1.0).items()}
    assert measure(W, safety, [info]).strength == near(measure(merged(weights(), safety, 1.0), safety).strength)


def check(W: Mapping[str, Tensor], *safety: LoraFile, sha256: str = "0" * 64, **options) -> str:
    return check_base("base.safetensors", sha256, W, safety, known=options.pop("known", {}), **options)


def test_a_contaminated_base_is_refused_with_the_remedy_or_recorded(caplog):
    safety, other = lora(1), lora(2, name="other")
    W = merged(weights(), safety, 0.5)
    assert check(weights(), safety) == ""
    with refuses("base.contaminated", "base.safetensors", "safety (U-Net)", "0.") as error:
        check(W, other, safety)
    assert "train on the original base W0, or set allow_contaminated_base" in str(error.value)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING, "modular_lora"):
        recorded = check(W, other, safety, allow=True)
    assert recorded.startswith("contains the safety LoRA safety (U-Net) at strength 0.")
    assert "trained on all the same (allow_contaminated_base)" in caplog.text


def test_a_merge_at_strength_one_can_be_undone_and_the_error_says_how():
    safety = lora(1, size=1.0)
    with refuses("base.contaminated", "safety (U-Net)", "−1"):
        check(merged(weights(), safety, 1.0), safety)


def test_a_lora_too_small_to_be_found_is_said_to_be(caplog):
    with caplog.at_level(logging.WARNING, "modular_lora"):
        assert check(weights(), lora(1, size=1e-4)) == ""
    assert "safety (U-Net) is too small beside the weights to be found if it was merged" in caplog.text


def test_the_registry_goes_first():
    safety = lora(1)
    W = merged(weights(), safety, 1.0)
    known = {"0" * 64: KnownBase("good", "clean"), "1" * 64: KnownBase("bad", "contaminated", "merged by hand")}
    assert check(W, safety, known=known) == ""
    with refuses("base.contaminated", "bad (merged by hand)"):
        check(weights(), known=known, sha256="1" * 64)
    assert check(weights(), known=known, sha256="1" * 64, allow=True).startswith("is known as contaminated: bad")


def test_a_safety_lora_merged_into_the_text_encoder_alone_is_found_whatever_the_registry_says_of_the_unet():
    def renamed(names: Mapping) -> dict:
        return {f"lora_te_{n}" if n in ("layer_1", "layer_2", "layer_4", "layer_5") else n: x for n, x in names.items()}

    safety = replace(lora(1), layers=renamed(lora(1).layers))
    clean = renamed(weights())
    W = clean | {n: w for n, w in merged(clean, safety, 1.0).items() if n.startswith("lora_te_")}
    known = {"0" * 64: KnownBase("good", "clean")}
    assert check(clean, safety) == check(clean, safety, known=known) == ""
    for registry in ({}, known):
        with refuses("base.contaminated", "safety (text encoder)"):
            check(W, safety, known=registry)
    unet = {n: w for n, w in W.items() if not n.startswith("lora_te_")}  # no text encoder at hand
    assert check(unet, safety) == check(unet, safety, known=known) == ""
    with refuses("base.no-such-layers", "safety", "24"):
        check({}, safety)


def test_a_registry_of_ones_own_adds_to_the_bundled_one_and_overrules_it(tmp_path):
    path = tmp_path / "bases.json"
    path.write_text(json.dumps({"a" * 64: {"name": "mine", "status": "clean"}}), encoding="utf-8")
    assert known_bases(path)["a" * 64] == KnownBase("mine", "clean")
    assert known_bases(path)[DEMO].status == "clean"
    path.write_text(json.dumps({DEMO: {"name": "x", "status": "contaminated", "note": "n"}}), encoding="utf-8")
    assert known_bases(path)[DEMO].status == "contaminated"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("{", "bases.unreadable", ()),
        ("[]", "bases.unreadable", ()),
        ('{"ABC": {"name": "x", "status": "clean"}}', "bases.entry", ("'ABC'",)),
        (json.dumps({"a" * 64: {"name": "x"}}), "bases.entry", ("aaaaaaaaaaaaaaaa",)),
        (json.dumps({"a" * 64: {"name": "x", "status": "fine"}}), "bases.entry", ()),
        (json.dumps({"a" * 64: {"name": "x", "status": "clean", "strength": "1"}}), "bases.entry", ()),
        (json.dumps({"a" * 64: "clean"}), "bases.entry", ()),
    ],
)
def test_a_broken_registry_names_file_and_entry(text, code, named, tmp_path):
    path = tmp_path / "bases.json"
    path.write_text(text, encoding="utf-8")
    with refuses(code, "bases.json", *named):
        known_bases(path)
    with refuses("bases.unreadable", "none.json"):
        known_bases(tmp_path / "none.json")


@pytest.fixture(scope="module")
def demo(comfy, trained):
    """The demo world's U-Net, as ComfyUI loads it."""
    return comfy.nodes.CheckpointLoaderSimple().load_checkpoint(trained)[0]


def test_the_demo_world_is_in_the_bundled_registry_under_the_hash_that_the_host_gives_it(comfy, demo):
    assert comfy.anatomy.model_sha256(demo) == DEMO
    assert known_bases()[DEMO].name == "demo world"


def test_the_demo_safety_lora_is_found_in_the_demo_base_by_the_names_of_comfyui(comfy, demo):
    info = comfy.anatomy.model_info(demo)
    W = {key: w.detach().clone() for key, w in demo.model.state_dict().items()}
    safety = read_lora(ASSETS / "demo_safety_vehicles.safetensors")
    clean = measure(W, safety, [info])
    assert (clean.layers, clean.missing, clean.verdict) == (84, 0, "clean")
    names = {n: info.key_map[n] for n in safety.layers}
    for n, layer in safety.layers.items():
        W[names[n]] += delta(replace(layer, up=layer.up.float(), down=layer.down.float())).reshape(W[names[n]].shape)
    found = measure(W, safety, [info])
    assert found.verdict == "contains"
    assert found.strength - clean.strength == near(1, abs=0.01)
    assert measure(W, read_lora(ASSETS / "demo_task_gloss.safetensors"), [info]).verdict == "clean"


def test_a_training_does_not_go_on_from_a_safety_lora_or_one_that_holds_it():
    safety, task = lora(1), lora(2, name="task")
    check_start(task, [safety])
    for bad in (safety, replace(task, metadata={"modular_lora.role": "safety"})):
        with refuses("start.safety-lora", bad.name):
            check_start(bad, [safety])
    for key in ("modular_lora.contaminated_base", "modular_lora.trained_on"):
        with refuses("start.contaminated", "task", f"{key} 'x'"):
            check_start(replace(task, metadata={key: "x"}), [safety])
    renamed = replace(safety, name="copy", sha256="f" * 64)
    with refuses("start.contaminated", "copy", "1.00"):
        check_start(renamed, [safety])


def test_the_guard_tells_what_a_task_lora_was_trained_on():
    def said(**metadata: str) -> str:
        item = TaskLora(replace(lora(2, name="task"), metadata=metadata), 1.0, 1.0)
        return "\n".join(notes((SafetyLora(lora(1), 1.0),), (item,), "0" * 64, 0, True))

    assert said() == ""
    text = said(**{"modular_lora.contaminated_base": "contains the safety LoRA x\nat strength 1.00"})
    assert text == (
        "task task says that it was trained on a base that is not clean "
        r"('contains the safety LoRA x\nat strength 1.00'): retrain it on W0"
    )
    assert "trained on more than W0 ('base + x')" in said(**{"modular_lora.trained_on": "base + x"})
    sequential = read_lora(ASSETS / "demo_sequential_gloss.safetensors")
    lines = notes((), (TaskLora(sequential, 1.0, 1.0),), sequential.metadata["modular_lora.base_sha256"], 0, True)
    assert any("trained on more than W0" in line for line in lines)
