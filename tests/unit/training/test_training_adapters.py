"""Options of adapters: ranks and rates by patterns, files to go on from, a safety LoRA of another form, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.training import loop
from modular_lora_guard.training.adapters import Spec, adapted
from modular_lora_guard.training.forms import ADAPTER, Loha, Size, form_of
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.safety.calibrating import _heard
from modular_lora_guard.training.safety.train import train_safety
from modular_lora_guard.training.task.train import train_task
from modular_lora_guard.training.unused import unused
from PIL import Image
from safetensors.torch import save_file
from support.errors import refuses
from support.toys import Silent, ToyHostModel

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

CONCEPT = {"concept": ("a car", "a van", "a bus", "a jeep"), "preserve": ("a cat", "a dog", "a cow", "a hen")}
FORMS = ({"algo": "loha"}, {"algo": "lokr"}, {"algo": "diag-oft"}, {"dora_wd": True})


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    folder = tmp_path / "data" / "1_thing"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 90, 200 - 90 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing, number {i}", encoding="utf-8")
    return TaskOptions(
        output_dir=str(tmp_path / "out"),
        train_data_dir=str(folder.parent),
        resolution=64,
        network_dim=3,
        network_alpha=3.0,
        learning_rate=1e-2,
        max_train_steps=2,
        save_precision="float",
    )


def train(options: TaskOptions, safety=()):
    return train_task(ToyHostModel(), options, Silent(), safety, engine="test")


def test_patterns_give_ranks_and_rates(options, monkeypatch):
    groups, make = [], loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda found, o: groups.extend(map(dict, found)) or make(found, o))
    made = train(
        replace(
            options,
            target="conv",
            conv_dim=2,
            conv_alpha=1.0,
            network_reg_dims=(r".*\.attn1\..*=5", "lora_unet_.*_to_q=7"),
            network_reg_lrs=(r".*attn2.*=0.5",),
        )
    )
    sizes = {name: (layer.rank, layer.alpha) for name, layer in made.lora.layers.items()}
    for name, size in sizes.items():
        if "attn1" in name:  # the first pattern that matches counts; alpha stays
            assert size == (5, 3.0)
        elif name.endswith("attn2_to_q"):
            assert size == (7, 3.0)
        else:
            assert size == ((2, 1.0) if "in_layers" in name else (3, 3.0))
    numbers = {group["lr"]: sum(weight.numel() for weight in group["params"]) for group in groups}
    own = [layer for name, layer in made.lora.layers.items() if "attn2" in name]
    assert numbers[0.5] == sum(layer.down.numel() + layer.up.numel() for layer in own)
    assert set(numbers) == {0.5, 1e-2}
    assert "network_reg_dims: rank 5 of 4 layers, rank 7 of 1 layers" in made.report
    assert made.lora.metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_a_training_goes_on_from_a_file_of_its_form_alone(changes, options):
    first = train(replace(options, output_name="first", **changes))
    assert first.lora.metadata["ss_network_module"] == "lycoris.kohya"
    again = replace(options, network_weights=str(first.lora.path), learning_rate=1e-12, max_train_steps=1)
    second = train(replace(again, **changes))
    assert second.lora.tensors.keys() == first.lora.tensors.keys()
    for name, tensor in first.lora.tensors.items():
        assert torch.allclose(tensor, second.lora.tensors[name], rtol=1e-4, atol=1e-6)
    other = {"algo": "lora"} if "algo" in changes else {"algo": "loha"}
    with refuses("train.other-rank", "algo", Path(first.lora.path).name):
        train(replace(again, **other))


def test_a_start_of_any_form_is_looked_through_for_the_safety_lora(options, tmp_path):
    """A DoRA whose lengths are W0's own holds what its factors hold."""
    host_model = ToyHostModel()
    erased = SafetyOptions(output_dir=str(tmp_path), output_name="safety", max_train_steps=3, save_precision="float",
                           objective="leco", algo="loha", train_size=64, denoising_steps=4, learning_rate=0.1,
                           relative_error=False, **CONCEPT)  # fmt: skip
    made = train_safety(host_model, erased, Silent(), engine="test")
    assert {layer.kind for layer in made.lora.layers.values()} == {"LoHa"}
    assert "safety LoHa" in made.report
    safety = [SafetyLora(made.lora, 1.0)]
    assert train(replace(options, algo="lokr"), safety).lora.layers
    tensors = {}
    for path, name in host_model.unet_names.items():
        if name in made.lora.layers:
            weight = host_model.unet.get_submodule(path).weight
            change = made.lora.layers[name].additive(tuple(weight.shape)).matrix()
            tensors[f"{name}.lora_down.weight"] = torch.eye(change.shape[1]).reshape(-1, *weight.shape[1:])
            tensors[f"{name}.lora_up.weight"] = change.reshape(*change.shape, *[1] * (weight.dim() - 2))
            lengths = weight.flatten(1).norm(dim=1)
            tensors[f"{name}.dora_scale"] = lengths.reshape(-1, *[1] * (weight.dim() - 1))
    save_file(tensors, tmp_path / "start.safetensors")
    with refuses("start.contaminated", "start.safetensors", "safety.safetensors"):
        train(replace(options, network_weights=str(tmp_path / "start.safetensors"), dora_wd=True), safety)


