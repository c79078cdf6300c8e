"""How far a prediction is from its target, and how much that counts at each noise level.

With e = F_θ − F, element by element, and c_t the place where a smooth error turns from square to straight:

| loss_type | error |
|---|---|
| l2 | e² |
| l1 | abs(e) |
| huber | 2 c_t (√(e² + c_t²) − c_t): e² near zero, 2 c_t abs(e) far from it |
| smooth_l1 | 2 (√(e² + c_t²) − c_t): e² / c_t near zero, 2 abs(e) far from it |

| huber_schedule | c_t |
|---|---|
| constant | scale · c |
| exponential | scale · c^(place of t in the table, from 0 to 1; of flow matching σ) |
| snr | (1 − c) / (1 + s_t / a_t)² + c: 1 at a clean image, c in noise alone |

These are sd-scripts' forms (its options' names too), after arXiv 2403.16728. Weights of a level: min-SNR (model.py), or
debiased estimation, 1 / √SNR of ε (arXiv 2310.08442) and, as sd-scripts has it, 1 / (SNR + 1) of v, with SNR at
most `MOST`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import HostModel, Schedule
from ..options import OptionError, TaskOptions

MOST = 1000.0  # SNR that debiased estimation counts


def check(options: TaskOptions, host_model: HostModel) -> None:
    """OptionError for a weighting that is not defined for what this model's network says."""
    schedule = host_model.schedule
    if options.debiased_estimation_loss and not (schedule.prediction == "epsilon" or _says_v(schedule)):
        said = "a velocity" if schedule.prediction == "velocity" else "neither ε nor v"
        raise OptionError(
            f"debiased_estimation_loss: is defined for networks that say ε or v, and {host_model.family} says {said}: "
            "leave it out; min_snr_gamma works for every family.",
            code="option.loss",
        )


def errors(prediction: Tensor, target: Tensor, t: Tensor, schedule: Schedule, options: TaskOptions) -> Tensor:
    """The error of every element (b c ...) of predictions at timesteps t (b)."""
    e = prediction - target
    if options.loss_type == "l2":
        return e.square()
    if options.loss_type == "l1":
        return e.abs()
    c = thresholds(schedule, t, options).view(-1, *[1] * (e.dim() - 1))
    smooth = 2 * ((e.square() + c.square()).sqrt() - c)
    return c * smooth if options.loss_type == "huber" else smooth


def thresholds(schedule: Schedule, t: Tensor, options: TaskOptions) -> Tensor:
    """c_t (b) of timesteps t (b)."""
    c, scale = options.huber_c, options.huber_scale
    if options.huber_schedule == "constant":
        return torch.full((len(t),), c * scale, device=t.device)
    if options.huber_schedule == "exponential":
        place = schedule.noise.to(t.device)[t] if schedule.prediction == "velocity" else t / len(schedule)
        return scale * c**place
    ratio = schedule.noise.to(t.device)[t] / schedule.signal.to(t.device)[t]  # ∞ where nothing is left of the image
    return (1 - c) / (1 + ratio).square() + c


def weights(schedule: Schedule, t: Tensor, options: TaskOptions) -> Tensor:
    """What a row's error counts (b) at timesteps t (b)."""
    if not options.debiased_estimation_loss:
        return schedule.min_snr(t, options.min_snr_gamma)
    snr = schedule.snr(t).clamp(max=MOST)
    return snr.rsqrt() if schedule.prediction == "epsilon" else 1 / (snr + 1)


def _says_v(schedule: Schedule) -> bool:
    """F = a ε − s x_0, or its negative; EDM's networks say something else unless the data's deviation is 1."""
    pairs = ((schedule.said_of_noise, schedule.signal), (schedule.said_of_x0, -schedule.noise))
    return any(all(torch.allclose(sign * a, b, rtol=1e-3, atol=1e-3) for a, b in pairs) for sign in (1, -1))
