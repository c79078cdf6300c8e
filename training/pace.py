"""How fast a training goes, and how its loss has gone so far, in words and marks for a line of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

MARKS = "▁▂▃▄▅▆▇█"


class Pace:
    """Seconds a step and until the end, from the steps of this process; previews and saving count as they come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[int, float] | None = None  # the first step that was seen done, and when

    def __call__(self, step: int, total: int) -> str:
        """That ``step`` of ``total`` steps are done; "" for the first one, whose beginning is not known."""
        now = self._clock()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return ""
        each = (now - self._first[1]) / (step - self._first[0])
        return f"{spoken(each)} a step, {spoken(each * (total - step))} left"


def spoken(seconds: float) -> str:
    """A duration in the two units that matter: 0.42 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def curve(losses: Sequence[float], width: int = 30) -> str:
    """The course of the losses as a row of marks, the mean of an even share of the steps each, from the least up."""
    count = min(width, len(losses))
    cuts = [round(i * len(losses) / count) for i in range(count + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(cuts)]
    least, most = min(means), max(means)
    height = (most - least) or 1.0
    return "".join(MARKS[round((mean - least) / height * (len(MARKS) - 1))] for mean in means)
