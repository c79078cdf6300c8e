"""A safety LoRA with a calibration that was made for a test, and what its activity is by other means."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.guard import activity
from torch.nn import functional as F

SEED = 0x5AFE  # of the noise that g is found with


def calibration(base_sha256: str, low: float, high: float, **changes) -> activity.Calibration:
    """One by which a prompt is kept up to ``low`` and about the concept from ``high`` on."""
    sides = [activity.Side(8, 8, (value,) * len(activity.LEVELS)) for value in (high, low)]
    given = {"base_sha256": base_sha256, "strength": 1.0, "latent": (4, 8, 8), "seed": 0, "auc": 1.0} | changes
    return activity.Calibration(concept=sides[0], preserved=sides[1], **given)


def calibrated(lora, target: Path, low: float, high: float, base_sha256: str, **changes):
    """A copy of a LoRA's file with such a calibration."""
    return activity.write_copy(lora, target, calibration(base_sha256, low, high, **changes))


def expected_share(value: float, low: float, high: float) -> float:
    """g by the equation of the documentation."""
    return math.floor(16 * min(1.0, max(0.0, (high - value) / (high - low)))) / 16


def activities(merged, base, layers: dict, conds: list, latent: torch.Tensor, shape: tuple) -> list[float]:
    """The activity of a safety LoRA on every conditioning, in fp64 from hooks on a model into which it is merged.

    Args:
        merged: ComfyUI's model with the safety LoRA in its weights.
        base: The same without it.
        layers: name -> LayerSpec of all layers that it changes.
        conds: CONDITIONING of each prompt.
        latent: Empty latent of one image.
        shape: Of the noise of the run whose first row is taken.
    """
    from comfy.sample import sample_custom
    from comfy.samplers import ksampler

    paths = {spec.path: spec for spec in layers.values()}
    W0 = {path: base.model.get_submodule(path).weight.detach().double().clone() for path in paths}
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))[None]
    sigmas = torch.tensor([float(base.model.model_sampling.sigma_max), 0.0])
    found: list[float] = []
    for cond in conds:
        ratios = []

        def note(module, args, output, path=None, ratios=ratios):
            spec, x = paths[path], args[0].double()
            bias = None if module.bias is None else module.bias.double()
            if spec.conv is None:
                y0 = F.linear(x, W0[path], bias)
            else:
                y0 = F.conv2d(x, W0[path], bias, module.stride, module.padding)
            ratios.append(float((output.double() - y0).square().sum() / y0.square().sum()))

        handles = [
            merged.model.get_submodule(path).register_forward_hook(partial(note, path=path), with_kwargs=False)
            for path in paths
        ]
        try:
            sample_custom(merged, noise, 1.0, ksampler("euler"), sigmas, cond, cond, latent, disable_pbar=True)
        finally:
            for handle in handles:
                handle.remove()
        assert len(ratios) == len(paths)
        found.append(sum(ratios) / len(ratios))
    return found
