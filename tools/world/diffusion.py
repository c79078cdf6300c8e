"""Noise schedule and sampler of the demo world: SD1.5's scaled-linear betas, eps-prediction, Euler steps.

Latents are [n, 4, 8, 8]. sigma = sqrt((1 - abar) / abar); the sampler walks x = z + sigma eps as stock KSampler does
with sampler "euler" and scheduler "simple".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64).square()
ALPHA_BAR = torch.cumprod(1 - BETAS, 0).float()  # [1000]
SIGMAS = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()  # [1000]

Denoiser = Callable[[Tensor, Tensor], Tensor]


def add_noise(z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps for timesteps t [n]."""
    abar = ALPHA_BAR[t][:, None, None, None]
    return abar.sqrt() * z + (1 - abar).sqrt() * eps


def timesteps(steps: int) -> list[int]:
    """Descending timesteps of the "simple" scheduler: 999, 949, ... for 20 steps."""
    return [STEPS - 1 - int(i * STEPS / steps) for i in range(steps)]


@torch.no_grad()
def sample(
    predict: Denoiser, noise: Tensor, steps: int = 20, start: Tensor | None = None, denoise: float = 1.0
) -> Tensor:
    """Euler sampling of z from unit noise [n, 4, 8, 8]; from a latent ``start``, by the end of a longer schedule."""
    grid = timesteps(int(steps / denoise))[-steps:]
    x = noise * (1 + SIGMAS[grid[0]] ** 2).sqrt() if start is None else start + noise * SIGMAS[grid[0]]
    for i, t in enumerate(grid):
        sigma, following = SIGMAS[t], SIGMAS[grid[i + 1]] if i + 1 < steps else torch.tensor(0.0)
        x_t = x / (1 + sigma**2).sqrt()
        x = x + predict(x_t, torch.full((len(x),), t)) * (following - sigma)
    return x
