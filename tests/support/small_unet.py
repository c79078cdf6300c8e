"""A small U-Net of SD1.5's kind in ComfyUI's own classes, and a run of it through ComfyUI's own sampling."""

from __future__ import annotations

import importlib

import torch

PLACE = "modular_lora_guard.comfy_host.tiny_model"  # imported where it is used: it needs ComfyUI


def small_unet():
    """A ModelPatcher with random weights, on the CPU in fp32."""
    return importlib.import_module(PLACE).tiny_model()


def sampled(patcher, **settings) -> torch.Tensor:
    """Latents of one run through ComfyUI's own sampling, so that the guard's checks are in it."""
    return importlib.import_module(PLACE).sampled(patcher, **settings)
