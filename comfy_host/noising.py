"""How a loaded model mixes noise into an image, asked of its own model_sampling: the trainers' table of noise levels.

Whatever ComfyUI or a node has put there (ε, v, flow matching with its shift, EDM, a distilled model's own), three of
its functions are linear, so their values at 0 and 1 say all of it; `training.model.Schedule` has the formulas.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_sampling
import torch

from ..modular_lora.errors import GuardError
from ..training.model import Schedule


def schedule_of(sampling: Any) -> Schedule:
    """The table of a model_sampling; GuardError where it is none that noise can be taken away by."""
    sigmas = sampling.sigmas.detach().double().cpu()  # T, rising
    zeros, ones = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    scale = sampling.calculate_input(sigmas, ones)  # what the network sees of 1
    signal, noise = (sampling.noise_scaling(sigmas, *pair) for pair in ((zeros, ones), (ones, zeros)))
    of_x, of_said = (sampling.calculate_denoised(sigmas, *pair) for pair in ((zeros, ones), (ones, zeros)))
    begun = sampling.noise_scaling(sigmas[-1:], ones[-1:], zeros[-1:], max_denoise=True) * scale[-1:]
    times = sampling.timestep(sampling.sigmas.detach().float()).double().cpu()
    parts = (scale * signal, scale * noise, of_x / scale, of_said, times)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise GuardError(
            "This MODEL's noise levels are not finite numbers, so nothing can be trained at them: connect the "
            "checkpoint loader's own MODEL.",
            code="train.noise-levels",
        )
    return Schedule.of(*parts, start=float(begun))


def plain(sampling: Any) -> Any:
    """A model_sampling that hands x_t on as it is, and gives what the network said."""
    raw = copy.copy(sampling)
    raw.calculate_input = lambda sigma, noise: noise
    raw.calculate_denoised = lambda sigma, model_output, model_input: model_output
    return raw


def maps_images(sampling: Any) -> bool:
    """Whether the model turns one image into another instead of taking noise away (Lotus)."""
    return isinstance(sampling, comfy.model_sampling.IMG_TO_IMG)
