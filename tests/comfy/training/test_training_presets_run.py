"""Every preset trains a toy of each group of families, with its own values but for size and steps."""

from __future__ import annotations

import importlib
import math
import shutil
import typing

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.training import presets
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from support.families_dit import DITS
from support.families_image import IMAGE
from support.toys import Silent
from support.training_toys import SIDE, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

IMAGES = ROOT / "tools" / "world" / "assets" / "gloss" / "10_gloss"
TOYS = {"sd": "SD1.x", "sdxl": "SDXL", "flow": "Qwen-Image"}
TASKS = [name for name in typing.get_args(typing.get_type_hints(TaskOptions)["preset"]) if name]
SMALL = {"max_train_steps": 2, "lr_warmup_steps": 1}
FIGURES = "training_presets.json"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of", TOYS)
@pytest.mark.parametrize("name", [*TASKS, "safety"])
def test_a_preset_trains_a_toy_of_its_group(name, of, comfy, tmp_path, matrix):
    model, clip, vae = toy_parts(next(family for family in (*IMAGE, *DITS) if family.name == TOYS[of]))
    trainer = importlib.import_module("modular_lora_guard.comfy_host.trainer_model")
    assert trainer.preset_group(model) == of
    cls = TaskOptions if name in TASKS else SafetyOptions
    given = SMALL | {"preset": name, "output_dir": str(tmp_path)}
    if cls is TaskOptions:  # a toy's texts come of no network that could be trained
        folder = tmp_path / "data" / "1_x"
        folder.mkdir(parents=True)
        for ending in (".png", ".txt"):
            shutil.copy(IMAGES / f"crown{ending}", folder)
        given |= {"train_data_dir": str(folder.parent), "resolution": SIDE, "network_train_text_encoder": False}
    else:
        given |= {"concept": ("a car",), "preserve": ("a cat",), "train_size": SIDE, "denoising_steps": 2}
    made = presets.load(cls, None, given, of)
    with trainer.opened(model, clip, vae, made) as opened:
        if isinstance(made, TaskOptions):
            train = importlib.import_module("modular_lora_guard.training.task.train").train_task
        else:
            train = importlib.import_module("modular_lora_guard.training.safety.train").train_safety
        trained = train(opened, made, Silent(), engine="test")
    assert all(math.isfinite(loss) for loss in trained.losses)
    assert any(layer.up.any() for layer in trained.lora.layers.values()), "nothing was learnt"
    assert f"preset {name} ({of}): " in trained.report
    matrix(FIGURES, f"{name}, {of} ({TOYS[of]})", "works")
