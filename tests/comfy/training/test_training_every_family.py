"""Every diffusion model that ComfyUI knows, trained at toy size with ComfyUI's own classes, or refused by name."""

from __future__ import annotations

import importlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modular_lora_guard.tools.bootstrap.paths import ROOT
from PIL import Image
from support.encoder_toys import save_text_lora
from support.errors import refuses
from support.families import Family, make
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.graphs import bits
from support.training_toys import SIDE, side_of, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

IMAGES = ROOT / "tools" / "world" / "assets" / "gloss" / "10_gloss"
REFUSED = {  # families of the guard's table that learn from no captioned image
    "SVD_img2vid", "SV3D_u", "SV3D_p", "Stable_Zero123", "SD_X4Upscaler", "LotusD", "Stable_Cascade_B", "StableAudio",
    "ACEStep", "Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1", "HunyuanVideo15_SR_Distilled",
    "HunyuanImage21Refiner", "PiD", "LTXAV", "MiniMaxH3", "TripoSplat", "StableAudio3", "ACEStep15",
}  # fmt: skip
WRITING = {"PixelDiTT2I"}  # whose blocks write into parts of what they are given: not run again
ALWAYS = ("SD1.x", "SD3", "Flux dev", "Wan 2.1 T2V")
EVERY = (*IMAGE, *DITS, *VIDEOS, *NEWER)
TRAINED = [family for family in EVERY if family.config not in REFUSED]
FIGURES = "training_families.json"
STEPS, LEVELS = 8, (0.3, 0.5, 0.7, 0.9)  # of the training; of the fixed batch, as shares of the table


def part(name: str):
    return importlib.import_module(f"modular_lora_guard.{name}")


@pytest.fixture
def data(tmp_path):
    """Two captioned images of one size."""
    folder = tmp_path / "data" / "1_x"
    folder.mkdir(parents=True)
    for stem in ("crown", "balloon"):
        for ending in (".png", ".txt"):
            shutil.copy(IMAGES / f"{stem}{ending}", folder)
    return tmp_path / "data"


@pytest.fixture
def known(matrix):
    """Skips a family that this ComfyUI does not know, which the table says."""

    def check(family: Family) -> None:
        from comfy import supported_models

        if not hasattr(supported_models, family.config):
            matrix(FIGURES, family.name, "untested")
            pytest.skip(f"this ComfyUI has no {family.config}")

    return check


def watch() -> SimpleNamespace:
    return SimpleNamespace(
        check=lambda: None, stage=lambda *_: None, say=lambda *_: None, step=lambda *_: None, sample=lambda *_: None
    )


def fixed_loss(host_model, data, side) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean |F − F_θ|² of the two images at fixed levels and noise, and F_θ."""
    schedule, z, prompts = host_model.schedule, [], []
    for path in sorted(data.glob("*/*.png")) * (len(LEVELS) // 2):
        pixels = Image.open(path).convert("RGB").resize((side, side))
        z.append(host_model.encode_images(torch.from_numpy(np.array(pixels, dtype=np.float32))[None] / 255))
        prompts.append(path.with_suffix(".txt").read_text(encoding="utf-8").strip())
    z = torch.cat(z)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    t = torch.tensor([int(level * len(schedule)) for level in LEVELS])
    with torch.no_grad():
        said = host_model.predict(schedule.add_noise(z, t, eps), t, host_model.encode(prompts))
    return (said - schedule.target(z, t, eps)).square().mean(), said


def merged(model, lora):
    """The stock change of every weight: comfy.lora's key map, loader and sum."""
    from comfy import lora as stock

    names = stock.model_lora_keys_unet(model.model, {})
    patches = stock.load_lora(dict(lora.tensors), names, log_missing=False)
    assert len(patches) == len(lora.layers), "stock ComfyUI loads it whole"
    for key, patch in patches.items():
        path, _, name = key.rpartition(".")
        layer = model.model.get_submodule(path)
        old = layer._parameters[name]
        weight = stock.calculate_weight([(1.0, patch, 1.0, None, None)], old.detach().clone(), key)
        yield layer, name, old, torch.nn.Parameter(weight, requires_grad=False)


def check_family(family: Family, comfy, data, folder, **options_of) -> None:
    """A training of some steps, and what is promised of its file."""
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    model, clip, vae = toy_parts(family)
    info, before = comfy.anatomy.model_info(model), bits(model.model)
    made = {
        "output_dir": str(folder), "train_data_dir": str(data), "network_dim": 4, "network_alpha": 4.0,
        "max_train_steps": STEPS, "train_batch_size": 2, "resolution": side_of(family), "save_precision": "float",
        "learning_rate": 5e-3, "lr_scheduler": "constant",
    } | options_of  # fmt: skip

    def train(name: str, safety=(), **changes):
        o = options.TaskOptions(output_name=name, **made | changes)
        with trainer.opened(model, clip, vae, o) as opened:
            return task.train_task(opened, o, watch(), safety, engine="test").lora

    lora = train("alone")
    chosen = sorted(lora.layers)[:3]
    specs = {name: info.specs[info.key_map[name]] for name in chosen}
    flat = {name: spec for name, spec in specs.items() if len(spec.weight_shape) == 2}
    save_text_lora(folder / "safety.safetensors", flat, rank=1, seed=5)
    guard = comfy.host_guard
    safety = guard.SafetyLora(comfy.host_files.read_lora(folder / "safety.safetensors"), 1.0)
    again = family.config not in WRITING
    if not again:
        with refuses("train.recompute"):
            train("again", gradient_checkpointing=True)
    beside = train("beside", (safety,), gradient_checkpointing=again)
    assert lora.tensors.keys() == beside.tensors.keys()
    assert all(torch.equal(tensor, beside.tensors[name]) for name, tensor in lora.tensors.items())
    assert all(torch.equal(before[name], value) for name, value in bits(model.model).items())
    (line,) = guard.build_part("model", info, (guard.SafetyLora(lora, 1.0),), (), guard.GuardLimits()).lines
    assert (line.unmatched, line.matched) == ((), len(lora.layers))
    assert len(lora.layers) > 3
    with trainer.opened(model, clip, vae, options.TaskOptions(output_name="x", **made)) as opened:
        (base, said), changed = fixed_loss(opened, data, side_of(family)), list(merged(model, lora))
        with opened.attached((guard.SafetyLora(lora, 1.0),)):
            trained, by_branches = fixed_loss(opened, data, side_of(family))
        for layer, name, _, weight in changed:
            layer._parameters[name] = weight
        try:
            _, by_weights = fixed_loss(opened, data, side_of(family))
        finally:
            for layer, name, old, _ in changed:
                layer._parameters[name] = old
    effect = (by_weights - said).abs().max()
    assert (by_branches - by_weights).abs().max() <= 1e-3 * effect
    assert trained < base


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
    known(family)
    check_family(family, comfy, data, tmp_path)
    matrix(FIGURES, family.name, "works")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [f for f in EVERY if f.config in REFUSED], ids=lambda family: family.name)
def test_what_is_not_trained_is_refused_by_name(family, comfy, known, matrix):
    known(family)
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
