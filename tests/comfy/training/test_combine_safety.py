"""Combine Safety LoRAs in the real ComfyUI, on a CLIP whose attention acts, and what Make Safety LoRA calibrates."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from modular_lora_guard.modular_lora.guard import activity, concept
from modular_lora_guard.training import cli
from support.errors import refuses
from support.graphs import base_graph, guarded_graph, save_lora

CARS, CATS = ("racing car", "a bus"), ("cat face",)


@pytest.fixture(autouse=True)
def folders(comfy, loras, tmp_path, monkeypatch):
    for kind in ("loras", "safety_loras"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


@pytest.fixture
def files(loras, folders):
    """Two files that change the cross-attention's keys and values as they like, and one that changes more."""
    text = {name: spec for name, spec in loras.unet.items() if "attn2_to_k" in name or "attn2_to_v" in name}
    for name, layers, seed, prompts in (
        ("cars", text, 1, CARS), ("cats", dict(list(text.items())[:9]), 2, CATS), ("all", loras.unet, 3, ("owl",)),
    ):  # fmt: skip
        plain = folders / f"{name}.plain.safetensors"
        save_lora(plain, layers, 3, seed)
        concept.write_copy(plain, folders / "safety_loras" / f"{name}.safetensors", prompts)
    return folders / "safety_loras"


def graph(comfy, *names: str, **changes) -> dict:
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraCombineSafety"].INPUT_TYPES()
    found = {**schema["required"], **schema.get("optional", {})}
    values = {name: spec[1]["default"] for name, spec in found.items() if len(spec) > 1 and "default" in spec[1]}
    made = base_graph()
    for number, name in enumerate(names):
        before = {"safety_lora": [f"load{number - 1}", 0]} if number else {}
        inputs = {"lora_name": f"{name}.safetensors", "strength": 1.0 + number / 2, **before}
        made[f"load{number}"] = {"class_type": "ModularLoraLoadSafety", "inputs": inputs}
    values |= {"model": ["ckpt", 0], "clip": ["ckpt", 1], "safety_lora": [f"load{len(names) - 1}", 0], **changes}
    return made | {"combine": {"class_type": "ModularLoraCombineSafety", "inputs": values}}


