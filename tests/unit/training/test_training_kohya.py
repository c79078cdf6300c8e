"""The sd-scripts engine's network module, against the stand-in checkout in sd_scripts_stub, in this process."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training.kohya import entry, preview
from modular_lora_guard.training.kohya import network as kohya_network
from modular_lora_guard.training.projection import residual, row_basis
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate", reason="sd-scripts runs on accelerate, which comes with peft")
import accelerate
from support.errors import refuses

STUB = Path(__file__).resolve().parents[2] / "support" / "sd_scripts_stub"
OURS = entry.NETWORK


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The stand-in's modules, a checkpoint, a safety LoRA, and its task training in this process."""
    monkeypatch.syspath_prepend(str(STUB))
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerate.Accelerator, "save_state", accelerate.Accelerator.save_state)
    models, script = importlib.import_module("library.models"), importlib.import_module("train_network")
    save_file(models.random_weights(0), tmp_path / "base.safetensors")
    entry.guard_previews("train_network.py")
    entry.describe_states()
    space = SimpleNamespace(models=models, folder=tmp_path, base=tmp_path / "base.safetensors")

    def train(name: str, *arguments: str, **network: str):
        gc.collect()  # the networks of earlier trainings
        fixed = {"output_dir": tmp_path, "output_name": name, "pretrained_model_name_or_path": space.base}
        fixed |= {"learning_rate": 0.01, "max_train_steps": 3, "max_grad_norm": 1, "seed": 42, "network_dim": 3}
        fixed |= {"network_alpha": 2, "save_precision": "fp16", "optimizer_type": "AdamW", "network_module": OURS}
        argv = [text for key, value in fixed.items() for text in (f"--{key}", str(value))]
        own = [f"{key}={value}" for key, value in network.items()]
        script.train(script.setup_parser().parse_args([*argv, *arguments, "--network_args", *own]))
        return read_lora(tmp_path / f"{name}.safetensors")

    space.train = train
    space.safety = make_lora(space, "safety", rank=2, role="safety")
    yield space
    for name in [n for n in sys.modules if n.split(".")[0] in ("library", "networks", "train_network", "train_leco")]:
        del sys.modules[name]


def make_lora(space, name: str, rank: int, role: str = "", size: float = 0.3, **metadata: str) -> Path:
    """A random LoRA on the attention of the stand-in's U-Net and text encoder."""
    generator, tensors = torch.Generator().manual_seed(7), {}
    parts = {"lora_unet": space.models.UNet2DConditionModel(), "lora_te": space.models.CLIPTextModel()}
    for prefix, model in parts.items():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "attn" in path:
                layer = f"{prefix}_{path.replace('.', '_')}"
                down, up = (rank, module.in_features), (module.out_features, rank)
                tensors[f"{layer}.lora_down.weight"] = torch.randn(down, generator=generator)
                tensors[f"{layer}.lora_up.weight"] = torch.randn(up, generator=generator) * size
                tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    path = space.folder / f"{name}.safetensors"
    save_file(tensors, path, {"modular_lora.role": role, **metadata} if role else metadata or None)
    return path


def prompts(space) -> tuple[str, ...]:
    path = space.folder / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a cat", "seed": 1}]), encoding="utf-8")
    return "--sample_every_n_steps", "1", "--sample_prompts", str(path)


def images(space, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((space.folder / "sample").glob(f"{name}_*.png"))]


def equal(a, b) -> bool:
    a, b = load_file(a.path), load_file(b.path)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_lora_is_bit_identical_with_and_without_safety_and_previews(stub):
    alone = stub.train("alone")
    shown = stub.train("shown", *prompts(stub))
    safe = stub.train("safe", *prompts(stub), safety=stub.safety)
    assert equal(alone, shown)
    assert equal(alone, safe)
    assert len(images(stub, "safe")) == 3
    assert all(a != b for a, b in zip(images(stub, "shown"), images(stub, "safe"), strict=True))
    assert not equal(alone, stub.train("other", "--seed", "43"))


