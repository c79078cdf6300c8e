"""Models of video trained on clips at toy size with ComfyUI's own classes, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.errors import refuses
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.family_training import check_family, part, watch
from support.graphs import base_graph
from support.training_toys import SIDE, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
pytest.importorskip("av", reason="PyAV is not installed beside this ComfyUI: clips are read by it")

FRAMES = 9
STILL = {"CosmosT2IPredict2", "Anima", "Krea2", "JoyImage", "QwenImage"}  # though their latents have frames
OTHERS = {  # of one frame, or not trained at all
    "HunyuanImage21", "HunyuanImage21Refiner", "Kandinsky5Image", "HunyuanVideo15_SR_Distilled", "LTXAV", "MiniMaxH3",
}  # fmt: skip
FIGURES = "training_families.json"
EVERY = (*IMAGE, *DITS, *VIDEOS, *NEWER)
TRAINED = [family for family in (*VIDEOS, *NEWER) if len(family.latent) == 4 and family.config not in STILL | OTHERS]


@pytest.fixture
def moving(data):
    """The two captioned images as clips: each moves to the right, in frames without loss."""
    for path in sorted(data.glob("*/*.png")):
        with Image.open(path) as image:
            still = np.asarray(image.convert("RGB").resize((SIDE, SIDE)))
        frames = [Image.fromarray(np.roll(still, 3 * t, axis=1)) for t in range(FRAMES)]
        frames[0].save(path.with_suffix(".webp"), save_all=True, append_images=frames[1:], lossless=True)
        path.unlink()
    return data


def test_a_training_on_clips_lowers_the_loss_leaves_the_base_and_its_file_is_stock(comfy, moving, tmp_path):
    family = next(family for family in EVERY if family.name == "LTX Video")
    check_family(family, comfy, moving, tmp_path, clip_frames=FRAMES, clip_extraction="spread")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
def test_every_model_of_video_is_trained_on_clips(family, comfy, moving, tmp_path, matrix):
    from comfy import supported_models

    if not hasattr(supported_models, family.config):
        matrix(FIGURES, f"{family.name}, clips", "untested")
        pytest.skip(f"this ComfyUI has no {family.config}")
    check_family(family, comfy, moving, tmp_path, clip_frames=FRAMES)
    matrix(FIGURES, f"{family.name}, clips", "works")


@pytest.fixture
def wan_vae(comfy):
    """ComfyUI's VAE with the network that it makes for Wan 2.1, a sixth as wide, and random weights."""
    from comfy import sd
    from comfy.ldm.wan.vae import WanVAE

    generator = torch.Generator().manual_seed(5)
    network = WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    weights = {
        name: torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5
        if p.dim() > 1
        else torch.zeros_like(p)
        for name, p in network.state_dict().items()
    }
    return sd.VAE(sd=weights, device=torch.device("cpu"), dtype=torch.float32)


