"""Deterministic DDIM (arXiv 2010.02502, eq. 12, σ = 0) under classifier-free guidance, whole or stopped on the way.

x_s = a_s x̂_0 + s_s ε̂ for s < t, with a and s of model.py, F̂ = F(x_t, ∅) + g (F(x_t, c) − F(x_t, ∅)) (arXiv 2207.12598),
and x̂_0, ε̂ what F̂ amounts to at x_t. With a = √ᾱ, s = √(1−ᾱ) that is DDIM; with a = 1−σ, s = σ it is Euler's step of
the flow, x_t + (σ_s − σ_t) v̂. Guidance of ε, v and velocity is the same thing, since each is affine in the others at a
given x_t. The formula holds for any s < t, so a walk may end between two of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Cond, HostModel, Schedule

Network = Callable[[Tensor, Tensor, Cond], Tensor]  # HostModel.predict, or something that counts its calls
END = -1  # the "timestep" of x_0, where ᾱ = 1


@dataclass(frozen=True, eq=False)
class Point:
    """Where a walk is, and what the network says there."""

    x_t: Tensor  # b c ...
    t: Tensor  # b
    cond: Tensor  # b c ..., prediction for the prompt
    empty: Tensor | None  # b c ..., for the empty prompt; None at guidance 1, where nobody asked


def timesteps(total: int, steps: int) -> list[int]:
    """``steps`` evenly spaced timesteps, descending from total − 1 ("trailing", arXiv 2305.08891, table 2).

    The public codes of ESD and LECO count from the clean end (981, 961, ... of 1000), so that their LoRAs never see
    t > 981; ComfyUI's samplers begin at 999, where much of the image is decided.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps: the schedule has {total} timesteps, choose 1 to {total}.")
    return [total - 1 - i * total // steps for i in range(steps)]


def noise(host_model: HostModel, size: tuple[int, int], generators: list[torch.Generator]) -> Tensor:
    """One x_T (b c ..., float32) a CPU generator, for images of ``size`` = (height, width) pixels."""
    drawn = torch.stack([torch.randn(host_model.latent_shape(*size), generator=g) for g in generators])
    return (host_model.schedule.start * drawn).to(host_model.device)


def step(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """x at timesteps ``to`` (b, int64; ``END``: x_0) of x_t (b c ...) at timesteps t (b) and its prediction."""
    x0, eps = schedule.to_x0_eps(prediction, x_t, t)
    moved = schedule.add_noise(x0, to.clamp(min=0), eps)
    return torch.where((to < 0).view(-1, *[1] * (x0.dim() - 1)), x0, moved)


def predict(
    network: Network, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond | None, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """Predictions (b c ...) for the prompts and, unless ``guidance`` is 1 or ``empty`` None, for the empty prompt."""
    if guidance == 1 or empty is None:
        return network(x_t, t, cond), None
    both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, empty]))  # 2b c ...
    return both[: len(t)], both[len(t) :]


def guided(cond: Tensor, empty: Tensor | None, guidance: float) -> Tensor:
    """ε(∅) + g (ε(c) − ε(∅)), or the prediction for the prompt where there is no other."""
    return cond if empty is None else empty + guidance * (cond - empty)


def walk(
    network: Network, schedule: Schedule, x_t: Tensor, cond: Cond, empty: Cond | None, guidance: float, steps: int
) -> Iterator[Point]:
    """All ``steps`` points of a sampling walk from noise x_T (b c ...), each before it is left; without gradients."""
    grid = timesteps(len(schedule), steps)
    for i, now in enumerate(grid):
        t = torch.full((len(x_t),), now, device=x_t.device)
        with torch.no_grad():
            point = Point(x_t, t, *predict(network, x_t, t, cond, empty, guidance))
        yield point
        if i + 1 < steps:
            x_t = step(schedule, guided(point.cond, point.empty, guidance), x_t, t, torch.full_like(t, grid[i + 1]))


@torch.no_grad()
def partial(
    network: Network,
    schedule: Schedule,
    x_t: Tensor,
    cond: Cond,
    empty: Cond | None,
    guidance: float,
    steps: int,
    until: Tensor,
) -> Tensor:
    """x (b c ...) at timesteps ``until`` (b, int64), each row walked from noise x_T on the grid of ``steps`` steps.

    A row lands on its own timestep, on the grid or between; rows that have arrived cost nothing more.
    """
    grid = timesteps(len(schedule), steps)
    x_t = x_t.clone()
    for now, following in zip(grid, [*grid[1:], END], strict=True):
        rows = (until < now).nonzero()[:, 0]
        if not len(rows):
            break
        x, t, unconditional = x_t[rows], torch.full_like(rows, now), None if empty is None else empty[rows]
        prediction = guided(*predict(network, x, t, cond[rows], unconditional, guidance), guidance)
        x_t[rows] = step(schedule, prediction, x, t, until[rows].clamp(min=following))
    return x_t


def sample(
    network: Network, schedule: Schedule, x_t: Tensor, cond: Cond, empty: Cond | None, guidance: float, steps: int
) -> Tensor:
    """x_0 (b c ...) from noise x_T (b c ...), in steps × b network rows at guidance 1, else twice as many."""
    until = torch.full((len(x_t),), END, device=x_t.device)
    return partial(network, schedule, x_t, cond, empty, guidance, steps, until)
