"""Every preset trains a toy of each group, and two of them every family, with their values but for size and steps."""

from __future__ import annotations

import importlib
import math
import typing
from pathlib import Path

import pytest
from modular_lora_guard.training import presets
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from support.errors import refuses
from support.families import Family
from support.family_training import EVERY, TRAINED, WRITING
from support.toys import Silent
from support.training_toys import side_of, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

TOYS = {"sd": "SD1.x", "sdxl": "SDXL", "flow": "Qwen-Image"}
TASKS = [name for name in typing.get_args(typing.get_type_hints(TaskOptions)["preset"]) if name]
SMALL = {"max_train_steps": 2, "lr_warmup_steps": 1}
NOISELESS = {"WAN21_FlowRVS"}  # adds none to an image, and an erasure begins at noise
FIGURES = "training_presets.json"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of", TOYS)
@pytest.mark.parametrize("name", [*TASKS, "safety"])
def test_a_preset_trains_a_toy_of_its_group(name, of, comfy, data, tmp_path, matrix):
    train(next(family for family in EVERY if family.name == TOYS[of]), name, data, tmp_path, of)
    matrix(FIGURES, f"{name}, {of} ({TOYS[of]})", "works")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
def test_every_family_is_trained_by_presets(family, comfy, known, data, tmp_path, matrix):
    row = f"style and safety: {family.name}" if family.config not in NOISELESS else f"style: {family.name}"
    known(family, FIGURES, row)
    train(family, "style", data, tmp_path)
    if family.config in NOISELESS:
        with refuses("train.no-noise", family.config):
            train(family, "safety", data, tmp_path)
    else:
        train(family, "safety", data, tmp_path)
    matrix(FIGURES, row, "works")


def train(family: Family, name: str, data: Path, folder: Path, of: str = "") -> None:
    """Two steps on a toy by a preset, which has to be of the group ``of``, where one is named."""
    trainer = importlib.import_module("modular_lora_guard.comfy_host.trainer_model")
    model, clip, vae = toy_parts(family)
    group, side = trainer.preset_group(model), side_of(family)
    assert of in ("", group)
    cls = TaskOptions if name in TASKS else SafetyOptions
    given = SMALL | {"preset": name, "output_dir": str(folder)}
    if cls is TaskOptions:  # a toy's texts come of no network that could be trained
        given |= {"train_data_dir": str(data), "resolution": side, "network_train_text_encoder": False}
    else:
        given |= {"concept": ("a car",), "preserve": ("a cat",), "train_size": side, "denoising_steps": 2}
    made = presets.load(cls, None, given, group)
    with trainer.opened(model, clip, vae, made) as opened:
        if isinstance(made, TaskOptions):
            training = importlib.import_module("modular_lora_guard.training.task.train").train_task
        else:
            training = importlib.import_module("modular_lora_guard.training.safety.train").train_safety
        trained = training(opened, made, Silent(), engine="test")
    assert all(math.isfinite(loss) for loss in trained.losses)
    assert any(layer.up.any() for layer in trained.lora.layers.values()), "nothing was learnt"
    assert f"preset {name} ({group}): " in trained.report
    left_out = "gradient_checkpointing True of preset" in trained.report
    assert left_out == (family.config in WRITING), "what its blocks do not allow is left out, and said"
