"""Side-by-side timing: contenders take turns on the same work, round by round, until the ratios are known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Limits:
    """When rounds end: all half-widths below ``wanted``, or after ``rounds``, or before one more than ``seconds``."""

    wanted: float = 0.01
    least: int = 5
    rounds: int = 40
    seconds: float = 120.0


@dataclass(frozen=True)
class Contender:
    """``ready`` is entered untimed; then one call of ``work`` that warms its memory up and one that is timed."""

    ready: Callable[[], AbstractContextManager]
    work: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every round: of the processor over all threads, and by the clock."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, its 95 % bootstrap interval over rounds, and the same by the clock."""

    value: float
    low: float
    high: float
    wall: float
    rounds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def row(self) -> dict[str, object]:
        """For docs/figures/speed.json."""
        interval = [_short(self.low), _short(self.high)]
        return {"ratio": _short(self.value), "interval": interval, "wall": _short(self.wall), "rounds": self.rounds}


def measure(
    contenders: Mapping[str, Contender], pairs: Sequence[tuple[str, str]], limits: Limits, warm: bool = False
) -> dict[str, Timing]:
    """Times of all contenders; every other round goes the other way round, so that a drift cancels.

    ``pairs``: the (numerator, denominator) whose ratios decide when it is enough.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    for done in range(limits.rounds):
        order = list(contenders) if done % 2 == 0 else list(reversed(contenders))
        for name in order:
            times[name].append(_turn(contenders[name], warm))
        found = {name: Timing(*zip(*rows, strict=True)) for name, rows in times.items()}
        spent = time.perf_counter() - begun
        if done + 1 >= limits.least and all(ratio(found[a], found[b]).half_width < limits.wanted for a, b in pairs):
            break
        if spent * (done + 2) / (done + 1) > limits.seconds:
            break
    return found


def _turn(contender: Contender, warm: bool) -> tuple[float, float]:
    with contender.ready():
        if warm:
            contender.work()
        _wait()
        wall, cpu = time.perf_counter(), time.process_time()
        contender.work()
        _wait()
        return time.process_time() - cpu, time.perf_counter() - wall


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(a: Timing, b: Timing, by_clock: bool = False) -> Ratio:
    """a / b. On a GPU (``by_clock``) the processor's time says nothing of the work."""
    cpu, wall = _quotients(a.cpu, b.cpu), _quotients(a.wall, b.wall)
    values = np.array(wall if by_clock else cpu)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high), statistics.median(wall), len(values))


def _quotients(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
