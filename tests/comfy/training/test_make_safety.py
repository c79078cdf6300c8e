"""Make Safety LoRA in the real ComfyUI, on a CLIP whose attention acts (conftest: the demo world's, random layers)."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch
from modular_lora_guard.modular_lora.guard import concept as concepts
from modular_lora_guard.training.safety.closed.options import MakeOptions
from safetensors.torch import load_file
from support.errors import refuses
from support.graphs import base_graph, bits, guarded_graph

VALUES = {
    "concept": "car", "synonyms": "a bus", "guide": "heart", "preserve": "cat face\ngrinning face",
    "more_options": "calibrate = false",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folders(comfy, loras, tmp_path, monkeypatch):
    (tmp_path / "loras").mkdir()
    for kind in ("loras", "safety_loras"):
        places = ([str(tmp_path / kind), str(comfy.loras)], {".safetensors"})
        monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, kind, places)
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


def make_graph(comfy, **changes) -> dict:
    schema = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraMakeSafety"].INPUT_TYPES()
    found = {**schema["required"], **schema.get("optional", {})}
    values = {name: spec[1]["default"] for name, spec in found.items() if len(spec) > 1 and "default" in spec[1]}
    values |= {"model": ["ckpt", 0], "clip": ["ckpt", 1], **VALUES, **changes}
    return base_graph() | {"make": {"class_type": "ModularLoraMakeSafety", "inputs": values}}


@pytest.fixture(scope="module")
def text(loaded):
    """The text model of the world; what it encoded once is remembered for other tests."""
    made = importlib.import_module("modular_lora_guard.comfy_host.text_inputs").opened(*loaded[:2])
    known, encode = {}, made.encode

    def remembering(prompts, inputs):
        new = [prompt for prompt in prompts if prompt not in known]
        known.update(zip(new, encode(new, made.found.inputs) if new else (), strict=True))
        places = [made.found.inputs.index(one) if one in made.found.inputs else 0 for one in inputs]
        return [[known[prompt][i] for i in places] for prompt in prompts]

    made.encode = remembering
    return made


def keys_and_values(model, clip, prompts: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What every attn2 key and value layer gives for every prompt, by ComfyUI's own encoder, in float64."""
    layers = {
        name: module.weight.double()
        for name, module in model.model.diffusion_model.named_modules()
        if re.search(r"attn2\.to_[kv]$", name)
    }
    rows = {p: clip.encode_from_tokens_scheduled(clip.tokenize(p))[0][0][0].double() for p in prompts}
    return {prompt: {name: x @ W.T for name, W in layers.items()} for prompt, x in rows.items()}


def merged(model, path):
    """The MODEL with ComfyUI's own merge of a file."""
    from comfy.model_management import unload_all_models
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    unload_all_models()  # a loaded model is merged into already, as far as ComfyUI sees
    patched, _ = load_lora_for_models(model, None, load_torch_file(str(path)), 1.0, 0.0)
    patched.patch_model()
    return patched


def movement(comfy, loaded, path, prompts: list[str]) -> dict[str, float]:
    """Largest relative change of a token's keys and values over layers, by ComfyUI's merge of the file."""
    model, clip, _ = loaded
    with torch.inference_mode():
        before = keys_and_values(model, clip, prompts)
        patched = merged(model, path)
        after = keys_and_values(patched, clip, prompts)
        patched.unpatch_model()
    return {
        p: max(
            float(((after[p][n] - y).norm(dim=1) / y.norm(dim=1)).max()) for n, y in before[p].items() if y.norm() > 0
        )
        for p in prompts
    }


def test_the_node_makes_a_file_that_erases_and_keeps_where_attention_mixes_tokens(comfy, run_graph, loaded, folders):
    results = run_graph(make_graph(comfy))
    (handle,), report = results["make"]
    plain = bits(loaded[0].model)
    assert all(torch.equal(value, plain[key]) for key, value in bits(results["ckpt"][0].model).items())
    path = folders / "safety_loras" / "safety.safetensors"
    assert handle.lora.path == path
    assert report.startswith("A safety LoRA of 14 layers was made.\nsaved as safety.safetensors in safety_loras\n")
    shown = comfy.server.texts["make"].splitlines()
    assert shown[:2] == report.splitlines()[:2]
    assert shown[2].startswith("calibration of safety activity: ")
    assert shown[3:] == []
    moved = movement(comfy, loaded, path, ["cat face", "grinning face", "heart", "", "car", "a bus"])
    assert max(moved[p] for p in ("cat face", "grinning face", "heart", "")) < 1e-4
    assert min(moved[p] for p in ("car", "a bus")) > 0.3
    told = float(re.search(r"kept tokens moved by at most ([\d.e+-]+)", report).group(1))
    assert told < 1e-4
    assert float(re.search(r"erased words went ([\d.-]+) %", report).group(1)) > 80
    metadata = handle.lora.metadata
    assert concepts.read(handle.lora) == ("car", "a bus")
    assert metadata["modular_lora.role"] == "safety"
    assert metadata["modular_lora.method"] == "null-space"
    assert json.loads(metadata["modular_lora.preserved_prompts"]) == ["heart", "cat face", "grinning face"]
    assert metadata["modular_lora.base_sha256"] == comfy.anatomy.model_sha256(loaded[0])
    assert all(name.startswith("lora_unet_") and "attn2_to_" in name for name in handle.lora.layers)


