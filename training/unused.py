"""Options that were set and change nothing beside the others: they are not refused, but they are said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .options import HUBER, Options, SafetyOptions, TaskOptions

PREVIEWS = ("sample_prompts", "sample_steps", "sample_cfg", "sample_size")
DATA_SET = (  # a TOML can say them
    "resolution", "flip_aug", "shuffle_caption", "keep_tokens", "caption_dropout_rate", "alpha_mask",
    "caption_extension", "caption_dir", "reference_dir", "validation_split", "validation_seed", "clip_frames",
    "clip_extraction",
)  # fmt: skip


def unused(options: Options, regularisation: int | None = None) -> list[str]:
    """A line for each option that is not at its default and has no effect here.

    ``regularisation``: images of the data set that are, where it was looked through.
    """
    found = list(_of_all(options))
    if isinstance(options, TaskOptions):
        found += _of_task(options, regularisation)
    if isinstance(options, SafetyOptions):
        found += _of_safety(options)
    lines = [line for name, why in found if (line := _line(options, name, why))]
    if options.lr_warmup_steps >= options.max_train_steps:
        warmup, steps = options.lr_warmup_steps, options.max_train_steps
        lines.append(f"learning_rate is NEVER reached: lr_warmup_steps is {warmup}, and there are {steps} steps")
    return lines


def unused_by_kohya(options: Options, family: str) -> list[str]:
    """The same of what sd-scripts' script for a family (ComfyUI's name) does not read."""
    found: list[tuple[str, str]] = []
    is_task = isinstance(options, TaskOptions)
    latent_diffusion = family in ("SD15", "SD20", "SDXL")
    if not latent_diffusion:
        why = f"sd-scripts' trainer of {family} has none"
        found += [(name, why) for name in ("clip_skip", "min_snr_gamma", "noise_offset", "max_token_length")]
        found += [(name, why) for name in ("debiased_estimation_loss", "multires_noise_iterations") if is_task]
    if is_task:
        why = "sd-scripts has options of its own for it, which are passed on"
        found.append(("cache_text_encoder_outputs_to_disk", why))
        found.append(("timestep_density", "sd-scripts draws timesteps by options of its own, which are passed on"))
    if family == "SDXL":
        found.append(("clip_skip", "sd-scripts' trainer of SDXL takes its own layer"))
    lines = [line for name, why in found if (line := _line(options, name, why))]
    if isinstance(options, SafetyOptions):  # what it does is not our default
        if options.relative_error:
            lines.append("relative_error has NO effect: sd-scripts' LECO counts plain errors")
        if not options.on_policy:
            lines.append("a pool is NOT used: sd-scripts' LECO draws anew in every step")
    return lines


def unused_by_embedded(options: SafetyOptions) -> list[str]:
    """The same of what our own erasure does not read and sd-scripts' does."""
    line = _line(options, "min_snr_gamma", "an erasure weighs noise levels by relative_error, or all alike")
    return [line] if line else []


def _line(options: Options, name: str, why: str) -> str:
    default = next(f.default for f in dataclasses.fields(options) if f.name == name)
    value = getattr(options, name)
    return "" if value == default else f"{name} {_shown(value)} has NO effect: {why}"


def _shown(value: object) -> str:
    return f"({len(value)})" if isinstance(value, tuple) else f"{value!r}"


def _of_all(options: Options) -> Iterator[tuple[str, str]]:
    if not options.sample_every_n_steps:
        yield from ((name, "sample_every_n_steps is 0") for name in PREVIEWS)
    if options.sample_every_n_steps > options.max_train_steps:
        yield "sample_every_n_steps", f"there are {options.max_train_steps} steps"
    if options.save_every_n_steps >= options.max_train_steps:
        yield "save_every_n_steps", f"there are {options.max_train_steps} steps, and their end is saved anyway"
    yield from _of_adapters(options)
    if options.lr_scheduler != "cosine_with_restarts":
        yield "lr_scheduler_num_cycles", f"lr_scheduler is {options.lr_scheduler}"
    if options.lr_scheduler != "polynomial":
        yield "lr_scheduler_power", f"lr_scheduler is {options.lr_scheduler}"
    if options.lr_scheduler not in ("cosine_with_min_lr", "warmup_stable_decay"):
        yield "lr_scheduler_min_lr_ratio", f"lr_scheduler is {options.lr_scheduler}"
    if options.lr_scheduler != "warmup_stable_decay":
        yield "lr_decay_steps", f"lr_scheduler is {options.lr_scheduler}"
    if options.lr_scheduler != "inverse_sqrt":
        yield "lr_scheduler_timescale", f"lr_scheduler is {options.lr_scheduler}"


def _of_adapters(options: Options) -> Iterator[tuple[str, str]]:
    if options.target != "conv":
        yield from ((name, "target is not conv") for name in ("conv_dim", "conv_alpha", "use_tucker"))
    if options.algo == "diag-oft":
        yield from ((name, "a rotation is not scaled") for name in ("network_alpha", "conv_alpha"))
    if options.algo != "lokr":
        yield from ((name, f"algo is {options.algo}") for name in ("factor", "decompose_both"))


def _of_task(options: TaskOptions, regularisation: int | None) -> Iterator[tuple[str, str]]:
    if not options.network_train_text_encoder:
        yield "text_encoder_lr", "network_train_text_encoder is off"
    if options.timestep_density != "logit_normal":
        yield from ((name, "timestep_density is not logit_normal") for name in ("density_mean", "density_deviation"))
    if options.loss_type not in ("huber", "smooth_l1"):
        yield from ((name, f"loss_type is {options.loss_type}") for name in HUBER)
    elif options.huber_schedule == "snr":
        yield "huber_scale", "huber_schedule is snr"
    if not options.multires_noise_iterations:
        yield "multires_noise_discount", "multires_noise_iterations is 0"
    if not options.validation_split and not options.dataset_config:
        yield from ((name, "validation_split is 0") for name in ("validation_seed", "validate_every_n_steps"))
    if not options.clip_frames and not options.dataset_config:
        yield "clip_extraction", "clip_frames is 0"
    if regularisation == 0:
        yield "prior_loss_weight", "the data set has no regularisation images"
    if not options.dataset_config and not options.shuffle_caption:
        yield "keep_tokens", "shuffle_caption is off"
    if not (options.safety_lora and options.sample_every_n_steps):
        yield "safety_strength", "it is the strength in previews, and none show a safety LoRA"


def _of_safety(options: SafetyOptions) -> Iterator[tuple[str, str]]:
    if options.objective == "sdd":
        yield "negative_guidance", "sdd pulls to the model's own answer, without guidance"
    if not options.robust_steps:
        yield "robust_size", "robust_steps is 0"
    if not options.preserve_weight:
        yield "preserve", "preserve_weight is 0"
    if options.objective in ("esd-x", "sdd") and options.target != "cross-attention":
        yield "target", f"{options.objective} trains cross-attention alone"
    if options.on_policy:
        yield from ((name, "on_policy draws without a pool") for name in ("pool_size", "pool_refresh_every"))
    elif options.pool_refresh_every >= options.max_train_steps:
        yield "pool_refresh_every", f"there are {options.max_train_steps} steps"