def test_the_activity_of_a_loha_is_that_of_its_change():
    host_model, seen = ToyHostModel(), {}
    names = {path: name for path, name in host_model.unet_names.items() if "attn" in path}
    spec = Spec(names, {}, 2, 1.0, 0.0, 1, "safety", Loha())
    with torch.no_grad(), adapted(host_model.unet, host_model.text_encoder, spec) as adapters:
        for weight in adapters.parameters():
            weight.add_(0.1)
        for name, layer in adapters.layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        with _heard(adapters) as energies:
            host_model.predict(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), host_model.encode(["a", "b"]))
        assert set(energies) == set(names.values())
        for name, (z, y0) in energies.items():
            layer, x = adapters.layers[name], seen[name]
            said = [x @ layer.get_delta_weight(ADAPTER).T, layer.base_layer(x)]
            assert torch.allclose(z, said[0].flatten(1).square().sum(1), rtol=1e-3)
            assert torch.allclose(y0, said[1].flatten(1).square().sum(1), rtol=1e-4)


def test_a_base_that_carries_a_safety_loha_is_refused(options, tmp_path):
    host_model = ToyHostModel()
    generator, tensors = torch.Generator().manual_seed(1), {}
    for path, name in host_model.unet_names.items():
        weight = host_model.unet.get_submodule(path).weight
        out, inside = weight.shape[0], weight[0].numel()
        for end, shape in (("w1_a", (out, 2)), ("w1_b", (2, inside)), ("w2_a", (out, 2)), ("w2_b", (2, inside))):
            tensors[f"{name}.hada_{end}"] = torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "safety.safetensors")
    lora = read_lora(tmp_path / "safety.safetensors")
    for path, name in host_model.unet_names.items():
        weight = host_model.unet.get_submodule(path).weight
        weight.add_(lora.layers[name].additive(tuple(weight.shape)).matrix().reshape(weight.shape))
    with refuses("base.contaminated", "safety.safetensors"):
        train_task(host_model, options, Silent(), [SafetyLora(lora, 1.0)], engine="test")


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"algo": "loha", "dora_wd": True}, "option.adapter", ("dora_wd", "loha")),
        ({"algo": "lokr", "use_tucker": True}, "option.adapter", ("use_tucker", "ComfyUI")),
        ({"use_tucker": True}, "option.adapter", ("use_tucker", "lora")),
        ({"algo": "loha", "network_dropout": 0.1}, "option.adapter", ("network_dropout", "loha")),
        ({"algo": "diag-oft", "project": True}, "option.adapter", ("project", "diag-oft")),
        ({"dora_wd": True, "project": True}, "option.adapter", ("project", "dora_wd")),
        ({"network_reg_dims": ("attn2",)}, "option.pattern", ("network_reg_dims", "'attn2'")),
        ({"network_reg_dims": ("attn2=0.5",)}, "option.pattern", ("network_reg_dims",)),
        ({"network_reg_lrs": ("attn2(=1",)}, "option.pattern", ("network_reg_lrs",)),
        ({"network_reg_lrs": ("a=-1",)}, "option.pattern", ("network_reg_lrs",)),
        (
            {"network_reg_lrs": ("a=1",), "optimizer_type": "Prodigy", "learning_rate": 1.0},
            "option.prodigy",
            ("network_reg_lrs",),
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes, code, named):
    with refuses(code, *named):
        TaskOptions(**changes)


@pytest.mark.parametrize(
    "changes", [{"dora_wd": True}, {"algo": "diag-oft"}, {"algo": "loha", "init": "x.safetensors"}], ids=str
)
def test_what_no_safety_lora_can_be_is_refused(changes):
    with refuses("option.adapter"):
        SafetyOptions(**CONCEPT, **changes)


def test_a_pattern_that_matches_no_layer_and_blocks_that_fit_no_layer_are_refused(options):
    with refuses("option.pattern", "'attn2'", "10 layers", "lora_unet_"):
        train(replace(options, network_reg_dims=("attn2=4",)))
    with refuses("train.no-blocks", "8 outputs"):
        train(replace(options, algo="diag-oft", network_dim=1))


def test_adapters_options_without_effect_are_said():
    said = "\n".join(unused(TaskOptions(conv_dim=4, factor=8, decompose_both=True, algo="diag-oft", network_alpha=1.0)))
    for name in ("conv_dim 4", "factor 8", "decompose_both True", "network_alpha 1.0"):
        assert f"{name} has NO effect" in said


@pytest.mark.parametrize("changes", [{}, *FORMS])
def test_a_layer_is_taken_and_not_those_whose_path_ends_so(changes):
    """Anima has blocks.0.q and llm_adapter.blocks.0.q, which PEFT takes for the same."""
    block = lambda: torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})  # noqa: E731
    model = torch.nn.ModuleDict({"blocks": block(), "adapter": torch.nn.ModuleDict({"blocks": block()})})
    form = form_of(TaskOptions(**changes))
    assert list(form.place(model, {"blocks.q": Size(2, 2.0)}, 0.0)) == ["blocks.q"]
