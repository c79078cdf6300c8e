"""A small U-Net of Stable Diffusion 1.5's kind with random weights, in ComfyUI's own classes, and a LoRA for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from comfy import model_patcher, supported_models
from comfy.sample import sample_custom
from comfy.samplers import ksampler
from safetensors.torch import save_file

from ..modular_lora.files.reader import LoraFile, read_lora
from .introspection import model_info

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -2,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}
RANK = 2


def tiny_model(device: torch.device | None = None) -> model_patcher.ModelPatcher:
    """A MODEL with the same random weights every time, in fp32, on the CPU or on a device of ComfyUI's choice."""
    config = supported_models.SD15(dict(UNET))
    config.unet_config["num_heads"], config.unet_config["num_head_channels"] = -1, 16
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.05
    cpu = torch.device("cpu")
    return model_patcher.ModelPatcher(network.eval(), load_device=device or cpu, offload_device=cpu)


def sampled(patcher, size: int = 8, batch: int = 1, steps: int = 1, cfg: float = 1.0) -> torch.Tensor:
    """Latents (b 4 h w) of one run through ComfyUI's own sampling, from the same noise and prompt every time."""
    generator = torch.Generator().manual_seed(1)
    cond = [[torch.randn(1, 77, 768, generator=generator), {}]]
    noise = torch.randn(batch, 4, size, size, generator=generator)
    sigmas, start = torch.linspace(5.0, 0.0, steps + 1), torch.zeros(batch, 4, size, size)
    return sample_custom(patcher, noise, cfg, ksampler("euler"), sigmas, cond, cond, start, disable_pbar=True)


def tiny_lora(model: model_patcher.ModelPatcher) -> tuple[LoraFile, model_patcher.ModelPatcher]:
    """A LoRA on every linear layer of the tiny model, and another one with it merged into its weights."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    merged = tiny_model(model.load_device)  # the same weights: 0.33.0's models cannot be copied by copy.deepcopy
    info, done = model_info(model), set()
    for name, key in info.key_map.items():
        spec = info.specs.get(key) if isinstance(key, str) else None
        if not name.startswith("lora_unet_") or spec is None or spec.problem or spec.conv is not None or key in done:
            continue
        done.add(key)
        out, inner = spec.weight_shape
        down = torch.randn(RANK, inner, generator=generator) / inner**0.5
        up = torch.randn(out, RANK, generator=generator) * 0.2 / RANK**0.5
        alpha = torch.tensor(float(RANK))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        merged.model.get_submodule(spec.path).weight.data += up @ down
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        save_file(tensors, path)
        lora = read_lora(path)
    return lora, merged
