"""A checkpoint of the stand-in for sd-scripts, LoRA files and images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.kohya_toys import stub_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of the stand-in, a safety LoRA, images."""
    folder = tmp_path_factory.mktemp("kohya")
    save_file(stub_weights(), folder / "base.safetensors")
    name, generator = "lora_unet_attentions_0_transformer_blocks_0_attn2_to_k", torch.Generator().manual_seed(3)
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 10, generator=generator)}
    tensors |= {f"{name}.lora_up.weight": torch.randn(12, 2, generator=generator), f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, folder / "safety.safetensors", {"modular_lora.role": "safety"})
    lost = {key.replace("to_k", "to_x"): value for key, value in tensors.items()}
    save_file(lost, folder / "lost.safetensors")
    images = folder / "pictures" / "2_thing"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(images / "a.png")
    (images / "a.txt").write_text("a thing", encoding="utf-8")
    return folder
