"""A training of a family's network, and what is promised of its file, whatever the width."""

from __future__ import annotations

import hashlib
import importlib
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageSequence

from support.encoder_toys import save_text_lora
from support.errors import refuses
from support.families import Family
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.training_toys import side_of, toy_parts

REFUSED = {  # families of the guard's table that learn from no captioned image
    "SVD_img2vid", "SV3D_u", "SV3D_p", "Stable_Zero123", "SD_X4Upscaler", "LotusD", "Stable_Cascade_B", "StableAudio",
    "ACEStep", "Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1", "HunyuanVideo15_SR_Distilled",
    "HunyuanImage21Refiner", "PiD", "LTXAV", "MiniMaxH3", "TripoSplat", "StableAudio3", "ACEStep15",
}  # fmt: skip
EVERY = (*IMAGE, *DITS, *VIDEOS, *NEWER)
TRAINED = [family for family in EVERY if family.config not in REFUSED]
WRITING = {"PixelDiTT2I"}  # whose blocks write into parts of what they are given: not run again
STEPS, LEVELS = 8, (0.3, 0.5, 0.7, 0.9)  # of the training; of the fixed batch, as shares of the table


def part(name: str):
    return importlib.import_module(f"modular_lora_guard.{name}")


def watch() -> SimpleNamespace:
    return SimpleNamespace(
        check=lambda: None,
        stage=lambda *_: None,
        say=lambda *_: None,
        step=lambda *_: None,
        sample=lambda *_: None,
        validated=lambda *_: None,
    )


def fixed_loss(host_model, data, side) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean |F − F_θ|² of the two images or clips at fixed levels and noise, and F_θ."""
    schedule, z, prompts = host_model.schedule, [], []
    for path in sorted([*data.glob("*/*.png"), *data.glob("*/*.webp")]) * (len(LEVELS) // 2):
        with Image.open(path) as image:
            frames = [one.convert("RGB").resize((side, side)) for one in ImageSequence.Iterator(image)]
        pixels = torch.from_numpy(np.array([np.asarray(one) for one in frames], dtype=np.float32)) / 255  # t h w 3
        z.append(host_model.encode_images(pixels[None] if len(pixels) > 1 else pixels))
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


def digests(module: torch.nn.Module) -> dict[str, bytes]:
    """A hash of each of a module's tensors: of a wide network, a copy takes too much memory."""
    found = ((name, t.detach().reshape(-1).view(torch.uint8)) for name, t in module.state_dict().items())
    return {name: hashlib.blake2b(memoryview(raw.numpy())).digest() for name, raw in found}


def check_family(
    family: Family, comfy, data, folder, dtype: torch.dtype = torch.float32, near: float = 1e-3, **options_of
) -> None:
    """A training of some steps, and what is promised of its file.

    Args:
        family: What is trained, with random weights of ``dtype``.
        near: How far the guard's branches may be from stock ComfyUI's merge, as a share of what the LoRA does.
        options_of: Options of the training, in place of those here.
    """
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    model, clip, vae = toy_parts(family, dtype)
    info, before = comfy.anatomy.model_info(model), digests(model.model)
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
    assert before == digests(model.model)
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
    assert (by_branches - by_weights).abs().max() <= near * effect
    assert trained < base
