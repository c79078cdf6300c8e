"""Which images, mirrored or not, with which captions, make the batch of a step: a function of seed and step.

A training that is resumed asks for the next step; there is no state to save.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from ..seeds import role_seed
from . import captions
from .config import DatasetConfig, DatasetError
from .dataset import DatasetReport, grouped


@dataclass(frozen=True)
class Draw:
    """One image of a batch."""

    image: int  # index into DatasetReport.images
    flipped: bool
    caption: str
    weight: float  # of its loss: 1, or prior_loss_weight of a regularisation image


@dataclass(frozen=True)
class Plan:
    """Every epoch draws each image ``TrainingImage.draws`` times; a batch holds images of one bucket of one data set,
    or clips of one bucket and number of frames.

    Buckets are shuffled, cut into batches (the last of a bucket may be smaller), and the batches shuffled, anew in
    every epoch. ``accumulation`` micro-batches are an optimizer step; token warm-up counts these.
    """

    config: DatasetConfig
    report: DatasetReport
    seed: int
    prior_loss_weight: float = 1.0
    max_train_steps: int = 0
    accumulation: int = 1
    _orders: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.report.problems:
            raise DatasetError(self.report.problems[0], code="dataset.not-usable")

    def batch(self, step: int, micro: int = 0) -> tuple[Draw, ...]:
        """Images of an optimizer step's micro-batch, both from 0."""
        epoch, position = divmod(step * self.accumulation + micro, self.report.batches)
        rng = self._rng("draw", epoch, position)
        return tuple(self._draw(index, rng, epoch, step) for index in self._batches(epoch)[position])

    def largest(self) -> tuple[Draw, ...]:
        """The batch that has most pixels: of images and clips, or of buckets of several sizes, batches differ much."""
        groups = [rows[:size] for size, rows in grouped(self.config, self.report.images)]
        rows = max(groups, key=lambda rows: len(rows) * math.prod(self.report.images[rows[0]].bucket))
        rng = self._rng("largest")
        return tuple(self._draw(index, rng, 0, 0) for index in rows)

    def fixed_captions(self) -> list[str] | None:
        """Every caption that will be drawn, each once; None where draws differ."""
        rules = [image.subset.rules for image in self.report.images]
        if any(captions.varies(rule) for rule in rules):
            return None
        drawn = (self._draw(i, self._rng("caption"), 0, 0).caption for i in range(len(rules)))
        return list(dict.fromkeys(drawn))

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._orders:
            self._orders.clear()  # one epoch at a time
            self._orders[epoch] = self._order(epoch)
        return self._orders[epoch]

    def _order(self, epoch: int) -> list[list[int]]:
        rng, batches = self._rng("order", epoch), []
        for size, rows in grouped(self.config, self.report.images):
            rng.shuffle(rows)
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(batches)
        return batches

    def _draw(self, index: int, rng: random.Random, epoch: int, step: int) -> Draw:
        image = self.report.images[index]
        flipped = image.subset.flip_aug and rng.random() < 0.5
        caption = captions.draw(
            image.caption,
            image.subset.rules,
            rng,
            epoch=epoch,
            step=step,
            max_train_steps=self.max_train_steps,
        )
        return Draw(index, flipped, caption, self.prior_loss_weight if image.is_reg else 1.0)

    def _rng(self, *what: object) -> random.Random:
        return random.Random(role_seed(self.seed, ":".join(map(str, ("data", *what)))))
