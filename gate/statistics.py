"""Counted rates and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """k of n with an interval: Wilson's over images, or the bootstrap's over concepts and training seeds."""

    k: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.k / self.n if self.n else float("nan")


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the rate k / n (Wilson 1927); (0, 1) where nothing was counted."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n}: cannot be counted")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(first: Rate, second: Rate) -> tuple[float, float]:
    """95 % interval of a difference of rates from their Wilson intervals (Newcombe 1998, method 10)."""
    by, (a, b) = first.rate - second.rate, (first, second)
    low, high = (a.rate - a.low, b.high - b.rate), (a.high - a.rate, b.rate - b.low)
    return by - math.hypot(*low), by + math.hypot(*high)
