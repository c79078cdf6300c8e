"""What the demo world's trainings share: the schedule of the learning rate, an optimizer step, how a command begins."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor


def begin(threads: int) -> None:
    """Show the log with its times, and use so many CPU threads."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)


def rate(step: int, done: float, warmup: int, least: float = 0.02) -> float:
    """The factor of the learning rate: linear over ``warmup`` steps, then a cosine down to ``least``.

    Args:
        done: Share of the training that is behind, 0..1.
    """
    return min(1.0, (step + 1) / warmup) * (least + (1 - least) / 2 * (1 + math.cos(math.pi * done)))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float = 1.0) -> None:
    """One step down ``loss`` at this learning rate, with the gradients' norm at most ``clip``."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
