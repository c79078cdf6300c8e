"""LoRA files that the trainers write: whole or not at all, and what sd-scripts and its friends expect in them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import BASE_KEY, CONTAMINATED_KEY, ROLE_KEY
from modular_lora_guard.training import inspection, output
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.output import DatasetRecord, Provenance, metadata, write, write_tensors
from modular_lora_guard.training.projection import row_basis
from safetensors import safe_open
from support.errors import refuses
from torch import Tensor

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_{}_attn2_to_k"
ASSETS = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets"
DATA = DatasetRecord("d" * 64, 12, 3, 30, {"10_secret name": {"a secret": 4}}, {"10_secret name": {"n_repeats": 10}})
MADE = Provenance(
    family="SD15",
    prediction="epsilon",
    base_sha256="b" * 64,
    engine="modular-lora-guard 0.1.0, embedded",
    steps=20,
    started=1.7e9,
    finished=1.7e9 + 60.5,
    base_name="base.safetensors",
    safety_sha256=("a" * 64,),
    initialisation="task, seed 42",
    dataset=DATA,
)


def random_layers(count: int = 3, rank: int = 4, alpha: float = 2.0, seed: int = 0, kernel: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    k, one = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    make = lambda *shape: torch.randn(shape, generator=g) / 8  # noqa: E731
    return {NAME.format(i): (make(rank, 32, *k), make(24, rank, *one), alpha) for i in range(count)}


@settings(max_examples=25, deadline=None)
@given(
    precision=st.sampled_from(["fp16", "bf16", "float"]),
    alpha=st.sampled_from([0.5, 4.0, 16.0]),
    kernel=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, precision, alpha, kernel, seed):
    layers = random_layers(alpha=alpha, seed=seed, kernel=kernel)
    path = tmp_path_factory.mktemp("o") / "lora.safetensors"
    lora = write(path, layers, {"ss_seed": "1"}, precision)
    assert (lora.path, lora.sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())
    dtype = output.DTYPES[precision]
    for name, (down, up, _) in layers.items():
        read = read_lora(path).layers[name]
        assert torch.equal(read.down, down.to(dtype))
        assert torch.equal(read.up, up.to(dtype))
        assert read.alpha == alpha


def test_tensors_carry_kohya_names_shapes_and_types(tmp_path):
    write(tmp_path / "x.safetensors", random_layers(1), {"ss_seed": "1"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        name = NAME.format(0)
        assert set(file.keys()) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
        alpha = file.get_tensor(f"{name}.alpha")
        assert (alpha.shape, alpha.dtype) == (torch.Size(()), torch.float16)


# Values of precalculate_safetensors_hashes of sd-scripts 48d368fa for these tensors and this metadata
@pytest.mark.parametrize(
    ("rows", "model_hash", "legacy_hash"),
    [
        (64, "7a581c874998b359f640345b0e6bf6b8c2a3e95ccf56a2a6cab39a054b8ef11e", "e3b0c442"),
        (16384, "a8539a10287903ea653a89d3f6e6152104700f58a97c8ac2b1ffdd02b1bdc908", "ff8ace61"),
    ],
)
def test_hashes_are_those_of_sd_scripts(rows, model_hash, legacy_hash, tmp_path):
    def ramp(shape: tuple[int, int], period: int) -> Tensor:
        return (torch.arange(8 * rows, dtype=torch.float32).reshape(shape) % period / period - 0.5).half()

    tensors = {}
    for i in range(3):
        tensors |= {f"{NAME.format(i)}.lora_down.weight": ramp((8, rows), 97)}
        tensors |= {f"{NAME.format(i)}.lora_up.weight": ramp((rows, 8), 89)}
        tensors |= {f"{NAME.format(i)}.alpha": torch.tensor(4.0).half()}
    says = {"ss_seed": "42", "ss_training_comment": "naïve", "modelspec.title": "x", "modular_lora.role": "task"}
    lora = write_tensors(tmp_path / "x.safetensors", tensors, says)
    assert (lora.metadata["sshs_model_hash"], lora.metadata["sshs_legacy_hash"]) == (model_hash, legacy_hash)
    report = inspection.inspect(lora.path)
    assert report.hashes == (
        ("sshs_model_hash", model_hash, model_hash),
        ("sshs_legacy_hash", legacy_hash, legacy_hash),
    )


def test_fp16_overflow_names_layer_value_and_remedy_and_bf16_takes_it(tmp_path):
    layers = random_layers(2)
    down, up, alpha = layers[NAME.format(1)]
    layers[NAME.format(1)] = (down, up * 0 + 7e4, alpha)
    with refuses("train.out-of-range", "_1_attn2_to_k", "7e+04", "torch.float16", "bf16"):
        write(tmp_path / "x.safetensors", layers, {})
    assert list(tmp_path.iterdir()) == []
    assert len(write(tmp_path / "x.safetensors", layers, {}, "bf16").layers) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_in_every_type(bad, tmp_path):
    layers = random_layers(1)
    layers[NAME.format(0)][0][0, 0] = bad
    for precision in output.DTYPES:
        with refuses("train.not-finite", "_0_attn2_to_k"):
            write(tmp_path / "x.safetensors", layers, {}, precision)
    assert list(tmp_path.iterdir()) == []


def test_zero_layers_are_left_out_and_counted_and_nothing_but_zeros_is_an_error(tmp_path, caplog):
    layers = random_layers(3)
    down, up, alpha = layers[NAME.format(1)]
    layers[NAME.format(1)] = (down, up * 1e-9, alpha)  # below what fp16 can hold
    with caplog.at_level(logging.WARNING, "modular_lora"):
        assert set(write(tmp_path / "x.safetensors", layers, {}).layers) == {NAME.format(0), NAME.format(2)}
    assert f"1 of 3 layers are zero and left out (first {NAME.format(1)})" in caplog.text
    with refuses("train.all-zero", "all 3", "fp16"):
        write(tmp_path / "y.safetensors", {n: (d, u * 1e-9, a) for n, (d, u, a) in random_layers(3).items()}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(moment, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    before = write(path, random_layers(seed=1), {}).sha256

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, fail)
    with refuses("guard.not-written", "x.safetensors", "No space left on device"):
        write(path, random_layers(seed=2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert read_lora(path).sha256 == before


def test_no_file_with_the_ending_of_a_lora_is_ever_half_written(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(p.name for p in tmp_path.iterdir()))
    write(tmp_path / "x.safetensors", random_layers(), {})
    assert len(seen) == 1
    assert not seen[0].endswith(".safetensors")


def test_the_last_projection_is_made_before_the_cast_and_its_residual_is_recorded(tmp_path):
    layers, safety = random_layers(2, seed=1), random_layers(1, seed=2)
    bases = {NAME.format(0): row_basis(safety[NAME.format(0)][0])}
    lora = write(tmp_path / "x.safetensors", layers, {"ss_seed": "1"}, "fp16", bases)
    share = lambda i: float((lora.layers[NAME.format(i)].down.float() @ bases[NAME.format(0)]).norm())  # noqa: E731
    assert share(0) < 1e-3 < 1e-1 < share(1)
    said = float(lora.metadata["modular_lora.projected"].removeprefix("residual "))
    assert said == pytest.approx(share(0) / float(lora.layers[NAME.format(0)].down.float().norm()), rel=0.05)
    assert 1e-6 < said < 2**-11
    assert "modular_lora.projected" not in write(tmp_path / "y.safetensors", layers, {}).metadata


def test_metadata_of_a_task_lora_is_what_kohya_users_look_for():
    options = TaskOptions(
        output_name="mine", target="conv", network_dim=8, optimizer_args=("weight_decay=0.1",), max_train_steps=20
    )
    found = metadata(options, MADE)
    assert all(type(key) is str and type(value) is str for key, value in found.items())
    expected = {
        "ss_output_name": "mine",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "16.0",
        "ss_network_args": '{"conv_dim": "8", "conv_alpha": "16.0"}',
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_steps": "20",
        "ss_max_train_steps": "20",
        "ss_seed": "42",
        "ss_optimizer": "AdamW(weight_decay=0.1)",
        "ss_lr_scheduler": "cosine",
        "ss_learning_rate": "0.0001",
        "ss_num_train_images": "12",
        "ss_num_reg_images": "3",
        "ss_training_started_at": "1700000000.0",
        "ss_resolution": "(512, 512)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mine",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        ROLE_KEY: "task",
        BASE_KEY: "b" * 64,
        "modular_lora.safety_sha256": "a" * 64,
        "modular_lora.engine": "modular-lora-guard 0.1.0, embedded",
        "modular_lora.dataset_sha256": "d" * 64,
        "modular_lora.initialisation": "task, seed 42",
    }
    assert found | expected == found
    assert json.loads(found["ss_tag_frequency"]) == DATA.tag_frequency
    assert json.loads(found["ss_dataset_dirs"]) == DATA.dirs
    for absent in (CONTAMINATED_KEY, "ss_text_encoder_lr", "ss_min_snr_gamma", "modular_lora.concept"):
        assert absent not in found
    assert metadata(options, replace(MADE, contaminated_base="x 1.00"))[CONTAMINATED_KEY] == "x 1.00"


def test_metadata_of_a_safety_lora_names_concept_and_role():
    found = metadata(SafetyOptions(concept=("vehicle", "car"), train_size=256), replace(MADE, dataset=None))
    assert (found[ROLE_KEY], found["modular_lora.concept"]) == ("safety", "vehicle, car")
    assert found["modelspec.resolution"] == "256x256"
    assert "ss_tag_frequency" not in found


def test_the_privacy_switch_leaves_no_caption_folder_or_output_name():
    options = TaskOptions(output_name="secret name", no_dataset_metadata=True)
    assert "secret" in json.dumps(metadata(replace(options, no_dataset_metadata=False), MADE))
    found = metadata(options, MADE)
    assert "secret" not in json.dumps(found)
    assert found["modelspec.title"] == "LoRA"
    assert found["modular_lora.dataset_sha256"] == "d" * 64


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture"),
    [
        ("SD15", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("SD20", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("SD20", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("SDXL", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("SDXL", "v_prediction", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("Lumina2", "epsilon", "Lumina2", "Lumina2/lora"),
    ],
)
def test_the_base_is_named_as_sd_scripts_names_it(family, prediction, version, architecture):
    found = metadata(TaskOptions(), replace(MADE, family=family, prediction=prediction))
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == (version, architecture)
    assert found["modelspec.prediction_type"] == ("epsilon" if prediction == "epsilon" else "v")
    assert found["ss_v2"] == str(family == "SD20")


def test_inspect_shows_a_file_and_notices_metadata_of_another(tmp_path):
    layers = random_layers(3) | {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": random_layers(1, 2, 1.0)[NAME.format(0)]
    }
    says = metadata(TaskOptions(training_comment="one\nline"), MADE)
    lora = write(tmp_path / "x.safetensors", layers, says)
    report = inspection.inspect(lora.path)
    assert [(p.part, p.layers, p.ranks, p.alphas) for p in report.parts] == [
        ("U-Net", 3, ((4, 3),), ((2.0, 3),)),
        ("text encoder", 1, ((2, 1),), ((1.0, 1),)),
    ]
    dense = [alpha / len(down) * up @ down for down, up, alpha in random_layers(3).values()]
    assert report.parts[0].norm == pytest.approx(float(torch.stack(dense).norm()), rel=1e-3)
    text = inspection.format_inspection(report)
    for part in ("task role", lora.sha256, "b" * 64, "sd_v1 (ss_base_model_version)", "ss_steps: 20", "one?line"):
        assert part in text
    assert text.count("as in the file") == 2
    assert "ss_tag_frequency" in text.splitlines()[-1]

    other = write(tmp_path / "y.safetensors", random_layers(3, seed=9), says)
    tensors = {f"{n}.lora_{k}.weight": getattr(x, k) for n, x in other.layers.items() for k in ("down", "up")}
    (tmp_path / "z.safetensors").write_bytes(
        safetensors.torch.save(tensors, lora.metadata)  # tensors changed, metadata kept
    )
    text = inspection.format_inspection(inspection.inspect(tmp_path / "z.safetensors"))
    assert f"the file says {lora.metadata['sshs_model_hash']}" in text


def test_inspect_describes_what_is_no_lora_without_its_norm(tmp_path):
    tensors = {f"a.hada_w{i}_{half}": torch.ones(2, 2) for i in (1, 2) for half in "ab"} | {"a.alpha": torch.ones(1)}
    tensors |= {"b.lokr_w1": torch.ones(2, 2), "b.lokr_w2": torch.ones(2, 2, 3, 3), "bundle_emb.x.y": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    report = inspection.inspect(tmp_path / "x.safetensors")
    part = report.parts[0]
    assert part.kinds == (("LoHa", 1), ("LoKr", 1))
    assert part.ranks == ((2, 1), (None, 1))
    assert (part.layers, part.convolutions, part.norm, part.largest) == (2, 1, None, None)
    text = inspection.format_inspection(report)
    for words in ("format (layers) LoHa (1), LoKr (1)", "norm only with the base's weights", "1 tensors of bundled"):
        assert words in text


def test_inspect_reads_the_demo_world_loras():
    text = inspection.format_inspection(inspection.inspect(ASSETS / "demo_safety_vehicles.safetensors"))
    assert "safety role" in text
    assert "84 layers" in text
    assert "modular_lora.concept: vehicles" in text


def test_comfyui_and_the_guard_load_every_layer_that_is_written(comfy, loaded, loras, tmp_path):
    model, _, _ = loaded
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=g) / 8  # noqa: E731
    layers = {}
    for name, spec in loras.unet.items():
        out, *inside = spec.weight_shape
        layers[name] = make(4, *inside), make(out, 4, *(1 for _ in inside[1:])), 4.0
    path = write(tmp_path / "x.safetensors", layers, metadata(TaskOptions(), MADE)).path
    info = comfy.anatomy.model_info(model)
    patches = sys.modules["comfy.lora"].load_lora(safetensors.torch.load_file(path), info.key_map)
    assert set(patches) == {info.key_map[name] for name in layers}
    part = comfy.host_guard.build_part(
        "model",
        info,
        (comfy.host_guard.SafetyLora(comfy.host_files.read_lora(path), 1.0),),
        (),
        comfy.host_guard.GuardLimits(),
    )
    assert (part.lines[0].matched, part.lines[0].unmatched) == (len(layers), ())
