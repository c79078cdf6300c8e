"""Published LoRA files, by their real tensor names, change what ComfyUI's own loader changes; the rest is counted."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.encoder_toys import ENCODERS, toy_clip
from support.errors import refuses
from support.families import make
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER as NEWER_FAMILIES
from support.families_video import VIDEOS
from support.published import LAYOUTS, NEWER, NOWHERE, Published

FAMILIES = {family.name: family for family in (*IMAGE, *DITS, *VIDEOS, *NEWER_FAMILIES)}
MISTAKES = {  # what else lies in a loras folder: a word of the refusal, some of its tensors, their dtype
    "Control-LoRA": ("ControlNet", {"lora_controlnet": 0, "input_blocks.0.0.down": 4}, torch.float16),
    "ControlNet-LLLite": (
        "ControlNet-LLLite",
        {"lllite_unet_input_blocks_4_1_attn1_to_k.down.0.weight": 4},
        torch.float16,
    ),
    "IP-Adapter": ("IP-Adapter", {"image_proj.proj.weight": 4, "ip_adapter.1.to_k_ip.weight": 4}, torch.float16),
    "textual inversion": ("textual inversion", {"emb_params": 4}, torch.float32),
    "textual inversion SDXL": ("textual inversion", {"clip_l": 4, "clip_g": 4}, torch.float32),
    "AnimateDiff motion module": ("motion module", {"down_blocks.0.motion_modules.0.norm.weight": 4}, torch.float16),
    "VAE": ("VAE", {"encoder.conv_in.weight": 4, "encoder.conv_in.bias": 4}, torch.float32),
    "checkpoint": ("checkpoint", {"cond_stage_model.transformer.text_model.position_ids": 4}, torch.int64),
    "checkpoint, fp16": ("checkpoint", {"model.diffusion_model.out.2.weight": 4}, torch.float16),
    "LyCORIS IA3": ("IA3", {"lora_unet_conv_in.weight": 4, "lora_unet_conv_in.on_input": 1}, torch.float16),
    "OneTrainer OFT v2": ("OFT", {"lora_unet_conv_in.oft_R.weight": 4}, torch.float16),
    "sd-scripts OFT Flux": ("OFT", {"oft_unet_single_blocks_0_linear1.oft_blocks.0": 4}, torch.float16),
    "SVDQuant LoRA": ("nunchaku", {"transformer_blocks.0.qkv_proj.lora_down": 4}, torch.bfloat16),
    "SVDQuant model": ("nunchaku", {"transformer_blocks.0.qkv_proj.qweight": 4}, torch.int8),
}


@pytest.fixture(scope="module")
def toys():
    """A family's model and a text encoder by name, each made once."""
    return cache(lambda name: make(FAMILIES[name])), cache(lambda name: toy_clip(ENCODERS[name]))


class File:
    """A layout on disk, and what ComfyUI's loader and merge make of it on a toy model and text encoder."""

    def __init__(self, layout: Published, path: Path, comfy, toys, caplog):
        from comfy.lora import load_lora, model_lora_keys_clip, model_lora_keys_unet
        from comfy.lora_convert import convert_lora

        self.comfy, self.path, model = comfy, path, toys[0](layout.model)
        self.modules, self.infos = [model.model], [comfy.anatomy.model_info(model)]
        names = model_lora_keys_unet(model.model, {})
        if layout.encoder:
            clip = toys[1](layout.encoder)
            self.modules.append(clip.cond_stage_model)
            self.infos.append(comfy.anatomy.clip_info(clip))
            names = model_lora_keys_clip(clip.cond_stage_model, names)
        tensors = layout.tensors(self.shape)
        save_file(tensors, path)
        caplog.set_level(logging.WARNING)
        caplog.clear()
        self.patches = load_lora(convert_lora(tensors), names)
        said = [record.getMessage() for record in caplog.records]
        self.missing = [line.partition(": ")[2] for line in said if line.startswith("lora key not loaded")]
        if layout.known:
            self.patches = load_lora({layout.as_known(name): tensor for name, tensor in tensors.items()}, names)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Of the weight, or of the slice of one, that core gives this name; a square where it has no such name."""
        plain = layer.replace("base_model.model.", "").replace("lora_unet__", "lora_unet_")
        names = layer, plain, f"diffusion_model.{plain}"
        found = (info.key_map[name] for info in self.infos for name in names if name in info.key_map)
        if (entry := next(found, None)) is None:
            return 32, 32
        key, offset, *_ = (entry, None) if isinstance(entry, str) else entry
        size = next(info.specs[key].weight_shape for info in self.infos if key in info.specs)
        return size if offset is None else (*size[: offset[0]], offset[2], *size[offset[0] + 1 :])

    def merged(self) -> dict[str, torch.Tensor]:
        """What core's merge adds (out in·k·k), by weight or bias; a change that does not fit adds nothing."""
        from comfy.lora import calculate_weight
        from comfy.utils import get_attr

        found: dict[str, list] = {}
        for entry, patch in self.patches.items():
            key, offset, function = (entry, None, None) if isinstance(entry, str) else (*entry, None)[:3]
            found.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
        changes = {}
        for key, patches in found.items():
            weight = get_attr(self.modules[not key.startswith("diffusion_model.")], key).detach()
            change = calculate_weight(patches, weight.clone(), key) - weight
            changes[key] = change.reshape(change.shape[0], -1)
        return {key: change for key, change in changes.items() if change.any()}

    def read(self):
        return self.comfy.host_files.read_lora(self.path)

    def applied(self, role: str) -> list:
        """The file on the model and, where there is one, on the text encoder."""
        lora, halves = self.read(), ([], [])
        for name in lora.layers:
            halves[self.comfy.host_guard.is_text(name)].append(name)
        apply, on = self.comfy.host_guard.apply, zip(halves, self.infos, strict=False)
        return [apply(role, lora, names, 1.0, "", info) for names, info in on]

    def takes(self, key: str) -> bool:
        """Whether a weight or bias takes a change here: that of an embedding does not."""
        specs = {k: spec for info in self.infos for k, spec in info.places.items()}
        return not specs[key].problem or specs[key].norm is not None


