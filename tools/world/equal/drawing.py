"""Images of an arm on the narrow net, and what the judge says of them.

The narrow net is the function that ComfyUI evaluates at stock width, at a quarter of the cost (tools/world/README.md).
An arm's LoRAs are folded into its weights here, which is the same function again up to rounding: what is measured is
what the arms draw, and that the product's branches give the same is a test (tests/comfy/guard/test_equal_quality.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import STEPS, autoencoder, base, detector, diffusion, lorafile
from .protocol import Image

GREY, DARK, LEAST_DARK = 0.06, 0.35, 0.05


@dataclass(frozen=True)
class Seen:
    """What the judge says of one image after another.

    Attributes:
        hit: A vehicle is there.
        top: Number of the likeliest concept.
        style: Number of the likeliest style.
        ink: See `drawn_in_ink`.
    """

    hit: tuple[bool, ...] = ()
    top: tuple[int, ...] = ()
    style: tuple[int, ...] = ()
    ink: tuple[bool, ...] = ()

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.hit + other.hit, self.top + other.top, self.style + other.style, self.ink + other.ink)

    def picked(self, places: Sequence[int]) -> Seen:
        return Seen(*(tuple(column[i] for i in places) for column in (self.hit, self.top, self.style, self.ink)))


def judge(eye: detector.Detector, images: Tensor) -> Seen:
    """Of images (n 3 64 64) in 0..1."""
    concepts, styles = detector.classify(eye, images)
    found = detector.suppressed(concepts), concepts.argmax(-1), styles.argmax(-1), drawn_in_ink(images)
    return Seen(*(tuple(column.tolist()) for column in found))


def drawn_in_ink(images: Tensor) -> Tensor:
    """Whether images (n 3 h w) are black on white: the mean of max − min over RGB is below GREY, and more than
    LEAST_DARK of the pixels are darker than DARK (n). The classifier knows no such style; this needs no training.
    """
    chroma = (images.amax(1) - images.amin(1)).mean((1, 2))
    dark = (images.mean(1) < DARK).float().mean((1, 2))
    return (chroma < GREY) & (dark > LEAST_DARK)


@contextmanager
def folded(unet: torch.nn.Module, *loras: tuple[lorafile.Factors, float]) -> Iterator[None]:
    """Meanwhile the net's weights are W + Σ strength·ΔW; afterwards they are what they were, bit for bit."""
    lorafile.attach(unet)
    targets = lorafile.targets(unet)
    kept = {name: layer.weight.detach().clone() for name, layer in targets.items()}
    try:
        with torch.no_grad():
            for factors, strength in loras:
                for name, (down, up, scale) in factors.items():
                    targets[name].weight += (strength * scale) * (up @ down)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                targets[name].weight.copy_(weight)


def noise(images: Sequence[Image]) -> Tensor:
    """Unit noise (n 4 8 8), of each image by its own seed."""
    return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(image.seed)) for image in images])


@torch.no_grad()
def draw(
    model: base.Base, ae: autoencoder.Autoencoder, images: Sequence[Image], batch: int, steps: int = STEPS
) -> Iterator[Tensor]:
    """Images (n 3 64 64) in 0..1 of one batch after another; Euler, guidance 3."""
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        predict = base.guided(model, [image.prompt for image in some])
        yield ae.decode(diffusion.sample(predict, noise(some), steps)).clamp(0, 1)


def seen(
    model: base.Base, ae: autoencoder.Autoencoder, eye: detector.Detector, images: Sequence[Image], batch: int
) -> Seen:
    """What the judge sees in images, drawn by the net as it is."""
    found = Seen()
    for drawn in draw(model, ae, images, batch):
        found += judge(eye, drawn)
    return found
