"""What a training shows on its node: progress bar, loss curve, previews; and ComfyUI's interrupt button."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..training.pace import Pace
from ..training.stopping import unwound
from .charts import below, chart, rows_of_images
from .node_report import leave, show_progress
from .training_files import newest_state

logger = logging.getLogger("modular_lora")
WIDTH, HEIGHT = 640, 360
RAW, SMOOTH, HELD_OUT = "#becde1", "#285aaa", "#c8641e"
SECONDS = 2.0  # between two pictures


class NodeWatch:
    """See training.loop.Watch."""

    def __init__(self, node: type[io.ComfyNode]):
        self.node, self._shown, self._said = node, 0.0, ""
        self.images: list[Path] = []
        self.without: Sequence[Path] = ()
        self._bar, self._pace = comfy.utils.ProgressBar(1), Pace()
        self._losses: Sequence[float] = ()
        self._validation: list[tuple[int, float]] = []
        self._previews: Image.Image | None = None  # the newest ones

    def check(self) -> None:
        """Raises ComfyUI's InterruptProcessingException."""
        comfy.model_management.throw_exception_if_processing_interrupted()

    def stage(self, text: str, done: int, total: int) -> None:
        self.check()
        self._bar.update_absolute(done, total)
        if self._due() or done == total:
            self._show(f"{text}: {done} of {total}")

    def read(self, done: int, total: int) -> None:
        self.stage("reading images", done, total)

    def step(self, step: int, total: int, losses: list[float]) -> None:
        pace, self._losses = self._pace(step, total), losses
        if self._due() or step == total:
            said = f"step {step} of {total}, loss {smoothed(losses)[-1]:.4f}"
            self._show(", ".join(filter(None, (said, pace))))
            self._draw(step, total)
        else:
            self._bar.update_absolute(step, total)

    def validated(self, losses: list[tuple[int, float]]) -> None:
        """Drawn into the loss curve."""
        self._validation = list(losses)

    def sample(self, step: int, images: list[Path], without: Sequence[Path] = ()) -> None:
        self.images, self.without = images, without or self.without
        if images:
            label = f"step {step}" + ", with the safety LoRA" * bool(self.without)
            rows = [(label, [_opened(path) for path in images])]
            if self.without:
                rows.append(("without the safety LoRA", [_opened(path) for path in self.without]))
            self._previews = rows_of_images(WIDTH, rows)
            self._draw(step, None)
        self._shown = time.monotonic()

    def _draw(self, step: int, total: int | None) -> None:
        """The loss curve, and below it the newest previews, on the node."""
        picture = loss_curve(self._losses, self._validation)
        if self._previews is not None:
            picture = below(picture, self._previews)
        self._bar.update_absolute(step, total, ("JPEG", picture, max(picture.size)))

    def say(self, text: str) -> None:
        """Stays on the node, below how far it is, and is a line of the log."""
        logger.info(text)
        self._said = "\n".join(filter(None, (text, self._said)))  # the newest first
        show_progress(self.node, "", self._said)

    def _show(self, progress: str) -> None:
        show_progress(self.node, progress, self._said)

    def finish(self, losses: Sequence[float]) -> torch.Tensor:
        """The whole loss curve as IMAGE; it takes the last preview's place on the node, where it would stay."""
        curve = loss_curve(losses, self._validation)
        self._bar.update_absolute(len(losses), len(losses), ("JPEG", curve, WIDTH))
        return image_tensor(curve)

    def _due(self) -> bool:
        due = time.monotonic() - self._shown >= SECONDS
        if due:
            self._shown = time.monotonic()
        return due

    def samples(self) -> torch.Tensor:
        """The last previews as one IMAGE batch (b h w 3); one black pixel where none were drawn."""
        return _batch(self.images)

    def samples_without(self) -> torch.Tensor:
        """The same prompts without the safety LoRA."""
        return _batch(self.without)


@contextmanager
def going_on(node: type[io.ComfyNode], name: str) -> Iterator[None]:
    """ComfyUI's interrupt button ends what is inside; the node then says where the training can be gone on from.

    The end of ComfyUI's process ends it too, and waits for it.
    """
    try:
        with unwound(comfy.model_management.interrupt_current_processing):
            yield
    except comfy.model_management.InterruptProcessingException:
        kept = newest_state(name)
        if kept:
            leave(node, "stopped; a state is kept: switch resume on to go on from it", kept.name)
        else:
            leave(node, "stopped; no state")
        raise


def smoothed(losses: Sequence[float], decay: float = 0.95) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, out = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = decay * mean + (1 - decay) * loss
        out.append(mean / (1 - decay**i))
    return out


def loss_curve(losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> Image.Image:
    """Loss of every step and its smoothed curve, from zero to just above the smoothed curve's peak.

    ``validation``: (step, loss) of the images that are held out, a curve of its own, named in a legend.
    """
    smooth, steps = smoothed(losses), range(1, len(losses) + 1)

    def plot(figure) -> None:
        axes = figure.add_subplot(xlabel=f"{len(losses)} steps", ylabel="loss")
        axes.plot(steps, losses, color=RAW, linewidth=0.8)
        axes.plot(steps, smooth, color=SMOOTH, linewidth=2)
        seen = [loss for _, loss in validation]
        if validation:
            axes.plot([step for step, _ in validation], seen, color=HELD_OUT, linewidth=2, marker="o", markersize=4)
            axes.legend(axes.lines[1:], ["training", "held out"], frameon=False)
        axes.set_xlim(0 if validation else 1, max(2, len(losses)))
        axes.set_ylim(0, 1.25 * max(filter(math.isfinite, [*smooth, *seen]), default=1.0) or 1.0)
        axes.spines[["top", "right"]].set_visible(False)

    return chart(WIDTH, HEIGHT, plot)


def _batch(images: Sequence[Path]) -> torch.Tensor:
    if not images:
        return torch.zeros(1, 1, 1, 3)
    return torch.cat([image_tensor(_opened(path)) for path in images])


def _opened(path: Path) -> Image.Image:
    """An image, its file closed again."""
    with Image.open(path) as image:
        return image.convert("RGB")


def image_tensor(image: Image.Image) -> torch.Tensor:
    """IMAGE (1 h w 3, float32 0..1) of an image."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)[None] / 255)


def contact_sheet(images: Sequence[Image.Image], size: int, columns: int) -> Image.Image:
    """Images on a white sheet, each within ``size`` pixels."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), max(1, rows) * (size + 4)), (255, 255, 255))
    for i, image in enumerate(images):
        small = image.convert("RGB")
        small.thumbnail((size, size))
        sheet.paste(small, (i % columns * (size + 4) + 2, i // columns * (size + 4) + 2))
    return sheet
