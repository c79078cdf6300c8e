"""Whether what a run starts from as noise is noise: a picture may be handed on in its place.

White noise has independent values: whatever is averaged over squares (of a video, cubes) of s values a side has a
variance of σ²/s^d, and neighbours have no correlation, at every scale. A picture that could be seen in the noise has
large parts that are alike, and is told by one of these. Amplitude and mean say nothing and are free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMAS = 6.0  # how far from what is expected a figure of white noise may be: one in 10⁹
LEAST = 64  # values from which a figure is taken
PEAK = 9.0  # greatest value, in standard deviations


def is_white(noise: Tensor) -> bool:
    """Whether one latent's noise (c ..., of any number of places) is white, or nothing at all.

    Example:
        >>> is_white(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)))
        True
        >>> is_white(torch.linspace(-1, 1, 64).expand(4, 64, 64))
        False
    """
    values = noise.detach().to("cpu", torch.float64)
    if values.ndim < 2 or not torch.count_nonzero(values):
        return not torch.count_nonzero(values)
    if not torch.isfinite(values).all():
        return False
    values = values - values.mean()
    variance, d, scale = values.square().mean().item(), values.ndim - 1, 1
    if not variance or values.abs().max().item() > PEAK * math.sqrt(variance):
        return False
    while values.numel() >= LEAST:
        found = values.square().mean().item()
        if scale > 1 and found * scale**d > variance * _most(values.numel()):
            return False
        if any(abs(r) * math.sqrt(n) > SIGMAS for r, n in _neighbours(values, found)):
            return False
        if min(values.shape[1:]) < 2:
            break
        values, scale = _halved(values), 2 * scale
    return True


def _most(count: int) -> float:
    """The SIGMAS quantile of a mean of so many squares of unit variance (Wilson and Hilferty's for chi-squared)."""
    part = 2 / (9 * count)
    return (1 - part + SIGMAS * math.sqrt(part)) ** 3


def _neighbours(values: Tensor, variance: float) -> list[tuple[float, int]]:
    """The correlation of neighbours along every dimension, and how many pairs it is of."""
    found = []
    for dim in range(1, values.ndim):
        size = values.shape[dim]
        products = values.narrow(dim, 0, size - 1) * values.narrow(dim, 1, size - 1) if size > 1 else values[:0]
        if products.numel() >= LEAST and variance:
            found.append((products.mean().item() / variance, products.numel()))
    return found


def _halved(values: Tensor) -> Tensor:
    """Means of two along every dimension but the first; an odd last one is left out."""
    for dim in range(1, values.ndim):
        half = values.shape[dim] // 2
        values = values.narrow(dim, 0, 2 * half).unflatten(dim, (half, 2)).mean(dim + 1)
    return values
