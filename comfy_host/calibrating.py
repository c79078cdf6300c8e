"""The activity of a safety LoRA on prompts, measured on a MODEL and CLIP from noise (modular_lora/guard/activity.py).

A bare clone of the MODEL is evaluated once for each prompt, with the safety LoRA beside the weights and nothing else:
no guidance, no sampler, so neither has a part in what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..modular_lora.branches.attachment import ALL_ROLES
from ..modular_lora.command import Watch
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import activity, concept
from ..modular_lora.guard.activity import Calibration
from ..modular_lora.guard.build import GuardedPart, GuardLimits, SafetyLora, check_coverage, on_each
from . import patcher
from .functional import _acting, _bare, _bare_clip, measuring
from .introspection import clip_info, model_info, model_sha256
from .measurement import evaluation_rows
from .run import forget

_OWN = "connect the checkpoint loader's own"
DOWNSCALE = 8  # pixels of an image for one of its latent


def latent_of(model, size: int) -> Tensor:
    """An empty latent for square images of ``size`` pixels."""
    return torch.zeros(1, model.model.latent_format.latent_channels, size // DOWNSCALE, size // DOWNSCALE)


def calibrated(
    model,
    clip,
    safety: SafetyLora,
    about: Sequence[str],
    preserved: Sequence[str],
    latent: Tensor,
    noises: int,
    seed: int,
    watch: Watch,
) -> Calibration:
    """What a safety LoRA's activity is on a base.

    Args:
        model: The base's MODEL; nothing that nodes put on it acts.
        clip: Its CLIP.
        safety: The safety LoRA with its strength.
        about: Prompts of the concept; none: those in the safety LoRA's file.
        preserved: Prompts that are to be kept.
        latent: Empty latents b c ...; the first gives the size.
        noises: How many are drawn for each prompt.
        seed: Of the noises: the same for every prompt.
        watch: Is shown how far it is, and may interrupt.

    Raises:
        GuardError: MODEL or CLIP is guarded or has LoRAs in it, the LoRA does not act on the network, or no verdict
            could be made of what is found (`activity.calibrate`).
    """
    about = tuple(dict.fromkeys(about or concept.read(safety.lora)))
    preserved = tuple(dict.fromkeys(preserved))
    activity.check_prompts("concept", len(about))
    activity.check_prompts("preserved", len(preserved))
    if both := sorted({*about} & {*preserved}):
        raise GuardError(
            f"Prompt {both[0]!r} is both of the concept and preserved: take it out of one of the lists.",
            code="activity.both-lists",
        )
    _check(model, clip)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    noise = torch.randn(noises, *latent.shape[1:], generator=torch.Generator().manual_seed(seed))
    model_, clip_ = _bare(model), _bare_clip(clip)
    parts = on_each(model_info(model_), clip_info(clip_), (safety,), (), GuardLimits(), enforce=False)
    check_coverage(parts, True)
    if not parts[0].branches.meter.strengths:
        raise GuardError(
            f"Safety LoRA {safety.lora.name}: acts on the text encoder alone, and activity is measured in the network: "
            "it cannot be calibrated.",
            code="activity.text-only",
        )
    with torch.inference_mode():
        conds = _encoded(clip_, parts[1], (*about, *preserved))
        found = _activities(model_, parts[0], conds, noise, watch)
    for part in parts:
        part.branches.free()
    figures = (found[: len(about)], found[len(about) :])
    return activity.calibrate(model_sha256(model), safety.strength, tuple(noise.shape[1:]), seed, *figures)


def _check(model, clip) -> None:
    name = "Calibrate Safety LoRA"
    patcher._check_types(model, clip, name)
    if clip is None:
        raise GuardError(f"{name} got no CLIP: connect the checkpoint's CLIP.", code="activity.no-clip")
    remedies = {"merged": _OWN, "beside": f"beside its own weights: {_OWN}"}
    patcher._check_incoming(model, False, "The MODEL", **remedies)
    patcher._check_incoming(clip.patcher, False, "The CLIP", **remedies)


def _encoded(clip, text: GuardedPart, prompts: Sequence[str]) -> list:
    """CONDITIONING of each prompt, as CLIPTextEncode makes it, by the text encoder with the safety LoRA."""
    comfy.model_management.load_models_gpu([clip.patcher])
    with _acting(clip.patcher, clip.cond_stage_model, text if text.branches.layers else None, ALL_ROLES):
        return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0] for prompt in prompts]


def _activities(model, part: GuardedPart, conds: list, noise: Tensor, watch: Watch) -> list[list[float]]:
    """The activity on every conditioning, noise by noise, at the highest noise level.

    What CFGGuider does for its first evaluation, without guidance (comfy.samplers.process_conds, calc_cond_batch).
    """
    device, meter = model.load_device, part.branches.meter
    options: dict[str, dict] = {"transformer_options": {}}
    entries = {"positive": comfy.sampler_helpers.convert_cond(conds)}
    network, entries, _ = comfy.sampler_helpers.prepare_sampling(model, noise.shape, entries, options)
    sampling, noise = network.model_sampling, noise.to(device)
    empty = torch.zeros_like(noise)
    sigmas = torch.full((len(noise),), float(sampling.sigma_max), device=device)
    found = []
    with _acting(model, network, part, ALL_ROLES):
        model.pre_run()
        token = measuring.set(network)
        try:
            forget(network)
            known = {"latent_image": empty, "seed": 0, "latent_shapes": [noise.shape]}
            entries = comfy.samplers.process_conds(network, noise, entries, device, **known)["positive"]
            x = sampling.noise_scaling(sigmas, noise.clone(), empty, True)
            for number, entry in enumerate(entries, 1):
                meter.start(partial(evaluation_rows, len(noise)), prompt=0)
                comfy.samplers.calc_cond_batch(network, [[entry]], x, sigmas, options)
                ((_, acted),) = meter.finish(len(noise)).items()
                found.append([float("nan") if value is None else value for value in acted.activity])
                watch.check()
                watch.stage("measuring prompts", number, len(entries))
        finally:
            meter.stop()
            measuring.reset(token)
            forget(network)
            model.cleanup()
    return found
