"""The validation loss: the training's own loss on images that it does not see, always at the same noise.

Every image is taken at `LEVELS` places of the model's table of noise levels, evenly between its ends (sd-scripts' 200,
400, 600 and 800 of 1000), with noise, crop and caption that never change: two values differ by the weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..data import captions
from ..data.batches import Draw
from ..data.dataset import DatasetReport
from ..seeds import role_seed, step_generator
from .denoising import Denoising

LEVELS = 4


@dataclass(frozen=True, eq=False)
class Validation:
    """The images that ``report`` holds out, at `LEVELS` levels each."""

    loss: Denoising
    report: DatasetReport
    check: Callable[[], None]  # asked before every batch; may raise to interrupt

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over images and levels, on the weights as they are."""
        seed, size = self.loss.options.validation_seed, self.loss.options.train_batch_size
        found: list[tuple[float, int]] = []
        for number, draw in enumerate(self.draws()):
            for levels in self._levels().split(size):
                self.check()
                generator = step_generator(seed, "validation", number, int(levels[0]))
                loss = self.loss.at([draw] * len(levels), levels, generator)
                found.append((loss.item(), len(levels)))
        return sum(loss * rows for loss, rows in found) / sum(rows for _, rows in found)

    def draws(self) -> Iterator[Draw]:
        """One of each image: unflipped, with its whole caption, tags in their order."""
        first = len(self.report.images)
        for i, image in enumerate(self.report.held_out):
            rng = random.Random(role_seed(self.loss.options.validation_seed, f"caption:{i}"))
            text = captions.draw(image.caption, captions.settled(image.subset.rules), rng)
            yield Draw(first + i, False, text, 1.0)

    def _levels(self) -> torch.Tensor:
        total = len(self.loss.host_model.schedule)
        return torch.tensor([total * k // (LEVELS + 1) for k in range(1, LEVELS + 1)])
