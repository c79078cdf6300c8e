"""Edit models learn from pairs: what the network is told of a reference image is what ComfyUI's own nodes tell it."""

from __future__ import annotations

import importlib

import pytest
import torch
from PIL import Image
from support.errors import refuses
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_video import VIDEOS
from support.family_training import part, watch
from support.training_toys import side_of, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

BEHIND = ("Flux dev", "Qwen-Image", "OmniGen2", "Wan 2.1 Fun control")  # the image's tokens, by ReferenceLatent
BESIDE = ("InstructPix2Pix",)  # the image's channels, by InstructPixToPixConditioning


def family_of(name: str):
    return next(family for family in (*IMAGE, *DITS, *VIDEOS) if family.name == name)


@pytest.fixture
def references(data):
    """A mirrored image for each image of `data`."""
    folder = data.parent / "references"
    folder.mkdir()
    for path in data.glob("*/*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / path.name)
    return folder


def made(family, data, folder, **options):
    return part("training.options").TaskOptions(
        output_dir=str(folder), train_data_dir=str(data), network_dim=2, max_train_steps=2, resolution=side_of(family),
        train_batch_size=2, save_precision="float", learning_rate=5e-3, **options,
    )  # fmt: skip


def by_nodes(model, row, latent: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, name: str) -> torch.Tensor:
    """Denoised x of ComfyUI's own evaluation, with the conditioning that its node makes."""
    samplers = importlib.import_module("comfy.samplers")
    convert = importlib.import_module("comfy.sampler_helpers").convert_cond
    further = {key: value for key, value in row.further.items() if value is not None}
    cond = [[row.cross, further]]
    if name in BEHIND:
        node = importlib.import_module("comfy_extras.nodes_edit_model").ReferenceLatent
        cond = node.execute(cond, {"samples": latent}).args[0]
    else:  # the node encodes pixels itself; what it puts there is the latent
        set_values = importlib.import_module("node_helpers").conditioning_set_values
        cond = set_values(cond, {"concat_latent_image": latent})
    model.pre_run()
    conds = samplers.process_conds(model.model, torch.zeros_like(x), {"positive": convert(cond)}, torch.device("cpu"))
    return samplers.calc_cond_batch(model.model, [conds["positive"]], x, sigma, {"transformer_options": {}})[0]


@pytest.mark.parametrize("name", [*BEHIND, *BESIDE])
def test_the_network_is_told_what_comfyuis_nodes_tell_it(name, comfy, data, tmp_path):
    family = family_of(name)
    model, clip, vae = toy_parts(family)
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(side_of(family), side_of(family), 3, generator=generator)
    with part("comfy_host.trainer_model").opened(model, clip, vae, made(family, data, tmp_path)) as opened:
        latent = opened.encode_reference(image)
        opened.ask_reference(latent)
        x_t = torch.randn(1, *opened.latent_shape(*image.shape[:2]), generator=generator)
        t = torch.tensor([len(opened.schedule) // 3])
        texts = opened.encode(["a cat"])
        with torch.no_grad():
            said = opened.predict(x_t, t, texts.of_images(torch.tensor([[64, 64, 0, 0, 64, 64]]), (latent,)))
            without = opened.predict(x_t, t, texts)
        ours = opened.schedule.to_x0_eps(said, x_t, t)[0]
    sampling = model.model.model_sampling
    sigma = sampling.sigmas[t].float()
    with torch.inference_mode():
        scale = sampling.calculate_input(sigma, torch.ones(1))
        stock = by_nodes(model, texts.rows[0], latent, x_t / scale.view(-1, *[1] * (x_t.dim() - 1)), sigma, name)
    assert torch.allclose(ours, stock, rtol=1e-3, atol=1e-3 * float(stock.abs().max()))
    assert not torch.allclose(said, without)


def test_a_training_on_pairs_lowers_the_loss_and_depends_on_them(comfy, data, references, tmp_path):
    family, task = family_of("Qwen-Image"), part("training.task.train")

    def train(name: str, **options):
        o = made(family, data, tmp_path, output_name=name, **options)
        with part("comfy_host.trainer_model").opened(*toy_parts(family), o) as opened:
            return task.train_task(opened, o, watch(), engine="test").lora

    pairs = train("pairs", reference_dir=str(references))
    alone = train("alone")
    assert pairs.tensors.keys() == alone.tensors.keys()
    assert any(not torch.equal(tensor, alone.tensors[key]) for key, tensor in pairs.tensors.items())
    assert pairs.metadata["ss_dataset_dirs"] == alone.metadata["ss_dataset_dirs"]
    assert pairs.metadata["modular_lora.dataset_sha256"] != alone.metadata["modular_lora.dataset_sha256"]


def test_references_that_were_kept_on_disk_are_shown_to_the_network_as_those_just_made(
    comfy, data, references, tmp_path, monkeypatch
):
    trainer, task = part("comfy_host.trainer_model"), part("training.task.train")
    monkeypatch.setattr(trainer.ComfyHostModel, "autoencoder_identity", lambda self: "a toy's")
    family = family_of("Qwen-Image")

    def train(name: str):
        o = made(family, data, tmp_path, output_name=name, reference_dir=str(references), cache_latents_to_disk=True)
        with trainer.opened(*toy_parts(family), o) as opened:
            return task.train_task(opened, o, watch(), engine="test")

    first, again = train("first"), train("again")
    assert "cache_latents: 0 found on disk, 4 made" in first.report
    assert "cache_latents: 4 found on disk, 0 made" in again.report
    assert all(torch.equal(tensor, again.lora.tensors[key]) for key, tensor in first.lora.tensors.items())


@pytest.mark.parametrize("name", ["SD1.x", "SD1.x inpainting", "Wan 2.1 T2V", "Wan 2.1 I2V"])
def test_a_model_without_a_place_for_it_is_refused(name, comfy, data, references, tmp_path):
    family = family_of(name)
    o = made(family, data, tmp_path, reference_dir=str(references))
    with part("comfy_host.trainer_model").opened(*toy_parts(family), o) as opened, refuses("train.no-reference"):
        part("training.task.train").train_task(opened, o, watch(), engine="test")