def network_of(stub, **kwargs):
    encoder, unet = stub.models.load(str(stub.base))
    network = kohya_network.create_network(1.0, 3, 2.0, None, encoder, unet, neuron_dropout=None, **kwargs)
    return network, encoder, unet


def test_safety_tensors_are_in_no_parameter_state_or_gradient(stub):
    plain, _, _ = network_of(stub)
    network, encoder, unet = network_of(stub, safety=str(stub.safety))
    network.apply_to(encoder, unet)
    plain.apply_to(encoder, unet)
    assert network.state_dict().keys() == plain.state_dict().keys()
    terms = [term for _, layer in network.held.branches for term in layer.terms]
    assert len(terms) == 20
    assert not any(tensor.requires_grad for term in terms for tensor in (term.part.down, term.part.up))
    groups, _ = network.prepare_optimizer_params(None, None, 1.0)
    inside = {p.data_ptr() for group in groups for p in group["params"]}
    assert not inside & {tensor.data_ptr() for term in terms for tensor in (term.part.down, term.part.up)}


def test_previews_attach_the_safety_lora_and_take_it_off_even_after_an_error(stub):
    network, encoder, unet = network_of(stub, safety=str(stub.safety), safety_strength="0.5")
    network.apply_to(encoder, unet)
    lora, x, context = read_lora(stub.safety), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 10)
    layer = unet.attentions[0].transformer_blocks[0].attn2.to_k
    before = {path: dict(module.__dict__) for path, module in unet.named_modules()}
    plain, y = layer(context), unet(x, context)
    safety = lora.layers["lora_unet_attentions_0_transformer_blocks_0_attn2_to_k"]
    with preview.attached(network.held.branches):
        shown, z = layer(context), unet(x, context)
    assert torch.allclose(shown, plain + 0.5 * context @ safety.down.T @ safety.up.T, atol=1e-5)
    assert not torch.allclose(z, y)
    with pytest.raises(RuntimeError, match="conv2d"), preview.attached(network.held.branches):
        unet(x[0, 0], context)
    assert torch.equal(unet(x, context), y)
    assert {path: dict(module.__dict__) for path, module in unet.named_modules()} == before


def states_another_scale(stub) -> Path:
    """The safety LoRA without an alpha: its tensors give scale 1, its metadata 4."""
    path = stub.folder / "stated.safetensors"
    tensors = {key: tensor for key, tensor in load_file(stub.safety).items() if not key.endswith("alpha")}
    save_file(tensors, path, {"modular_lora.role": "safety", "ss_network_alpha": "8", "ss_network_dim": "2"})
    return path


@pytest.mark.parametrize(
    ("scale", "factor"), [("tensors", 2), ("metadata", 8), ("metadata,tensors", 5), ("tensors,metadata", 5)]
)
def test_safety_loras_are_shown_at_the_scale_that_was_chosen_for_each(stub, scale, factor):
    stated = states_another_scale(stub)
    network, encoder, unet = network_of(stub, safety=os.pathsep.join([str(stated)] * 2), safety_scale=scale)
    network.apply_to(encoder, unet)
    assert [lora.scale for lora in network.held.safety] == (scale.split(",") * 2)[:2]
    layer, context = unet.attentions[0].transformer_blocks[0].attn2.to_k, torch.randn(1, 5, 10)
    safety = read_lora(stub.safety).layers["lora_unet_attentions_0_transformer_blocks_0_attn2_to_k"]
    plain = layer(context)
    with preview.attached(network.held.branches):
        assert torch.allclose(layer(context), plain + factor * context @ safety.down.T @ safety.up.T, atol=1e-4)


def test_previews_under_autocast_and_in_half_precision(stub):
    network, encoder, unet = network_of(stub, safety=str(stub.safety))
    network.apply_to(encoder, unet)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 10)
    with torch.no_grad(), preview.attached(network.held.branches):
        full = unet(x, context)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = unet(x, context)
        network.to(torch.bfloat16)
        half = unet.to(torch.bfloat16)(x.bfloat16(), context.bfloat16())
    assert all((y.float() - full).norm() < 0.1 * full.norm() for y in (mixed, half))


