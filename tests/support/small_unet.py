"""A small U-Net of SD1.5's kind in ComfyUI's own classes, and a run of it through ComfyUI's own sampling."""

from __future__ import annotations

import torch

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


def small_unet():
    """A ModelPatcher with random weights, on the CPU in fp32."""
    from comfy import model_patcher, supported_models

    config = supported_models.SD15(dict(UNET))
    config.unet_config["num_heads"], config.unet_config["num_head_channels"] = -1, 16
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.05
    cpu = torch.device("cpu")
    return model_patcher.ModelPatcher(network.eval(), load_device=cpu, offload_device=cpu)


def sampled(patcher, size: int = 8, batch: int = 1, steps: int = 1, cfg: float = 1.0) -> torch.Tensor:
    """Latents of one run through ComfyUI's own sampling, so that the guard's checks are in it."""
    from comfy.sample import sample_custom
    from comfy.samplers import ksampler

    generator = torch.Generator().manual_seed(1)
    cond = [[torch.randn(1, 77, 768, generator=generator), {}]]
    noise = torch.randn(batch, 4, size, size, generator=generator)
    sigmas, start = torch.linspace(5.0, 0.0, steps + 1), torch.zeros(batch, 4, size, size)
    return sample_custom(patcher, noise, cfg, ksampler("euler"), sigmas, cond, cond, start, disable_pbar=True)