def dense(change) -> torch.Tensor:
    """What a LoRA does to a weight (out in·k·k), of the guard's own account of it."""
    return change.dense() if hasattr(change, "dense") else change.scale * change.up.float() @ change.down.float()


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.fixture
def published(comfy, toys, tmp_path, caplog):
    def make_file(layout: Published) -> File:
        from comfy import model_base

        if layout in NEWER and not hasattr(model_base, "Krea2"):
            pytest.skip("the names are newer than this ComfyUI")
        return File(layout, tmp_path / "file.safetensors", comfy, toys, caplog)

    return make_file


@pytest.mark.parametrize("layout", [*LAYOUTS, *NEWER], ids=lambda layout: layout.label)
def test_a_published_file_changes_what_core_changes(layout: Published, published, matrix):
    file = published(layout)
    expected = {key: change for key, change in file.merged().items() if file.takes(key)}
    halves = file.applied("task")
    ours = {key: change for half in halves for key, change in half.changes.items()}
    assert expected.keys() == ours.keys()
    errors = [error(dense(ours[key]), change) for key, change in expected.items()]
    assert max(errors) < 1e-4
    names = tuple(f"{name}." for half in halves for name in half.match.unmatched)
    counted = [tensor for tensor in file.missing if tensor.startswith(names)]
    assert len(file.missing) == layout.left
    stated = [int(note.split()[0]) for note in halves[0].lora.notes if " are left out" in note]
    assert len(counted) + sum(stated) == (0 if layout.known else layout.left)
    assert sum(len(half.match.left) for half in halves) == layout.unfit
    matrix("formats.json", f"published: {layout.label}", "works", max(errors))


@pytest.mark.parametrize("layout", [*LAYOUTS, *NEWER], ids=lambda layout: layout.label)
def test_a_published_safety_lora_acts_whole_or_is_an_error(layout: Published, published, comfy):
    file = published(layout)
    if (layout.known or not layout.left) and not layout.unfit:
        halves = file.applied("safety")
        assert sum(len(half.match.targets) for half in halves) == len(halves[0].lora.layers)
        return
    with refuses(("lora.not-whole", "lora.unread-tensors")):
        file.applied("safety")


@pytest.mark.parametrize("layout", NOWHERE, ids=lambda layout: layout.label)
def test_a_published_file_of_which_core_loads_nothing_is_an_error(layout: Published, published, comfy, matrix):
    file, g = published(layout), comfy.host_guard
    assert not file.patches
    task = g.TaskLora(file.read(), 1.0, 1.0)
    part = g.build_part("model", file.infos[0], (), (task,), g.GuardLimits(), enforce=False)
    with refuses("lora.applies-nowhere", "0 of"):
        g.check_coverage((part,), False)
    matrix("formats.json", f"published: {layout.label}", "refused")


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_file_that_is_no_lora_is_refused_in_clear_words(kind, comfy, tmp_path, matrix):
    named, sizes, dtype = MISTAKES[kind]
    save_file({name: torch.ones(size, dtype=dtype) for name, size in sizes.items()}, tmp_path / "file.safetensors")
    with refuses(("file.another-kind", "file.unread-format"), named) as error:
        comfy.host_files.read_lora(tmp_path / "file.safetensors")
    assert str(error.value).startswith("file.safetensors: ")
    matrix("formats.json", f"published: {kind}", "refused")


@pytest.mark.parametrize("end", [".pt", ".ckpt", ".bin", ".pth"])
def test_a_pickle_is_refused_unopened(end, comfy, tmp_path):
    (tmp_path / f"lora{end}").write_bytes(b"\x80\x02")
    with refuses("file.ending", f"lora{end}"):
        comfy.host_files.read_lora(tmp_path / f"lora{end}")