def test_random_generators_are_as_before():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preview.random_state_kept():
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 1e-3), ("float", 1e-6)])
def test_projected_layers_answer_as_safety_alone_in_its_row_space(stub, precision, limit):
    safety = read_lora(stub.safety)
    task = stub.train("projected", "--save_precision", precision, safety=stub.safety, project="weight")
    assert len(task.layers.keys() & safety.layers.keys()) == 20
    largest = 0.0
    for name in task.layers.keys() & safety.layers.keys():
        layer, Q = task.layers[name], row_basis(safety.layers[name].down)
        x = Q @ torch.randn(Q.shape[1])
        answer = layer.up.float() @ (layer.down.float() @ x)
        assert answer.norm() <= limit * layer.up.float().norm() * layer.down.float().norm() * x.norm()
        largest = max(largest, residual(layer.down, Q))
    assert largest <= limit
    said = float(task.metadata["modular_lora.projected"].removeprefix("residual "))
    assert said == pytest.approx(largest, rel=0.2)
    free = stub.train("free", safety=stub.safety)
    assert all(residual(free.layers[name].down, row_basis(layer.down)) > 0.02 for name, layer in safety.layers.items())
    assert "modular_lora.projected" not in free.metadata


def test_every_step_starts_from_projected_matrices(stub):
    network, encoder, unet = network_of(stub, safety=str(stub.safety), project="weight", init_seed="1")
    network.apply_to(encoder, unet)
    for _ in range(2):
        network.on_step_start(encoder, unet)
        loras = {lora.lora_name: lora.lora_down.weight for lora in network.unet_loras}
        assert max(residual(loras[name], Q) for name, Q in network.held.bases.items() if name in loras) < 1e-6
        with torch.no_grad():  # as an optimizer that knows nothing of it
            for down in loras.values():
                down += torch.randn(down.shape)
        assert min(residual(loras[name], Q) for name, Q in network.held.bases.items() if name in loras) > 1e-3


def test_a_safety_lora_that_fills_a_layer_stops_the_projection(stub):
    full = make_lora(stub, "full", rank=12, role="safety")
    with refuses("project.nothing-left"):
        stub.train("projected", safety=full, project="weight")


def test_task_and_safety_loras_of_one_seed_start_apart(stub):
    downs = {}
    for role, seed in (("task", 42), ("safety", 42), ("task", 43)):
        network, encoder, unet = network_of(stub, role=role, init_seed=str(seed))
        network.apply_to(encoder, unet)
        down = torch.cat([p.detach().flatten() for name, p in network.named_parameters() if "lora_down" in name])
        assert network.held.initialisation == f"{role}:{seed}"
        downs[role, seed] = down / down.norm()
    similar = [abs(float(downs[a] @ downs[b])) for a in downs for b in downs if a < b]
    assert max(similar) < 0.2
    bounds = network.unet_loras[0].lora_down.weight
    assert bounds.abs().max() <= bounds[0].numel() ** -0.5


def test_metadata(stub):
    known = {"base_sha256": "ab", "dataset_sha256": "cd", "engine": "sd-scripts 1", "base_version": "sd_v1"}
    lora = stub.train("named", safety=stub.safety, **known)
    found = lora.metadata
    ours = {key.removeprefix("modular_lora."): value for key, value in found.items() if key.startswith("modular_lora.")}
    assert ours == {
        "role": "task",
        "base_sha256": "ab",
        "safety_sha256": read_lora(stub.safety).sha256,
        "dataset_sha256": "cd",
        "engine": "sd-scripts 1",
        "initialisation": "task:42",
        "layers": str(len(lora.layers)),
    }
    assert json.loads(found["ss_network_args"]) == {"dropout": None}
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_base_model_version"] == "sd_v1"
    assert "ss_tag_frequency" in found
    private = stub.train("named", dataset_metadata="no").metadata
    assert "secret" not in json.dumps(private)
    assert private["modelspec.title"] == "LoRA"
    assert private["ss_steps"] == "3"


