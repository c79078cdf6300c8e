"""The narrow net of the evidence at equal quality is the function that the real ComfyUI evaluates, guard and all."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.audit.plan import Arm, Item, Part, Sampling
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA, lorafile, narrow
from modular_lora_guard.tools.world.equal import drawing, training, work
from modular_lora_guard.tools.world.equal.protocol import KEPT, STYLED, VEHICLES, Protocol
from support.giving_way import calibrated

STEPS = 4


@pytest.fixture(scope="module")
def net():
    return narrow.load()


@pytest.fixture(scope="module")
def images():
    """A vehicle, a kept concept, and one with the task's word."""
    every = Protocol.read().images()
    return tuple(next(image for image in every if image.kind == kind) for kind in (VEHICLES, KEPT, STYLED))


@pytest.fixture(scope="module")
def files(net, images, tmp_path_factory):
    """The shipped LoRAs; the safety LoRA calibrated so that the kept concept's g is 8/16 and half of the next one.

    An activity that ComfyUI measures 3 % higher or lower would give another sixteenth.
    """
    model, _ = net
    safety, noise = read_lora(ASSETS / SAFETY_LORA), torch.Generator().manual_seed(work.NOISE)
    lorafile.attach(model.unet, lorafile.load(safety.path, model.unet))
    noise = torch.randn(1, 4, 8, 8, generator=noise).expand(len(images), -1, -1, -1)
    found = training.activities(model, *model.text([image.prompt for image in images]), noise).tolist()
    lorafile.attach(model.unet)
    vehicle, kept, styled = found
    assert vehicle > 1.5 * max(kept, styled)
    low, high = 0.5 * kept, 0.5 * kept + 0.5 * kept / (1 - 8.5 / 16)
    target = tmp_path_factory.mktemp("files") / "calibrated.safetensors"
    told = calibrated(safety, target, low, high, safety.metadata["modular_lora.base_sha256"])
    shares = [int(16 * min(1, max(0, (high - value) / (high - low)))) / 16 for value in found]
    assert shares[:2] == [0, 0.5]
    return told, read_lora(ASSETS / TASK_LORA), shares


@pytest.fixture(scope="module")
def pipeline(comfy):
    host = importlib.import_module("modular_lora_guard.comfy_host.pipeline")
    return host.ComfyPipeline(*host.load(Path(os.environ["MODULAR_LORA_WORLD"]) / "demo_world_sd15.safetensors"))


def drawn(pipeline, images, files, combine: str) -> np.ndarray:
    """By ComfyUI, the LoRAs as the guard's branches; the last file is the task LoRA."""
    roles = [*["safety"] * (len(files) - 1), "task"]
    parts = tuple(Part(role, str(lora.path), lora.sha256) for role, lora in zip(roles, files, strict=True))
    items = [Item(image.prompt, image.seed, image.kind) for image in images]
    return pipeline.draw(Arm("arm", parts, combine=combine), items, Sampling(STEPS, 3.0, "euler", "simple", 64, 64))


def on_the_narrow_net(net, image, *loras) -> np.ndarray:
    model, ae = net
    factors = [(lorafile.load(lora.path, model.unet), strength) for lora, strength in loras]
    with drawing.folded(model.unet, *factors):
        (drawn_images,) = drawing.draw(model, ae, [image], 1, STEPS)
    return (255 * drawn_images[0].permute(1, 2, 0)).numpy()


@pytest.mark.parametrize("combine", ["sum", "safety first"])
def test_images_of_the_narrow_net_are_comfyuis(combine, pipeline, net, images, files):
    safety, task, shares = files
    theirs = drawn(pipeline, images, (safety, task), combine)
    assert pipeline.dtype == "float32"
    for image, their, share in zip(images, theirs, shares, strict=True):
        share = 1.0 if combine == "sum" else share
        ours = on_the_narrow_net(net, image, (safety, 1.0), (task, share))
        assert np.abs(ours - their).max() < 1.0, (image, share)  # they are cut to whole numbers
        if share:
            assert np.abs(ours - on_the_narrow_net(net, image, (safety, 1.0))).max() > 4  # the task's share is seen


def test_of_two_safety_loras_g_is_that_of_the_figures(pipeline, net, images, files, tmp_path: Path):
    """The first one's activity gives 8/16 while both act, and alone at least 4/16 more or less; the second one's 1."""
    model, _ = net
    first, task, _ = files
    base, second = first.metadata["modular_lora.base_sha256"], read_lora(ASSETS / "equal" / "null_space.safetensors")
    image, one, other = images[0], *(lorafile.load(lora.path, model.unet) for lora in (first, second))
    noise, values = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(work.NOISE)), []
    for acting in ((one, other), (one,)):
        lorafile.attach(model.unet, *acting)
        values.append(float(training.activities(model, *model.text([image.prompt]), noise, one)))
    lorafile.attach(model.unet)
    both, alone = values
    width = min(4 * abs(both - alone), both)
    high = both + 8.5 / 16 * width
    told = [
        calibrated(first, tmp_path / "first.safetensors", high - width, high, base),
        calibrated(second, tmp_path / "second.safetensors", 100.0, 200.0, base),
    ]
    (theirs,) = drawn(pipeline, [image], (*told, task), "safety first")
    ours = {
        share: on_the_narrow_net(net, image, *((lora, 1.0) for lora in told), (task, share))
        for share in (7 / 16, 8 / 16, 9 / 16)
    }
    apart = {share: np.abs(one - theirs).max() for share, one in ours.items()}
    assert apart[8 / 16] < 1.0, apart  # they are cut to whole numbers
    assert min(apart, key=apart.get) == 8 / 16
