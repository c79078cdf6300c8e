"""Which MODEL and CLIP the trainers and the audit take, what they say of others, and in whose name."""

from __future__ import annotations

import importlib
import shutil
import sys
from types import ModuleType

import pytest
import torch
from modular_lora_guard.modular_lora.files.names import is_text
from modular_lora_guard.training.in_place import writing_allowed
from modular_lora_guard.training.kohya import checkout
from modular_lora_guard.training.kohya import engine as kohya
from modular_lora_guard.training.kohya.arguments import FAMILIES
from modular_lora_guard.training.kohya.network import ARCHITECTURES
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from support.encoder_toys import ENCODERS, tokens, toy_clip
from support.errors import refuses
from support.families import make
from support.families_image import IMAGE
from support.families_video import VIDEOS
from support.graphs import base_graph
from support.kohya_toys import STUB, Seen, task_options

FLUX = next(family for family in IMAGE if family.config == "Flux")


def part(comfy, name: str) -> ModuleType:
    return importlib.import_module(f"modular_lora_guard.{name}")


@pytest.fixture
def host_model(comfy) -> ModuleType:
    return part(comfy, "comfy_host.trainer_model")


@pytest.fixture
def flux(comfy):
    """A Flux MODEL and its CLIP, of ComfyUI's own classes at toy size, with the real tokenizer."""
    from comfy.text_encoders.flux import FluxTokenizer

    clip = toy_clip(ENCODERS["CLIP-L and T5-XXL (Flux)"])
    clip.tokenizer = FluxTokenizer()
    return make(FLUX), clip


@pytest.fixture
def files(comfy, tmp_path, monkeypatch):
    """Files of a Flux model in ComfyUI's folders of their kinds."""
    for kind, names in (("diffusion_models", ("flux",)), ("text_encoders", ("l", "t5")), ("vae", ("ae",))):
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(STUB / "README.md", tmp_path / kind / f"{name}.safetensors")
        folders = comfy.folder_paths.folder_names_and_paths
        monkeypatch.setitem(folders, kind, ([str(tmp_path / kind)], {".safetensors"}))
    return tmp_path


PARTS = {"ae": "ae.safetensors", "clip_l": "l.safetensors", "t5xxl": "t5.safetensors"}


def test_the_kohya_engine_takes_a_flux_model(host_model, flux, files):
    base = host_model.kohya_base(*flux, "flux.safetensors", TaskOptions(), PARTS)
    assert (base.family, base.checkpoint) == ("Flux", files / "diffusion_models" / "flux.safetensors")
    assert base.parts["ae"] == str(files / "vae" / "ae.safetensors")
    assert base.parts["t5xxl"] == str(files / "text_encoders" / "t5.safetensors")
    other = {"ae": "../vae/ae.safetensors"}
    for wrong, code, named in (({"unet": "x"}, "kohya.unknown-file", "'unet'"), (other, "kohya.no-such-file", "ae")):
        with refuses(code, named):
            host_model.kohya_base(*flux, "flux.safetensors", TaskOptions(), wrong)


def test_what_no_engine_trains_is_refused_by_both(host_model, flux):
    stranger = make(next(family for family in IMAGE if family.config == "LotusD"))
    assert "LotusD" not in FAMILIES
    with refuses("train.family", "LotusD"):
        host_model.opened(stranger, flux[1], None, TaskOptions()).__enter__()
    with refuses("kohya.family"):
        host_model.kohya_base(stranger, flux[1], "flux.safetensors", TaskOptions(), {})


def test_every_family_of_the_kohya_engine_is_one_of_comfyui_or_named_as_newer(comfy):
    from comfy import supported_models

    assert [name for name in FAMILIES if not hasattr(supported_models, name)] in ([], ["Anima"])  # 0.33.0 has it


def test_hunyuan_images_layers_get_the_names_that_comfyui_loads(comfy):
    model = make(next(family for family in VIDEOS if family.config == "HunyuanImage21"), filled=False)
    loaded = part(comfy, "comfy_host.introspection").model_info(model).key_map
    double = ("mod_linear", "attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2")  # as the checkout calls its own layers
    theirs = [f"double_blocks_0_{stream}_{layer}" for stream in ("img", "txt") for layer in double]
    theirs += [f"single_blocks_0_{layer}" for layer in ("modulation_linear", "linear1", "linear2")]
    names = [ARCHITECTURES["HYImageDiffusionTransformer"].name(f"lora_unet_{layer}") for layer in theirs]
    assert set(names) <= loaded.keys()
    assert len({loaded[name] for name in names}) == len(theirs)