def test_a_save_that_fails_leaves_the_file_before_it(stub, monkeypatch):
    before = stub.train("saved").sha256
    lora = importlib.import_module("networks.lora")

    def half(self, file, dtype, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(lora.LoRANetwork, "save_weights", half)
    with pytest.raises(OSError, match="disk full"):
        stub.train("saved", "--seed", "1")
    assert read_lora(stub.folder / "saved.safetensors").sha256 == before
    assert not list(stub.folder.glob(".*"))


@pytest.mark.parametrize(
    ("target", "layers"), [("cross-attention", 8), ("attention", 16), ("linear", 20), ("conv", 22)]
)
def test_targets(stub, target, layers):
    network = {"conv_dim": "3"} if target == "conv" else {}
    lora = stub.train("narrow", "--network_train_unet_only", target=target, **network)
    assert len(lora.layers) == layers


REFUSALS = {
    "base_weights": (("--base_weights", "{safety}"), {}, "kohya.merges", ("--base_weights",)),
    "pickle": (("--save_model_as", "ckpt"), {}, "kohya.save-format", ("ckpt",)),
    "safety_as_start": (("--network_weights", "{safety}"), {}, "start.safety-lora", ()),
    "same_content": (("--network_weights", "{copied}"), {"safety": "{copied}"}, "start.safety-lora", ()),
    "other_layers": (("--network_weights", "{nameless}"), {}, "train.other-layers", ()),
    "no_base": (("--network_weights", "{nameless}"), {"base_sha256": "ab"}, "start.no-base", ()),
    "other_base": (("--network_weights", "{elsewhere}"), {"base_sha256": "ab"}, "start.other-base", ()),
    "dirty_start": (("--network_weights", "{dirty}"), {}, "start.contaminated", ()),
    "no_record": (("--resume", "{folder}"), {}, "resume.no-state", ("modular_lora.json",)),
    "role": ((), {"role": "both"}, "kohya.argument", ("role=both",)),
    "project_alone": ((), {"project": "weight"}, "kohya.argument", ("project=weight", "safety=FILE")),
    "project_grad": ((), {"project": "grad"}, "kohya.argument", ("project=grad", "none, weight")),
    "safety_on_safety": ((), {"role": "safety", "safety": "{safety}"}, "kohya.argument", ("role=safety",)),
    "strength": ((), {"safety": "{safety}", "safety_strength": "much"}, "kohya.argument", ("safety_strength", "much")),
    "strengths": (
        (),
        {"safety": "{safety}", "safety_strength": "1,1"},
        "kohya.argument",
        ("safety_strength", "2 for 1"),
    ),
    "scale": (
        (),
        {"safety": "{safety}", "safety_scale": "half"},
        "kohya.argument",
        ("safety_scale=half", "refuse, tensors, metadata"),
    ),
    "scales": (
        (),
        {"safety": "{safety}", "safety_scale": "tensors,tensors"},
        "kohya.argument",
        ("safety_scale=tensors,tensors",),
    ),
    "scale_not_chosen": (
        (),
        {"safety": "{stated}"},
        "lora.two-scales",
        ("stated.safetensors", "scale 1", " 4 ", "safety_scale"),
    ),
    "foreign": ((), {"safety": "{foreign}"}, "kohya.not-in-model", ()),
    "one_layer_more": ((), {"safety": "{longer}"}, "kohya.not-in-model", ("1 of 21",)),
    "wide": ((), {"safety": "{wide}"}, "kohya.not-in-model", ()),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(stub, case):
    arguments, network, code, named = REFUSALS[case]
    files = {"safety": stub.safety, "folder": stub.folder, **(variants(stub))}
    fill = lambda text: text.format(**files)  # noqa: E731
    with refuses(code, *named) as error:
        stub.train("refused", *map(fill, arguments), **{key: fill(value) for key, value in network.items()})
    assert "\n" not in str(error.value)
    assert not (stub.folder / "refused.safetensors").exists()


def variants(stub) -> dict[str, Path]:
    """LoRA files that do not fit in one way each."""
    made = {"copied": make_lora(stub, "copied", 2), "nameless": make_lora(stub, "nameless", 3, size=0.01)}
    made["elsewhere"] = make_lora(stub, "elsewhere", 3, "task", **{"modular_lora.base_sha256": "xy"})
    made["dirty"] = make_lora(stub, "dirty", 3, "task", **{"modular_lora.contaminated_base": "merged"})
    made["stated"] = states_another_scale(stub)
    tensors = load_file(stub.safety)
    name = next(key for key in sorted(tensors) if "unet" in key and key.endswith("lora_down.weight"))
    edits = {
        "foreign": {key.replace("attentions", "input_blocks"): v for key, v in tensors.items() if "unet" in key},
        "longer": tensors | {key.replace("attentions_0", "attentions_7"): tensors[key] for key in layer(name, tensors)},
        "wide": tensors | {name: torch.randn(2, 40)},
    }
    for key, value in edits.items():
        made[key] = stub.folder / f"{key}.safetensors"
        save_file({k: v.clone() for k, v in value.items()}, made[key])
    return made


def layer(name: str, tensors: dict) -> list[str]:
    stem = name.removesuffix("lora_down.weight")
    return [key for key in tensors if key.startswith(stem)]


def test_a_base_with_the_safety_lora_merged_in_is_refused_or_named(stub):
    tensors, lora = load_file(stub.base), read_lora(stub.safety)
    models = dict(zip(("te", "unet"), stub.models.load(str(stub.base)), strict=True))
    paths = {
        f"{prefix}_{path.replace('.', '_')}": f"{part}.{path}.weight"
        for part, prefix in (("te", "lora_te"), ("unet", "lora_unet"))
        for path, _ in models[part].named_modules()
    }
    for name, found in lora.layers.items():
        tensors[paths[name]] = tensors[paths[name]] + found.scale * found.up @ found.down
    save_file(tensors, stub.base)
    with refuses("base.contaminated", "safety.safetensors"):
        stub.train("merged", safety=stub.safety)
    allowed = stub.train("merged", safety=stub.safety, allow_contaminated_base="yes")
    assert "contains the safety LoRA" in allowed.metadata["modular_lora.contaminated_base"]


def test_going_on_from_a_task_lora_and_from_a_state(stub):
    saving = ("--save_every_n_steps", "2", "--save_state")
    first = stub.train("first", *saving, base_file_sha256="ab")
    stub.train("second", "--network_weights", str(first.path), base_file_sha256="ab")
    with refuses("train.other-rank", "rank 3", "2.0", "rank 4"):
        stub.train("second", "--network_weights", str(first.path), "--network_dim", "4", base_file_sha256="ab")
    state = stub.folder / "first-step00000002-state"
    resumed = stub.train("resumed", "--resume", str(state), base_file_sha256="ab")
    assert equal(resumed, first)  # the third step alone was left
    with refuses("resume.changed", "base_file_sha256", "'ab'", "'cd'"):
        stub.train("resumed", "--resume", str(state), base_file_sha256="cd")
    with refuses("resume.changed", "optimizer_type", "'AdamW'", "'Prodigy'"):
        stub.train("resumed", "--resume", str(state), "--optimizer_type", "Prodigy", base_file_sha256="ab")


def test_two_text_encoders_are_named_as_for_sdxl(stub):
    class SdxlUNet2DConditionModel(stub.models.UNet2DConditionModel):
        pass

    encoders, unet = [stub.models.CLIPTextModel(), stub.models.CLIPTextModel()], SdxlUNet2DConditionModel()
    tensors = load_file(stub.safety)
    both = {k: v for k, v in tensors.items() if "unet" in k}
    for te in ("lora_te1", "lora_te2"):
        both |= {k.replace("lora_te", te): v.clone() for k, v in tensors.items() if k.startswith("lora_te_")}
    save_file(both, stub.folder / "both.safetensors")
    create = lambda file: kohya_network.create_network(1.0, 3, 2.0, None, encoders, unet, safety=str(file))  # noqa: E731
    network = create(stub.folder / "both.safetensors")
    held = {id(module) for module, _ in network.held.branches}
    assert len(held) == 24
    assert all(id(m) in held for te in encoders for m in te.modules() if isinstance(m, torch.nn.Linear))
    names = {lora.lora_name for lora in network.text_encoder_loras}
    assert {name.partition("_text")[0] for name in names} == {"lora_te1", "lora_te2"}
    with refuses("kohya.not-in-model", "4 of 20", "lora_te_text_model"):
        create(stub.safety)


@pytest.mark.slow  # another interpreter imports PyTorch
def test_sd_scripts_environment_needs_neither_pydantic_nor_a_toml_reader():
    code = f"""
import importlib.util, sys
sys.modules |= dict.fromkeys(("pydantic", "pydantic_core", "tomllib", "tomli", "comfy"))  # to import one is an error
spec = importlib.util.spec_from_file_location("kohya_entry", {entry.__file__!r})
entry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)
entry.import_network()
importlib.import_module(entry.PACK + ".training.kohya.preview")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_denoiser_and_cached_text_encoders(stub, caplog):
    with refuses("kohya.family", "UNet2DConditionModel"):
        kohya_network.find_architecture(torch.nn.Linear(1, 1))
    unet = stub.models.UNet2DConditionModel()
    modules = preview.find_modules(unet, {"lora_te": None})
    branches = modules.branches(read_lora(stub.safety), 1.0)
    assert len(branches) == 16
    assert "4 text-encoder layers are not in previews" in caplog.text


def test_layers_can_have_other_names_in_files_than_in_the_checkout(stub, monkeypatch):
    known = kohya_network.ARCHITECTURES["UNet2DConditionModel"]
    other = dataclasses.replace(known, renamed=(("_attn2_to_k", "_attn2_key"),))
    monkeypatch.setitem(kohya_network.ARCHITECTURES, "UNet2DConditionModel", other)
    tensors = {name.replace("_attn2_to_k", "_attn2_key"): value for name, value in load_file(stub.safety).items()}
    save_file(tensors, stub.safety, {"modular_lora.role": "safety"})
    first = stub.train("first", safety=stub.safety, project="weight")  # every layer of it was found
    assert sum("_attn2_key" in name for name in first.layers) == 2
    assert not any("_attn2_to_k" in name for name in first.layers)
    assert float(first.metadata["modular_lora.projected"].split()[1]) < 1e-3
    again = stub.train("again", "--network_weights", str(first.path), "--max_train_steps", "1")
    assert again.layers.keys() == first.layers.keys()


def test_a_frozen_model_is_prepared_as_one_to_evaluate(monkeypatch):
    seen = []

    def prepare(self, model, device_placement=None, evaluation_mode=False):
        seen.append((device_placement, evaluation_mode))

    monkeypatch.setattr(accelerate.Accelerator, "prepare_model", prepare)
    entry.spare_frozen_models()
    trained, frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
    for model in (trained, frozen):
        accelerate.Accelerator.prepare_model(None, model, device_placement=True)
    assert seen == [(True, False), (True, True)]


def test_a_script_that_draws_previews_itself_shows_the_safety_lora(stub, monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.import_module("train_network"), "NetworkTrainer", type("Trainer", (), {}), raising=False
    )
    network, encoder, unet = network_of(stub, safety=str(stub.safety))
    network.apply_to(encoder, unet)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 10)
    entry.guard_previews("hunyuan_image_train_network.py")
    script = tmp_path / "previews.py"
    script.write_text("""
import torch, train_network
def sample_image_inference():
    torch.rand(1)
    return unet(x, context)
class Own(train_network.NetworkTrainer):
    def sample_images(self):
        return sample_image_inference()
shown = Own().sample_images()
""")
    before = torch.get_rng_state()
    names = runpy.run_path(str(script), {"unet": unet, "x": x, "context": context})
    assert torch.equal(torch.get_rng_state(), before)
    with kohya_network.previewing():
        assert torch.equal(names["shown"], unet(x, context))
    assert not torch.equal(names["shown"], unet(x, context))
