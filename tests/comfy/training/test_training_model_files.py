"""A model whose parts are files of their own: what the commands make of them, and what they say of one missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training import cli
from safetensors.torch import load_file, save_file
from support.encoder_toys import ENCODERS, toy_clip
from support.errors import refuses

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

PARTS = {  # prefix of a part's names in the checkpoint -> its file
    "model.diffusion_model.": "network.safetensors",
    "cond_stage_model.transformer.": "clip_l.safetensors",
    "first_stage_model.": "vae.safetensors",
}


@pytest.fixture
def host(comfy):
    return importlib.import_module("modular_lora_guard.comfy_host.trainer_model")


@pytest.fixture(scope="module")
def whole(comfy) -> Path:
    return comfy.base / "models" / "checkpoints" / "world.safetensors"


@pytest.fixture(scope="module")
def parts(whole, tmp_path_factory) -> SimpleNamespace:
    """Paths of the demo world's network, text encoder and VAE, each a file of its own."""
    folder, tensors = tmp_path_factory.mktemp("parts"), load_file(whole)
    for prefix, name in PARTS.items():
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(own, folder / name)
    return SimpleNamespace(**{Path(name).stem: folder / name for name in PARTS.values()})


def test_a_training_on_separate_files_is_the_training_on_their_checkpoint(whole, parts, data, tmp_path, comfy):
    def train(name: str, *model: str | Path):
        options = {"output_dir": tmp_path, "output_name": name, "train_data_dir": data, "network_dim": 2}
        options |= {"max_train_steps": 2, "resolution": 64, "save_precision": "float"}
        given = [str(word) for option in options.items() for word in (f"--{option[0]}", option[1])]
        assert cli.main(["train-task", *map(str, model), *given, "--cpu", "--network_train_text_encoder"]) == 0
        return read_lora(tmp_path / f"{name}.safetensors")

    once = train("once", "--checkpoint", whole)
    files = ("--text_encoder", parts.clip_l, "--vae", parts.vae)
    apart = train("apart", "--checkpoint", parts.network, *files)
    assert once.tensors.keys() == apart.tensors.keys()
    assert all(torch.equal(tensor, apart.tensors[name]) for name, tensor in once.tensors.items())
    assert any(layer.up.any() for layer in once.layers.values())
    base = "modular_lora.base_sha256"
    assert once.metadata[base] == apart.metadata[base]


def test_commands_that_draw_nothing_need_no_vae(host, whole, parts):
    names = [set(info.key_map) for info in host.checkpoint_infos(whole, (), "")]
    for kind in ("", "stable_diffusion"):
        apart = host.checkpoint_infos(parts.network, (parts.clip_l,), kind)
        assert names == [set(info.key_map) for info in apart]


def test_a_missing_part_is_named_with_its_option(host, parts):
    files = (parts.clip_l,)
    with refuses("train.no-text-encoder", "network.safetensors", "--text_encoder"):
        host.load_checkpoint(parts.network, parts.vae, "no")
    with refuses("train.no-vae", "network.safetensors", "--vae"):
        host.load_checkpoint(parts.network, None, "no", text_encoders=files)
    with refuses("train.no-vae", "clip_l.safetensors"):
        host.load_checkpoint(parts.network, parts.clip_l, "no", text_encoders=files)
    with refuses("train.unknown-model", "vae.safetensors"):
        host.load_checkpoint(parts.vae, parts.vae, "no", text_encoders=files)
    with refuses("train.text-encoder-files", "vae.safetensors", "token_embedding", "--clip_type"):
        host.load_checkpoint(parts.network, parts.vae, "no", text_encoders=(parts.vae,))
    with refuses("train.clip-type", "'fluxx'", "flux, "):
        host.load_checkpoint(parts.network, parts.vae, "no", text_encoders=files, clip_type="fluxx")


def test_files_that_do_not_tell_what_they_are_for_need_the_type(host, loaded):
    files = importlib.import_module("modular_lora_guard.comfy_host.text_encoder_files")
    files._check_told(loaded[0], loaded[1])
    with refuses("train.clip-type", "SD15", "SimpleNamespace", "--clip_type"):
        files._check_told(loaded[0], SimpleNamespace(tokenizer=SimpleNamespace()))


SEVERAL = (
    "CLIP-L and T5-XXL (Flux)",
    "CLIP-L and CLIP-G (SDXL)",
    "CLIP-L and Llama 3 8B (Hunyuan Video)",
    "Qwen2.5-VL and ByT5 (Hunyuan Image, Hunyuan Video 1.5)",
)


@pytest.mark.parametrize("name", SEVERAL)
def test_each_of_several_encoders_needs_its_file(name, comfy, loaded, monkeypatch):
    """ComfyUI's CLIP of these encoders takes the files as load_clip hands them on; its own sizes are too large here."""
    from comfy import sd, sd1_clip

    files = importlib.import_module("modular_lora_guard.comfy_host.text_encoder_files")
    clip = toy_clip(ENCODERS[name])
    encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, sd1_clip.SDClipModel)]
    tensors = {f"{i}.safetensors": one.transformer.state_dict() for i, one in enumerate(encoders)}
    if "CLIP-G" in name:  # known by how deep it is
        deep = "text_model.encoder.layers.30.mlp.fc1.weight"
        tensors["1.safetensors"] = tensors["1.safetensors"] | {deep: torch.zeros(1)}

    def load_clip(paths, clip_type):
        for path in paths:
            clip.load_sd(dict(tensors[path]))
        return clip

    monkeypatch.setattr(sd, "load_clip", load_clip)
    assert len(encoders) == 2
    assert files.load([Path(name) for name in tensors], "flux", loaded[0]) is clip
    for some in (["0.safetensors"], ["1.safetensors"], ["0.safetensors", "0.safetensors"]):
        with refuses("train.text-encoder-files", some[0], type(clip.cond_stage_model).__name__):
            files.load([Path(name) for name in some], "flux", loaded[0])


def test_a_type_without_files_and_a_file_that_is_not_there_are_refused(caplog, parts, tmp_path):
    made = ["--concept", "a car", "--output_dir", str(tmp_path), "--cpu", "--checkpoint", str(parts.network)]
    assert cli.main(["make-safety", *made, "--clip_type", "flux"]) == 1
    assert "clip_type: says what" in caplog.text
    assert cli.main(["make-safety", *made, "--text_encoder", str(tmp_path / "t5.safetensors")]) == 1
    assert "t5.safetensors: no such file" in caplog.text
    files = [str(parts.clip_l), str(parts.clip_l), "--output", str(tmp_path / "clear.safetensors")]
    assert cli.main(["project", *files, "--text_encoder", str(parts.clip_l)]) == 1
    assert "text_encoder: is that of a diffusion model" in caplog.text