def test_a_clip_of_another_family_is_said_at_once(host_model, comfy, flux, run_graph):
    model, clip, vae = run_graph(base_graph() | {"s": {"class_type": "PreviewAny", "inputs": {"source": ["ckpt", 0]}}})[
        "ckpt"
    ]
    mixed, safety = ((model, flux[1]), (flux[0], clip)), part(comfy, "training.options").SafetyOptions(concept=("a",))
    for node, options in (("Train Task LoRA", TaskOptions()), ("Train Safety LoRA", safety)):
        for pair in mixed:
            with refuses("train.other-clip", node):
                host_model.opened(*pair, vae, options).__enter__()
            with refuses("train.other-clip"):
                host_model.kohya_base(*pair, "x", options, {})
    for pair in mixed:
        with refuses("train.other-clip", "Audit"):
            part(comfy, "comfy_host.pipeline").ComfyPipeline(*pair, vae)


def test_every_message_names_the_node_that_it_stands_on_and_what_that_node_has(host_model, comfy, run_graph, loras):
    graph = base_graph() | {"s": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 0]}}}
    stock = {"lora_name": "other.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    graph["lora"] = {"class_type": "LoraLoader", "inputs": stock | {"model": ["ckpt", 0], "clip": ["ckpt", 1]}}
    out = run_graph(graph)
    (model, clip, vae), merged = out["ckpt"], out["lora"]
    pipeline, safety = part(comfy, "comfy_host.pipeline").ComfyPipeline, part(comfy, "training.options").SafetyOptions()
    runs = {
        "Train Task LoRA": lambda *pair: host_model.opened(*pair, vae, TaskOptions()).__enter__(),
        "Train Safety LoRA": lambda *pair: host_model.opened(*pair, vae, safety).__enter__(),
        "Audit": lambda *pair: pipeline(*pair, vae),
    }
    for node, run in runs.items():
        with refuses("input.wrong-type", node, "str"):
            run("no model", clip)
        with refuses("model.merged") as caught:
            run(*merged)
        assert "accept_merged" not in str(caught.value)
        assert ("allow_contaminated_base" in str(caught.value)) == (node == "Train Task LoRA")
        hooked = model.clone()
        hooked.set_injections("bypass", [None])
        with refuses("model.patched", "bypass LoRA") as caught:
            run(hooked, clip)
        assert "guard" not in str(caught.value).lower()


def test_before_and_after_the_guard_the_same_is_said_of_a_lora_loader(run_graph, loras):
    from support.graphs import guarded_graph

    said = []
    stock = {"lora_name": "other.safetensors", "strength_model": 1.0}
    before = guarded_graph()
    before["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": stock | {"model": ["ckpt", 0]}}
    before["guard"]["inputs"]["model"] = ["lora", 0]
    after = guarded_graph()
    after["as"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    after["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": stock | {"model": ["as", 0]}}
    after["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 0]}}
    for graph in (before, after):
        with refuses(("model.merged", "model.refused"), "Load Task LoRA") as caught:
            run_graph(graph)
        said.append(str(caught.value))
    assert not any("before Guard Model" in text for text in said)


def test_more_layers_than_the_text_encoder_has_are_refused(host_model, run_graph):
    model, clip, vae = run_graph(base_graph() | {"s": {"class_type": "PreviewAny", "inputs": {"source": ["ckpt", 0]}}})[
        "ckpt"
    ]
    with refuses("train.clip-skip", "99"):
        host_model.opened(model, clip, vae, TaskOptions(clip_skip=99)).__enter__()


@pytest.fixture
def flux_checkout(tmp_path):
    """The stand-in as sd-scripts' Flux trainer: three files more, and previews drawn elsewhere."""
    folder = tmp_path / "checkout"
    shutil.copytree(STUB, folder)
    script = (folder / "train_network.py").read_text(encoding="utf-8")
    script = script.replace(
        '("dataset_config", "sample_prompts")', '("dataset_config", "sample_prompts", "ae", "clip_l", "t5xxl")'
    )
    (folder / "flux_train_network.py").write_text(script, encoding="utf-8")
    (folder / "library" / "flux_train_utils.py").write_text("from .train_util import sample_image_inference\n")
    return checkout.find_engine(str(folder), sys.executable)


@pytest.mark.slow
def test_a_flux_lora_is_trained_with_the_files_that_were_named(place, flux_checkout, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="sd-scripts runs on accelerate, which comes with peft")
    launch = kohya._launch
    monkeypatch.setattr(kohya, "_launch", lambda *args: [launch(*args)[0], launch(*args)[-1]])
    options, seen = task_options(place, tmp_path / "out", max_train_steps=2), Seen()
    base = kohya.Base(place / "base.safetensors", "Flux")
    with refuses("option.kohya-files", "clip_l, t5xxl, ae"):
        kohya.train_task(flux_checkout, options, base, seen)
    parts = {name: str(place / "base.safetensors") for name in PARTS}
    result = kohya.train_task(flux_checkout, options, kohya.Base(base.checkpoint, "Flux", parts=parts), seen)
    assert result.argv[result.argv.index("--ae") + 1] == parts["ae"]
    assert "NOT held against what the text encoders take" in seen.said
    with refuses("option.kohya-files"):
        kohya.train_task(flux_checkout, options, kohya.Base(base.checkpoint, "SD15", parts=parts), seen)


def test_sd_scripts_texts_are_held_against_clips_length(place, tmp_path, comfy):
    base = kohya.Base(place / "base.safetensors", "SD15")
    count = kohya.clip_counter(base, 75)
    assert not count("a " * 75)
    assert count("a " * 76)
    assert not kohya.clip_counter(base, 150)("a " * 150)
    engine = checkout.find_engine(str(STUB), sys.executable)
    options = SafetyOptions(output_dir=str(tmp_path), objective="leco", concept=("a car " * 50,))
    with refuses("option.too-many-tokens", "75"):
        kohya.train_safety(engine, options, base, Seen())


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("CLIP-L and T5-XXL (Flux)", {"lora_te1_text_model_", "lora_te3_encoder_"}),  # sd-scripts' own
        ("Qwen3 4B (Z-Image)", {"text_encoders.qwen3_4b."}),
    ],
)
def test_text_encoders_of_newer_families_are_trained_under_names_that_the_guard_reads(
    name, prefixes, host_model, comfy
):
    adapters = part(comfy, "training.adapters")
    clip = toy_clip(ENCODERS[name])
    info = comfy.anatomy.clip_info(clip)
    names = host_model.text_names(info)
    assert len(set(names.values())) == len(names) > 10
    for path, chosen in names.items():
        assert is_text(chosen)
        assert info.specs[info.key_map[chosen]].path == path
        assert chosen.startswith(tuple(prefixes))
    encoder, cpu = clip.cond_stage_model, torch.device("cpu")
    spec = adapters.Spec({}, names, rank=2, alpha=2.0, dropout=0.0, seed=1, role="task")
    with (
        host_model._plain_weights(encoder, torch.float32, cpu),
        writing_allowed(),
        adapters.adapted(torch.nn.Identity(), encoder, spec) as made,
    ):
        found = encoder.encode_token_weights(tokens(ENCODERS[name]))
        sum(one.square().sum() for one in found[:2] if one is not None).backward()
        reached = [layer for layer in names.values() if made.pair(layer)[1].grad is not None]
    assert {prefix for prefix in prefixes if any(layer.startswith(prefix) for layer in reached)} == prefixes
    assert len(reached) > len(names) // 2


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_text_encoder_is_trained(name, host_model, comfy):
    """ComfyUI's own classes; what CLIP alone writes into is copied, for the others as beside a transformer."""
    adapters, encoder = part(comfy, "training.adapters"), ENCODERS[name]
    with torch.inference_mode():
        clip = toy_clip(encoder)
    names, model = host_model.text_names(comfy.anatomy.clip_info(clip)), clip.cond_stage_model
    spec = adapters.Spec({}, names, rank=2, alpha=2.0, dropout=0.0, seed=1, role="task")
    alone = set(encoder.streams) <= {"l", "g", "h"}
    writing = host_model._cloned_norm_inputs(model) if alone else writing_allowed()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        host_model._plain_weights(model, torch.float32, torch.device("cpu")),
        writing,
        adapters.adapted(torch.nn.Identity(), model, spec) as made,
    ):
        found = model.encode_token_weights(tokens(encoder))
        further = found[2].values() if len(found) > 2 else ()
        said = [x for x in (*found[:2], *further) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        sum(x.square().sum() for x in said).backward()
        reached = [layer for layer in names.values() if made.pair(layer)[1].grad is not None]
    assert len(reached) > len(names) // 2
