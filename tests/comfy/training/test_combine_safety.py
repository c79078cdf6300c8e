"""Combine Safety LoRAs in the real ComfyUI, on a CLIP whose attention acts, and what Make Safety LoRA calibrates."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from modular_lora_guard.modular_lora.guard import concept
from support.errors import refuses
from support.graphs import base_graph, guarded_graph, save_lora

CARS, CATS = ("racing car", "a bus"), ("cat face",)


@pytest.fixture(scope="module")
def text(loaded):
    """The world's text model, for the nodes too: which layers it has is asked once."""
    return importlib.import_module("modular_lora_guard.comfy_host.text_inputs").opened(*loaded[:2])


@pytest.fixture(autouse=True)
def folders(comfy, loras, text, tmp_path, monkeypatch):
    text_inputs = importlib.import_module("modular_lora_guard.comfy_host.text_inputs")
    monkeypatch.setattr(text_inputs, "opened", lambda model, clip, name: text)
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


def changes(lora, info) -> dict[str, torch.Tensor]:
    """ΔW by the key of the weight, whatever the file calls it."""
    return {
        info.key_map[n]: layer.scale * layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        for n, layer in lora.plain.items()
    }


def test_each_acts_on_its_own_concept_and_the_guard_takes_the_file_whole(comfy, run_graph, loaded, text, files):
    words = {"tokens": "subject", "preserve": "grinning face", "more_options": "ridge = 1e-6\ncalibrate = false"}
    results = run_graph(graph(comfy, "cars", "cats", **words))
    (handle,), report = results["combine"]
    assert report.startswith("2 safety LoRAs were combined into one of 14 layers.\nsaved as combined.safetensors in")
    shown = comfy.server.texts["combine"].splitlines()
    assert shown[:2] == report.splitlines()[:2]
    assert [line.partition(": ")[0] for line in shown[2:]] == [
        "cars.safetensors (strength 1)", "cats.safetensors (strength 1.5)", "calibration of safety activity",
    ]  # fmt: skip
    assert handle.lora.path == files / "combined.safetensors"
    read = importlib.import_module("modular_lora_guard.modular_lora.files.reader").read_lora
    cars, cats = (changes(read(files / f"{name}.safetensors"), text.info) for name in ("cars", "cats"))
    both = changes(handle.lora, text.info)
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


def test_a_lora_whose_layers_see_more_than_the_text_is_refused_by_name(comfy, run_graph, files):
    with refuses("combine.mixed-input", "all.safetensors", "diffusion_model."):
        run_graph(graph(comfy, "cars", "all"))
    assert not (files / "combined.safetensors").exists()


def test_the_calibration_is_what_a_run_measures(comfy, loaded, text, folders):
    """The activities that the texts alone tell, beside those that Calibrate Safety LoRA finds with the network."""
    closed = "modular_lora_guard.training.safety.closed"
    make, options, ours = (importlib.import_module(f"{closed}.{name}") for name in ("make", "options", "activity"))
    about = tuple(f"{p} car" for p in ("racing", "red", "police", "old"))
    kept = ("cat face", "dog face", "mouse face", "owl")
    o = options.MakeOptions(
        output_dir=str(folders), concept=("car",), guide=("heart",), tokens="subject", method="uce", calibrate=False
    )
    made = make.make_safety(text, o, engine="test").lora
    factors = {name: (layer.down, layer.up, layer.alpha) for name, layer in made.plain.items()}
    inputs = text.found.inputs
    told = ours.activities(text, inputs, factors, text.encode((*about, *kept), inputs))
    calibrated = importlib.import_module("modular_lora_guard.comfy_host.calibrating").calibrated
    watch = importlib.import_module("modular_lora_guard.modular_lora.command").Lines()
    safety = comfy.host_guard.SafetyLora(made, 1.0)
    found = calibrated(*loaded[:2], safety, about, kept, torch.zeros(1, 4, 8, 8), 2, 3, watch)
    for side, figures in ((found.concept, told[:4]), (found.preserved, told[4:])):
        assert side.at(0.0) == pytest.approx(min(figures), rel=1e-3)
        assert side.at(1.0) == pytest.approx(max(figures), rel=1e-3)
