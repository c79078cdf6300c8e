"""Safety first (modular_lora/guard/safety_first.py) around ComfyUI's sampling: g is found first, then every evaluation
lets the task LoRAs of each image act at its share.

Wrappers of a guarded patcher. What is found of a prompt goes with the prompt and not with the run: it is evaluated from
noise alone, at the noisiest level, with a noise of its own, as a calibration is, wherever the run starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..modular_lora.branches.attachment import Branches, attached
from ..modular_lora.guard import safety_first
from .measurement import evaluation_rows
from .run import forget

SEED = 0x5AFE  # of the noise
NEGATIVE = ("negative", "empty_negative_prompt")  # conditionings of a guider that are no prompt (PerpNeg's are three)
# of a conditioning: when it acts, LoRA hooks, and that it fills up what others leave
LEFT_OUT = ("timestep_start", "timestep_end", "hooks", "default")


def found_first(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """Around a sampler (wrapper SAMPLER_SAMPLE): finds g of every image before its first evaluation."""
    patcher = guider.model_patcher
    run = getattr(patcher, "guard_run", None)
    if run is not None and patcher.branches.gives_way and len(sigmas) > 1:
        with_tasks = any(lora.role == "task" for lora in patcher.guard_state.record.loras)
        if with_tasks or getattr(patcher, "guard_hooked", None):
            run.restart(_found(guider, patcher, noise, extra_args["model_options"]))
            forget(patcher.model)
        else:
            run.set_shares((1.0,) * len(noise))
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _found(guider, patcher, noise: Tensor, options: dict) -> tuple[float, ...]:
    """g of every image, of the guider's conditionings but the negative ones; the task LoRAs do not act yet.

    A conditioning counts whenever it acts in the run, and wherever in the image.
    """
    network, meter, images = guider.inner_model, patcher.branches.meter, len(noise)
    files = [lora for lora, _ in patcher.guard_state.part.interference]
    known = safety_first.calibrations(patcher.guard_state.record, files)
    own = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(SEED))
    own = own.to(noise).expand_as(noise).contiguous()
    sigmas = torch.full((images,), float(network.model_sampling.sigma_max), device=noise.device)
    x = network.model_sampling.noise_scaling(sigmas, own, torch.zeros_like(own), True)
    measured = []
    for entry in (one for name, some in guider.conds.items() if name not in NEGATIVE for one in some):
        alone = {key: value for key, value in entry.items() if key not in LEFT_OUT}
        meter.start(partial(evaluation_rows, images), prompt=0)
        comfy.samplers.calc_cond_batch(network, [[alone]], x, sigmas, options)
        measured.append(meter.finish(images))
    return safety_first.shares(known, measured, images)


def at_their_shares(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """An evaluation of images that have several g: once for each of these, and of each the rows that have it.

    Around BaseModel._apply_model (APPLY_MODEL). A row without an image of its own has the least g of all.
    """
    options = transformer_options or {}
    branches = attached(executor.class_obj)
    if branches is None or branches.image_shares is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    shares = branches.image_shares
    rows = evaluation_rows(len(shares), (x,), {"transformer_options": options})
    each = [shares[number] if number < len(shares) else min(shares) for _, number in rows]
    several, made = sorted(set(each)), None
    for share in several:
        some = [place for place, one in enumerate(each) if one == share]
        images = frozenset(rows[place][1] for place in some) if len(several) > 1 else None
        with _acting_at(branches, share, images):
            output = executor(x, t, c_concat, c_crossattn, _anew(control), dict(options), **kwargs)
        made = output if made is None else _with_rows(made, output, some)
    return made


def _with_rows(made: Tensor, other: Tensor, rows: list[int]) -> Tensor:
    """``made`` with these rows of ``other``."""
    made = made.clone()
    made[rows] = other[rows]
    return made


@contextmanager
def _acting_at(branches: Branches, share: float, images: frozenset[int] | None) -> Iterator[None]:
    branches.task_share, branches.meter.images = share, images
    try:
        yield
    finally:
        branches.task_share, branches.meter.images = 0.0, None


def _anew(value: Any) -> Any:
    """Dicts and lists of their own: a model takes what a ControlNet gave it out of them."""
    if isinstance(value, Mapping):
        return {key: _anew(one) for key, one in value.items()}
    return [_anew(one) for one in value] if isinstance(value, list) else value