def test_comfyui_s_own_vae_gives_a_clip_s_latent_and_says_which_lengths_it_takes(comfy, wan_vae, moving, tmp_path):
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    model, clip, _ = toy_parts(next(family for family in EVERY if family.name == "Wan 2.1 T2V"))
    made = {
        "output_dir": str(tmp_path), "train_data_dir": str(moving), "network_dim": 2, "max_train_steps": 3,
        "resolution": SIDE, "clip_frames": FRAMES, "cache_latents_to_disk": True, "flip_aug": True,
        "validation_split": 0.5,
    }  # fmt: skip

    def train(name: str, **changes):
        o = options.TaskOptions(output_name=name, **made | changes)
        with trainer.opened(model, clip, wan_vae, o) as opened:
            assert [opened.frames_of(latent) for latent in (1, 2, 3)] == [1, 5, 9]
            return task.train_task(opened, o, watch(), engine="test")

    first, again = train("first"), train("again")
    assert first.lora.metadata["modular_lora.clip_frames"] == str(FRAMES)
    assert all(torch.equal(tensor, again.lora.tensors[name]) for name, tensor in first.lora.tensors.items())
    assert "cache_latents: 0 found on disk, 3 made" in first.report, "one clip and its mirror image, and one held out"
    assert "cache_latents: 3 found on disk, 0 made" in again.report
    assert "1 clips of 9 frames" in first.report
    assert {tuple(load_file(path)["latent"].shape) for path in (tmp_path / "cache_latents").iterdir()} == {
        (16, 3, SIDE // 8, SIDE // 8)
    }
    with refuses("dataset.clip-frames", 8, "WAN21_T2V", "1, 5, 9", "5 or 9"):
        train("eight", clip_frames=8)


def test_a_clip_may_have_a_reference_image(comfy, moving, tmp_path):
    """Wan Fun Control's, beside the text; a clip of no such image is left out, as an image is."""
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    family = next(family for family in EVERY if family.name == "Wan 2.1 Fun control")
    clip, *_ = sorted(moving.glob("*/*.webp"))
    (tmp_path / "references").mkdir()
    with Image.open(clip) as first:
        first.convert("RGB").save(tmp_path / "references" / f"{clip.stem}.png")

    def train(name: str, references: str):
        o = options.TaskOptions(
            output_name=name, output_dir=str(tmp_path), train_data_dir=str(moving), network_dim=2, max_train_steps=2,
            resolution=SIDE, clip_frames=5, learning_rate=5e-3, save_precision="float", reference_dir=references,
        )  # fmt: skip
        with trainer.opened(*toy_parts(family), o) as opened:
            return task.train_task(opened, o, watch(), engine="test")

    shown = train("shown", str(tmp_path / "references"))
    assert "reference images: 1" in shown.report
    assert "1 clips of 5 frames" in shown.report
    alone = train("alone", "").lora.tensors
    assert any(not torch.equal(tensor, alone[name]) for name, tensor in shown.lora.tensors.items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", [f for f in EVERY if f.config in STILL | {"SD15"}], ids=lambda family: family.name)
def test_a_model_of_still_images_takes_no_clips(family, comfy, moving, tmp_path):
    from comfy import supported_models

    if not hasattr(supported_models, family.config):
        pytest.skip(f"this ComfyUI has no {family.config}")
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    o = options.TaskOptions(
        output_dir=str(tmp_path), train_data_dir=str(moving), clip_frames=FRAMES, resolution=SIDE, max_train_steps=1
    )
    with trainer.opened(*toy_parts(family), o) as opened, refuses("dataset.clip-frames", 9, family.config, "still"):
        task.train_task(opened, o, watch(), engine="test")
    with trainer.opened(*toy_parts(family), o) as opened:  # a clip of one frame is an image
        made = task.train_task(opened, replace(o, clip_frames=1), watch(), engine="test")
    assert "2 images (2 of them clips)" in made.report


def test_clips_with_a_vae_of_still_images_name_the_vae(comfy, moving, tmp_path):
    trainer, task, options = part("comfy_host.trainer_model"), part("training.task.train"), part("training.options")
    model, clip, _ = toy_parts(next(family for family in EVERY if family.name == "Wan 2.1 T2V"))
    vae = toy_parts(next(family for family in EVERY if family.name == "SD1.x"))[2]
    o = options.TaskOptions(output_dir=str(tmp_path), train_data_dir=str(moving), clip_frames=FRAMES, resolution=SIDE)
    with trainer.opened(model, clip, vae, o) as opened, refuses("train.other-vae", "WAN21_T2V"):
        task.train_task(opened, o, watch(), engine="test")


def test_the_report_s_node_looks_into_clips_and_a_training_node_hands_their_length_on(
    comfy, run_graph, moving, monkeypatch
):
    import av

    monkeypatch.setattr(comfy.folder_paths, "input_directory", str(moving.parent))
    with av.open(str(moving / "1_x" / "red.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (SIDE, SIDE), "red"))))
        container.mux(stream.encode())

    def run(**values):
        values = {"data_set": moving.name, "resolution": SIDE, "train_batch_size": 1} | values
        return run_graph({"report": {"class_type": "ModularLoraDatasetReport", "inputs": values}})["report"]

    report, sheet = run(clip_frames=FRAMES)
    assert f"bucket {SIDE}×{SIDE}: 3 clips of {FRAMES} frames, 3 draws" in report
    assert (sheet[0, :, :, 0] - sheet[0, :, :, 1] > 0.9).sum() > SIDE * SIDE / 2, "the red clip is on it"
    report, _ = run()
    assert "1 clips, NOT read" in report
    graph = base_graph()
    graph["options"] = {
        "class_type": "ModularLoraTaskTrainingOptions",
        "inputs": {"clip_frames": FRAMES, "resolution": SIDE, "clip_extraction": "spread"},
    }
    inputs = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2], "options": ["options", 0]}
    inputs |= {"data_set": moving.name, "output_name": "clips", "max_train_steps": 1, "seed": 1}
    graph["train"] = {"class_type": "ModularLoraTrainTask", "inputs": inputs}
    with refuses("dataset.clip-frames", FRAMES, "SD15", "still"):
        run_graph(graph)