def rows(clip, prompt: str) -> torch.Tensor:
    """What cross-attention sees of a prompt (tokens width), by ComfyUI's own encoder."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0].double()


def changes(lora) -> dict[str, torch.Tensor]:
    return {
        n: layer.scale * layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        for n, layer in lora.plain.items()
    }


def test_each_acts_on_its_own_concept_and_the_guard_takes_the_file_whole(comfy, run_graph, loaded, files):
    words = {"tokens": "subject", "preserve": "grinning face", "more_options": "ridge = 1e-6"}
    results = run_graph(graph(comfy, "cars", "cats", **words))
    (handle,), report = results["combine"]
    assert report.startswith("2 safety LoRAs were combined into one of 14 layers.\nsaved as combined.safetensors in")
    assert handle.lora.path == files / "combined.safetensors"
    read = importlib.import_module("modular_lora_guard.modular_lora.files.reader").read_lora
    cars, cats = (changes(read(files / f"{name}.safetensors")) for name in ("cars", "cats"))
    both = changes(handle.lora)
    text = importlib.import_module("modular_lora_guard.comfy_host.text_inputs").opened(*loaded[:2])
    spans = {p: text.encode([p], text.found.inputs)[0][0].spans for p in (*CARS, *CATS, "grinning face")}
    with torch.inference_mode():
        own = {p: rows(loaded[1], p)[slice(*spans[p][0])].T for p in spans}
    for name, change in both.items():
        for prompts, wanted in ((CARS, cars[name]), (CATS, 1.5 * cats.get(name, torch.zeros_like(change)))):
            x = torch.cat([own[p] for p in prompts], 1)
            other = (cars[name] if prompts is CATS else 1.5 * cats.get(name, cars[name])) @ x
            assert (change @ x - wanted @ x).norm() < 1e-3 * max(other.norm(), (wanted @ x).norm())
        assert (change @ own["grinning face"]).norm() < 1e-3 * (cars[name] @ own["grinning face"]).norm()
    assert concept.read(handle.lora) == ("racing car", "cat face", "a bus")
    assert [s["name"] for s in json.loads(handle.lora.metadata["modular_lora.combined_from"])] == [
        "cars.safetensors", "cats.safetensors",
    ]  # fmt: skip
    guarded = guarded_graph(task=None, clip=True) | graph(comfy, "cars", "cats", **words)
    guarded["guard"]["inputs"]["safety_lora"] = ["combine", 0]
    guarded["pos"]["inputs"]["clip"] = guarded["neg"]["inputs"]["clip"] = ["guard", 1]
    del guarded["safety"]
    assert "guarded: 28 branch calls in 14 layers" in run_graph(guarded)["decode"][1]


def test_lists_of_prompts_are_told_apart_by_blank_lines(comfy):
    lists = importlib.import_module("modular_lora_guard.nodes.combine_safety").lists_of
    assert lists("a car\n a bus \n\n \n-\n\nowl\n") == [("a car", "a bus"), (), ("owl",)]
    assert lists(" \n\n") == []


@pytest.mark.parametrize(
    ("names", "change", "code", "named"),
    [
        (("cars", "all"), {}, "combine.mixed-input", "all.safetensors"),
        (("cars",), {}, "combine.too-few", "1 safety LoRA"),
        (("cars", "cats"), {"concept_prompts": "a\n\nb\n\nc"}, "combine.prompts", "3 lists"),
        (("cars", "cats"), {"concept_prompts": "cat face\n\n-"}, "combine.same-prompt", "'cat face'"),
    ],
)
def test_refusals_name_what_is_wrong(comfy, run_graph, files, names, change, code, named):
    with refuses(code, named):
        run_graph(graph(comfy, *names, **change))
    assert not (files / "combined.safetensors").exists()


def test_the_command_line_writes_the_same_file(comfy, loaded, files, folders, capsys, monkeypatch):
    texts = importlib.import_module("modular_lora_guard.comfy_host.text_inputs").opened(*loaded[:2])
    host = importlib.import_module("modular_lora_guard.comfy_host.trainer_model")
    monkeypatch.setattr(cli, "_text_model", lambda chosen: (host, texts))
    checkpoint = folders / "any.safetensors"
    checkpoint.touch()
    given = ["combine-safety", str(files / "cars.safetensors"), str(files / "cats.safetensors")]
    given += ["--checkpoint", str(checkpoint), "--output_dir", str(folders / "made"), "--tokens", "last"]
    given += ["--concept", "--concept", "cat face", "owl", "--strength", "1", "--strength", "0.5", "--no-calibrate"]
    assert cli.main(given) == 0
    assert "2 safety LoRAs as one, 14 layers" in capsys.readouterr().out
    made = comfy.host_files.read_lora(folders / "made" / "combined.safetensors")
    assert concept.read(made) == ("racing car", "cat face", "a bus", "owl")
    assert activity.KEY not in made.metadata
    assert cli.main([*given, "--strength", "2"]) == 1
    assert "--strength: 3 numbers for 2 files" in capsys.readouterr().err


def test_the_calibration_is_what_a_run_measures(comfy, loaded, folders):
    """Make Safety LoRA's figures from texts alone, beside those that Calibrate Safety LoRA finds with the network."""
    closed = "modular_lora_guard.training.safety.closed"
    make, options = (importlib.import_module(f"{closed}.{name}") for name in ("make", "options"))
    text = importlib.import_module("modular_lora_guard.comfy_host.text_inputs").opened(*loaded[:2])
    about = tuple(f"{p} car" for p in ("racing", "red", "fast", "police", "old", "new", "small", "big"))
    kept = tuple(f"{p} face" for p in ("cat", "dog", "mouse", "lion", "pig", "owl", "grinning"))
    o = options.MakeOptions(
        output_dir=str(folders), concept=about, guide=("heart",), preserve=kept, tokens="subject", method="uce"
    )
    made = make.make_safety(text, o, engine="test")
    told = activity.read(made.lora)
    calibrated = importlib.import_module("modular_lora_guard.comfy_host.calibrating").calibrated
    safety = comfy.host_guard.SafetyLora(made.lora, 1.0)
    watch = importlib.import_module("modular_lora_guard.modular_lora.command").Lines()
    found = calibrated(*loaded[:2], safety, about, ("heart", *kept), torch.zeros(1, 4, 8, 8), 1, 3, watch)
    assert (told.base_sha256, told.strength) == (found.base_sha256, found.strength)
    assert told.concept.quantiles == pytest.approx(found.concept.quantiles, rel=1e-3)
    assert told.preserved.quantiles == pytest.approx(found.preserved.quantiles, rel=1e-3)
    assert told.auc == found.auc
    assert told.auc >= activity.LEAST_AUC
