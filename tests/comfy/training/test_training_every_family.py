"""Every diffusion model that ComfyUI knows, trained at toy size with ComfyUI's own classes, or refused by name."""

from __future__ import annotations

import pytest
import torch
from support.errors import refuses
from support.families import make
from support.family_training import EVERY, REFUSED, TRAINED, check_family, part, watch
from support.graphs import bits
from support.training_toys import SIDE, side_of, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

ALWAYS = ("SD1.x", "SD3", "Flux dev", "Wan 2.1 T2V")
FIGURES = "training_families.json"


@pytest.mark.parametrize("name", ALWAYS)
def test_a_training_lowers_the_loss_leaves_the_base_and_its_file_is_stock(name, comfy, data, tmp_path):
    family = next(family for family in EVERY if family.name == name)
    check_family(family, comfy, data, tmp_path)


def test_a_base_in_float8_is_trained_as_the_values_that_it_holds(comfy, data, tmp_path):
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    family = next(family for family in EVERY if family.name == "SD1.x")

    def train(name: str, *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
        model, clip, vae = toy_parts(family)
        with torch.inference_mode():
            for dtype in dtypes:
                model.model.diffusion_model.to(dtype)
        before = bits(model.model)
        o = options.TaskOptions(
            output_name=name, output_dir=str(tmp_path), train_data_dir=str(data), network_dim=2, max_train_steps=3,
            resolution=SIDE, save_precision="float", learning_rate=5e-3,
        )  # fmt: skip
        with trainer.opened(model, clip, vae, o) as opened:
            lora = task.train_task(opened, o, watch(), engine="test").lora
        assert all(torch.equal(before[key], value) for key, value in bits(model.model).items())
        return lora.tensors

    eighth = train("eighth", torch.float8_e4m3fn)
    whole = train("whole", torch.float8_e4m3fn, torch.float32)
    assert eighth.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in eighth.items())


def in_eight_bits(model) -> None:
    """Every weight of a linear layer or convolution as max |W| / 448 times the nearest float8."""
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            W = layer.weight.detach()
            scale = W.abs().max().item() / 448
            layer._parameters["weight"] = torch.nn.Parameter((W / scale).to(torch.float8_e4m3fn).float() * scale, False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("SD1.x", {}), ("Flux dev", {"gradient_checkpointing": True, "blocks_to_swap": 1})],
    ids=str,
)
def test_a_base_in_eight_bits_gives_the_lora_of_its_rounded_weights(name, changes, comfy, data, tmp_path):
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    family = next(family for family in EVERY if family.name == name)

    def train(name: str, rounded: bool, **changes):
        model, clip, vae = toy_parts(family)
        if rounded:
            in_eight_bits(model)
        before = bits(model.model)
        o = options.TaskOptions(
            output_name=name, output_dir=str(tmp_path), train_data_dir=str(data), network_dim=2, max_train_steps=3,
            resolution=side_of(family), save_precision="float", learning_rate=5e-3, **changes,
        )  # fmt: skip
        with trainer.opened(model, clip, vae, o) as opened:
            made = task.train_task(opened, o, watch(), engine="test")
        assert all(torch.equal(before[key], value) for key, value in bits(model.model).items())
        return made, part("comfy_host.introspection").model_sha256(model)

    stored, base = train("stored", False, fp8_base_unet=True, **changes)
    rounded, _ = train("rounded", True, **{key: value for key, value in changes.items() if key != "blocks_to_swap"})
    plain, _ = train("plain", False)
    assert stored.lora.tensors.keys() == rounded.lora.tensors.keys()
    assert all(torch.equal(tensor, rounded.lora.tensors[name]) for name, tensor in stored.lora.tensors.items())
    assert not all(torch.equal(tensor, plain.lora.tensors[name]) for name, tensor in stored.lora.tensors.items())
    assert stored.lora.metadata["ss_fp8_base_unet"] == "True"
    assert stored.lora.metadata["modular_lora.base_sha256"] == base, "of the weights as they were loaded"
    assert "ROUNDED" in stored.report
    assert ("1 blocks wait in main memory" in stored.report) == ("blocks_to_swap" in changes)


