"""LoRA files with more in them than layers, and files of other kinds: left out and counted, or refused by kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files import read_lora
from safetensors.torch import save_file


def pair(layer: str = "lora_unet_a") -> dict:
    return {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(3, 2)}


def refusal(folder: Path) -> str:
    with pytest.raises(LoraFileError) as error:
        read_lora(folder / "a.safetensors")
    return str(error.value)


def test_tensors_beside_the_layers_that_comfyui_leaves_out_are_left_out_and_counted(tmp_path):
    more = {f"diffusion_model.blocks.{i}.diff_m": torch.ones(1, 6, 4) for i in range(2)}
    more |= {"text_model.embeddings.token_embedding.lora_embedding_A": torch.ones(2, 4)}  # PEFT's, of a table
    save_file({**pair("diffusion_model.blocks.0.ffn.0"), **more}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.layers) == ["diffusion_model.blocks.0.ffn.0"]
    assert set(lora.unread) == set(more)
    first = min(more)
    assert lora.notes == (f"3 tensors are left out, as ComfyUI's own loader leaves them out (first '{first}')",)


def test_a_scale_without_weights_is_left_out_and_counted(tmp_path):
    """As diffusers' training scripts left magnitudes under another name than the weights they belong to."""
    alone = {"a.b.lora_magnitude_vector": torch.ones(3), "c.alpha": torch.tensor(2.0), "d.dora_scale": torch.ones(3, 1)}
    save_file({**pair(), **alone}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.layers) == ["lora_unet_a"]
    assert set(lora.unread) == set(alone)


def test_an_alpha_that_nothing_is_scaled_by_may_be_infinite(tmp_path):
    """AI-Toolkit's LoKr of whole factors has an alpha of 9,999,999,999, which float16 cannot hold."""
    factors = {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2": torch.ones(3, 2)}
    save_file({**factors, "a.alpha": torch.tensor(9999999999.0).half()}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").layers["a"].scale == 1.0


def test_comfyuis_short_ending_is_read_as_well(tmp_path):
    save_file(pair(), tmp_path / "a.sft")
    assert list(read_lora(tmp_path / "a.sft").layers) == ["lora_unet_a"]


def test_a_file_of_nothing_else_is_no_lora(tmp_path):
    save_file({"out.0.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert "'out.0.weight': is not a LoRA tensor" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"lora_controlnet": torch.ones(0), "input_blocks.0.0.up": torch.ones(2, 2)}, "a Control-LoRA"),
        ({"cond_stage_model.position_ids": torch.ones(2).long(), "first_stage_model.a": torch.ones(2)}, "a checkpoint"),
        ({"model.diffusion_model.out.0.weight": torch.ones(2, 2)}, "a checkpoint"),
        ({"single_blocks.0.qweight": torch.ones(2, 2).char()}, "nunchaku's own form"),
        ({"emb_params": torch.ones(2, 8)}, "an embedding"),
        ({"clip_g": torch.ones(2, 8), "clip_l": torch.ones(2, 8)}, "an embedding"),
        ({"lllite_unet_a.down.0.weight": torch.ones(2, 8)}, "a ControlNet-LLLite"),
        ({"image_proj.norm.weight": torch.ones(8), "ip_adapter.1.to_k_ip.weight": torch.ones(8, 8)}, "an IP-Adapter"),
        ({"control_model.out.weight": torch.ones(8, 8)}, "a ControlNet"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(8)}, "a motion module"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_kind(tmp_path, tensors, kind):
    save_file(tensors, tmp_path / "a.safetensors")
    assert f"a.safetensors: is {kind}" in refusal(tmp_path)