def test_a_sampler_guarded_with_it_is_attested_and_measured(comfy, run_graph, folders):
    graph = guarded_graph(task=None, clip=True) | make_graph(comfy)
    graph["guard"]["inputs"]["safety_lora"] = ["make", 0]
    graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = ["guard", 1]
    del graph["safety"]
    results = run_graph(graph)
    assert "functional strength of safety.safetensors: 1.000" in results["guard"][2]
    assert "guarded: 28 branch calls in 14 layers" in results["decode"][1]


def test_every_method_and_choice_of_tokens_makes_a_file(text, tmp_path):
    make = importlib.import_module("modular_lora_guard.training.safety.closed.make").make_safety
    options = importlib.import_module("modular_lora_guard.training.safety.closed.options").MakeOptions
    ranks = {}
    for method in ("null-space", "alphaedit", "uce", "rece"):
        for tokens in ("all", "subject", "last"):
            o = options(
                output_dir=str(tmp_path), concept=("racing car",), guide=("heart",), preserve=("cat face",),
                method=method, tokens=tokens, rounds=2, network_dim=0, calibrate=False,
            )  # fmt: skip
            made = make(text, o, engine="test")
            (part,) = made.parts
            ranks[method, tokens] = part.rank
            assert part.width == 768
            assert part.layers == 14
            assert part.erased["racing car"] > (0.2 if tokens == "last" or method == "rece" else 0.9), (method, tokens)
            if method in ("null-space", "alphaedit"):
                assert part.exact
                assert max(part.kept.values()) < 3e-5  # of a file in fp32
    assert ranks["null-space", "last"] == ranks["uce", "last"] == 1
    assert ranks["uce", "subject"] == 2
    assert ranks["rece", "subject"] == 6
    assert ranks["null-space", "all"] == 76
    less = make(
        text,
        options(output_dir=str(tmp_path), concept=("car",), network_dim=4, save_precision="fp16", calibrate=False),
        engine="test",
    )
    assert less.parts[0].rank == 4
    assert {t.shape[0] for n, t in load_file(less.lora.path).items() if n.endswith("lora_down.weight")} == {4}
    values = {"output_dir": str(tmp_path), "concept": ("car",), "layers": ("to_v",), "calibrate": False}
    only = make(text, options(**values), engine="test")
    assert all("to_v" in name for name in only.lora.layers)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"concept": ""}, "option.no-concept", "concept"),
        ({"preserve": "car"}, "option.both-lists", "'car'"),
        ({"preserve": "a very long prompt " * 40}, "option.too-long", "a very long prompt"),
        ({"guide": "heart\nstar\nmoon"}, "option.guide", "3 prompts for 2"),
        ({"more_options": 'templates = ["a photo"]'}, "option.templates", "'a photo'"),
        ({"more_options": 'layers = ["attn1"]'}, "make.no-such-layer", "'attn1'"),
        ({"more_options": 'output_dir = "/"'}, "train.option-refused", "output_dir"),
    ],
)
def test_refusals_name_what_is_wrong(comfy, run_graph, change, code, named):
    with refuses(code, named):
        run_graph(make_graph(comfy, **change))


def test_a_guarded_model_is_refused(comfy, run_graph):
    graph = guarded_graph("safety_te.safetensors", None, True) | make_graph(comfy, clip=["guard", 1])
    with refuses("train.guarded-model"):
        run_graph(graph)


def test_lists_leave_out_what_names_the_concept():
    kept = MakeOptions(concept=("car",), everything_else="things", preserve=("a red car in rain",)).kept
    assert "a car" not in kept
    assert "a cat" in kept
    assert kept[0] == "a red car in rain", "what is named by hand stays"
    assert len(MakeOptions(concept=("x",), everything_else="all").kept) == 120
    with refuses("option.wrong-value", "everything_else"):
        MakeOptions(concept=("x",), everything_else="nothing")