def test_what_is_merged_into_a_base_is_in_what_waits_in_main_memory(comfy, data, tmp_path):
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    family = next(family for family in EVERY if family.name == "SD1.x")
    layer = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

    def train(name: str, **changes):
        model, clip, vae = toy_parts(family)
        before, merged = bits(model.model), model.clone()
        assert merged.add_patches({layer: (torch.full_like(dict(model.model.named_parameters())[layer], 0.5),)})
        o = options.TaskOptions(
            output_name=name, output_dir=str(tmp_path), train_data_dir=str(data), network_dim=2, max_train_steps=1,
            resolution=SIDE, save_precision="float", allow_contaminated_base=True, **changes,
        )  # fmt: skip
        with trainer.opened(merged, clip, vae, o) as opened:
            made = task.train_task(opened, o, watch(), engine="test").lora
        merged.detach()
        assert all(torch.equal(before[key], value) for key, value in bits(model.model).items())
        return made.tensors

    plain, waiting = train("plain"), train("waiting", blocks_to_swap=3)
    assert plain.keys() == waiting.keys()
    assert all(torch.equal(tensor, waiting[name]) for name, tensor in plain.items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SD1.x", {"algo": "loha", "target": "conv", "conv_dim": 2, "learning_rate": 1e-3}),
        ("SD1.x", {"algo": "diag-oft", "target": "conv"}),
        ("Lumina 2", {"algo": "lokr", "factor": 4}),
        ("SD3", {"dora_wd": True, "fp8_base_unet": True}),
        ("Wan 2.1 T2V", {"dora_wd": True, "network_reg_dims": (".*ffn.*=2",), "network_reg_lrs": (".*attn.*=1e-3",)}),
    ],
    ids=str,
)
def test_the_promises_hold_for_every_form_of_adapter(name, changes, comfy, data, tmp_path):
    family = next(family for family in EVERY if family.name == name)
    check_family(family, comfy, data, tmp_path, **changes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
def test_every_family_is_trained(family, comfy, known, data, tmp_path, matrix):
    known(family, FIGURES, family.name)
    check_family(family, comfy, data, tmp_path)
    matrix(FIGURES, family.name, "works")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [f for f in EVERY if f.config in REFUSED], ids=lambda family: family.name)
def test_what_is_not_trained_is_refused_by_name(family, comfy, known, matrix):
    known(family, FIGURES, family.name)
    with refuses("train.family", family.config):
        part("comfy_host.untrainable").check(make(family, filled=False))
    matrix(FIGURES, family.name, "refused")


@pytest.mark.parametrize(("name", "objective"), [("Flux dev", "esd-x"), ("Wan 2.1 T2V", "sdd"), ("Lumina 2", "leco")])
def test_a_concept_is_erased_from_a_velocity(name, objective, comfy, tmp_path):
    trainer, safety, options = part("comfy_host.trainer_model"), part("training.safety.train"), part("training.options")
    model, clip, vae = toy_parts(next(family for family in EVERY if family.name == name))
    info, before = comfy.anatomy.model_info(model), bits(model.model)
    o = options.SafetyOptions(
        output_name="made", output_dir=str(tmp_path), concept=("a car",), preserve=("a cat",), objective=objective,
        network_dim=2, network_alpha=2.0, max_train_steps=12, train_size=SIDE, denoising_steps=4, learning_rate=1e-2,
        save_precision="float", lr_scheduler="constant",
    )  # fmt: skip
    with trainer.opened(model, clip, vae, o) as opened:
        made = safety.train_safety(opened, o, watch(), engine="test")
    assert all(torch.equal(before[key], value) for key, value in bits(model.model).items())
    (line,) = comfy.host_guard.build_part(
        "model", info, (comfy.host_guard.SafetyLora(made.lora, 1.0),), (), comfy.host_guard.GuardLimits()
    ).lines
    assert (line.unmatched, line.matched) == ((), len(made.lora.layers))
    if objective != "leco":
        assert all("txt_attn" in layer or "cross_attn" in layer for layer in made.lora.layers)
        assert "prediction_type" not in str(made.lora.metadata)
    assert sum(made.losses[-4:]) < sum(made.losses[:4])


def test_texts_of_different_lengths_are_asked_apart_and_answered_in_order(comfy):
    trainer, options, cond = part("comfy_host.trainer_model"), part("training.options"), part("training.model")
    family = next(family for family in EVERY if family.name == "Qwen-Image")
    generator = torch.Generator().manual_seed(4)
    texts = [cond.Text(torch.randn(1, n, family.context[1], generator=generator)) for n in (7, 12, 7, 5)]
    with trainer.opened(*toy_parts(family), options.TaskOptions()) as opened, torch.no_grad():
        x = torch.randn(4, *opened.latent_shape(SIDE, SIDE), generator=generator)
        t = torch.tensor([10, 2000, 7000, 9999])
        together = opened.predict(x, t, cond.Cond(tuple(texts)))
        for i, text in enumerate(texts):
            alone = opened.predict(x[i : i + 1], t[i : i + 1], cond.Cond((text,)))
            assert torch.allclose(together[i : i + 1], alone, atol=1e-4)
