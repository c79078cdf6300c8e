"""What the guard's measurement of a run (modular_lora/branches/acted.py) asks of ComfyUI."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from comfy.model_base import BaseModel

from ..modular_lora.branches.acted import EVERY, Rows
from ..modular_lora.branches.attachment import attached


def evaluation_rows(images: int, args: tuple, kwargs: dict) -> Rows:
    """Which conditioning and image every row of a diffusion model's batch belongs to.

    ComfyUI evaluates several conditionings as one batch, each with all images, and says which in
    ``transformer_options["cond_or_uncond"]`` (samplers._calc_cond_batch). Where that is
    not ``images`` a conditioning (windows of a video), every row is of every image.
    """
    x = args[0] if args else kwargs["x"]
    x = x[0] if isinstance(x, list | tuple) else x  # several latents that are sampled as one
    conditionings = (kwargs.get("transformer_options") or {}).get("cond_or_uncond") or [0]
    rows, rest = divmod(len(x), len(conditionings))
    if rest:
        return tuple((conditionings[0], EVERY) for _ in range(len(x)))
    return tuple((index, row if rows == images else EVERY) for index in conditionings for row in range(rows))


def prompt_of(conds: Mapping[str, list]) -> int | None:
    """The number of the conditioning that is the prompt, as a guider's evaluations count them.

    CFGGuider, BasicGuider and PerpNeg evaluate the positive conditioning first; a guider with a third one between two
    (DualCFGGuider) does not, and of it nothing is said.
    """
    return 0 if "positive" in conds and "middle" not in conds else None


def level(model: BaseModel, sigma: torch.Tensor) -> float | None:
    """A noise level (one number) as a share of the model's timesteps, 1 at the noisiest; None where they have none."""
    sampling = model.model_sampling
    most = torch.as_tensor(sampling.sigma_max).reshape(1)
    top, here = (float(sampling.timestep(value.reshape(1))) for value in (most, sigma.to(most)))
    return here / top if top > 0 else None


def measured_eagerly(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """An evaluation that is to be measured does not go through what torch.compile made.

    Around BaseModel._apply_model (APPLY_MODEL); nothing is compiled or dropped for it.
    """
    options = transformer_options or {}
    call = lambda: executor(x, t, c_concat, c_crossattn, control, options, **kwargs)  # noqa: E731
    branches = attached(executor.class_obj)
    if branches is None or "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return call()
    meter, one = branches.meter, ("diffusion_model", (x,), {"transformer_options": options})
    if not meter.running:
        return call()
    if meter.due(*one):
        with torch.compiler.set_stance("force_eager"):
            return call()
    before = meter.seen(*one)
    output = call()
    if meter.seen(*one) == before:  # it ran compiled
        meter.passed(*one)
    return output
