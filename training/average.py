"""A running mean of weights, kept in float32 (arXiv 1703.01780): what SDD's teacher is, and what ema_decay saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Average:
    """θ' ← d θ' + (1 − d) θ after every step; starts as θ."""

    def __init__(self, parameters: Sequence[Tensor], decay: float, *, warm: bool = False) -> None:
        """``warm``: d of the n-th step is at most (1 + n) / (10 + n), so that a short training's mean is not its start.

        That warm-up is the one of diffusers' EMAModel and OneTrainer.
        """
        self.parameters, self.decay, self.warm = list(parameters), decay, warm
        self.values = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, values: Sequence[Tensor] | None = None, step: int = 0) -> None:
        """``values``: float32 ones that stand behind parameters in half precision; ``step``: how many are done."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm else self.decay
        torch._foreach_lerp_(self.values, [v.detach() for v in values or self.parameters], 1 - decay)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The parameters are the averaged ones inside."""
        own = [p.data for p in self.parameters]
        try:
            for p, value in zip(self.parameters, self.values, strict=True):
                p.data = value.to(p.dtype)
            yield
        finally:
            for p, value in zip(self.parameters, own, strict=True):
                p.data = value
