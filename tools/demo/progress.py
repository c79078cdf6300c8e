"""One line of progress for a graph in which every sampler takes the same number of steps."""

from __future__ import annotations

import time

from ..bootstrap.console import status
from .client import Event

WIDTH = 24
SAMPLER = "sampler-"


class Progress:
    """Call it with the client's events; `done` leaves the final line."""

    def __init__(self, title: str, samplers: int, steps: int) -> None:
        self.title, self.samplers, self.steps = title, samplers, steps
        self.began = time.monotonic()
        self._taken: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        if event.node.startswith(SAMPLER):
            taken = min(event.value, self.steps)
            self._taken[event.node] = max(taken, self._taken.get(event.node, 0))
        self._show()

    @property
    def fraction(self) -> float:
        return min(1.0, sum(self._taken.values()) / max(1, self.samplers * self.steps))

    def _show(self) -> None:
        filled = round(self.fraction * WIDTH)
        bar = "█" * filled + "·" * (WIDTH - filled)
        status(f"  {self.title:<12} {bar} {self.fraction:4.0%}  {time.monotonic() - self.began:.0f} s")

    def done(self) -> float:
        seconds = time.monotonic() - self.began
        status(f"  {self.title:<12} {self.samplers} images in {seconds:.1f} s", final=True)
        return seconds
