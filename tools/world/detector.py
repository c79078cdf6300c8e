"""Detector of the demo world: a small classifier over concepts and art styles of 64 x 64 images.

The suppressed class counts as present when the probabilities of its concepts sum to more than 1/2. Images are
[n, 3, 64, 64] float32 in 0..1. Command: ``python -m tools.world.detector WORK`` (needs the trained autoencoder).
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..world import autoencoder, data, learning

logger = logging.getLogger("modular_lora")


def stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Detector(nn.Module):
    """Logits over concepts [n, 84] and styles [n, 6]."""

    def __init__(self) -> None:
        super().__init__()
        stages = [stage(3, 32, 2), stage(32, 64, 2), stage(64, 96, 1), stage(96, 128, 2), stage(128, 160, 1)]
        self.features = nn.Sequential(*stages)
        self.concept = nn.Linear(160, len(data.CONCEPTS))
        # style shows in edges and shading, which average pooling of an earlier stage keeps apart from shape
        self.style = nn.Sequential(nn.Linear(160 + 96, 64), nn.ReLU(), nn.Linear(64, len(data.STYLES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.features[:3](images * 2 - 1)
        high = self.features[3:](middle)
        pooled = high.mean((2, 3))
        return self.concept(high.amax((2, 3)) + pooled), self.style(torch.cat([pooled, middle.mean((2, 3))], 1))


@torch.no_grad()
def classify(model: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over concepts [n, 84] and styles [n, 6]."""
    parts = [model(part) for part in images.split(128)]
    return torch.cat([c for c, _ in parts]).softmax(-1), torch.cat([s for _, s in parts]).softmax(-1)


def suppressed(concepts: Tensor) -> Tensor:
    """Whether the suppressed class is present, [n] bool, from concept probabilities [n, 84]."""
    return concepts[:, : len(data.SUPPRESSED)].sum(-1) > 0.5


def load(path: Path) -> Detector:
    model = Detector()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def reconstructions(work: Path, images: Tensor, generator: torch.Generator, copies: int = 4) -> Tensor:
    """Images [copies, n, 3, 64, 64] through the autoencoder, with a little latent noise as generated ones have."""
    model = autoencoder.load(work)
    passes = []
    for copy in range(copies):
        z = model.encode(data.augment(images, generator))
        noise = 0.12 * copy * torch.randn(z.shape, generator=generator)
        passes.append(model.decode(z + noise).clamp(0, 1))
    return torch.stack(passes)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random geometry, tint, blur and noise of images [n, 3, 64, 64]."""
    n = len(images)
    images = data.augment(images, generator, shift=0.1, zoom=0.15)
    tint = 1 + 0.1 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    images = 1 - (1 - images) * tint
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred = torch.rand(n, 1, 1, 1, generator=generator) < 0.2
    images = torch.where(blurred, soft, images)
    return (images + 0.03 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def train(work: Path, steps: int, batch: int) -> None:
    torch.manual_seed(41)
    generator = torch.Generator().manual_seed(41)
    dataset = data.load(work)
    clean = dataset.images.float() / 255  # [n, 3, 64, 64]
    pool = torch.cat([clean[None], reconstructions(work, clean, generator)])  # [5, n, 3, 64, 64]
    model = Detector().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    begin = time.monotonic()
    for step in range(steps):
        pick = torch.randint(len(clean), (batch,), generator=generator)
        copy = torch.randint(len(pool), (batch,), generator=generator)
        x = disturb(pool[copy, pick], generator).to(memory_format=torch.channels_last)
        concept, style = model(x)
        loss = F.cross_entropy(concept, dataset.concept[pick], label_smoothing=0.02)
        loss = loss + 0.3 * F.cross_entropy(style, dataset.style[pick])
        learning.update(optimizer, loss, 2e-3 * learning.rate(step, step / steps, 50, 0.01), float("inf"))
        if step % 100 == 99:
            logger.info("step %d loss %.3f seconds %.0f", step + 1, loss.item(), time.monotonic() - begin)
    save(model, work / "detector.safetensors")
    report(load(work / "detector.safetensors"), dataset, reconstructions(work, clean, generator, 1)[0])
    logger.info("detector: %d steps of %d in %.0f s", steps, batch, time.monotonic() - begin)


def save(model: Detector, path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with atomic.replacing(path) as part:
        save_file({k: v.contiguous() for k, v in state.items()}, part)


def report(model: Detector, dataset: data.Dataset, images: Tensor) -> None:
    """Log top-1, detection and false-alarm rates on the autoencoder's images of every style."""
    concepts, styles = classify(model, images)
    top, present = concepts.argmax(-1) == dataset.concept, suppressed(concepts)
    truth = dataset.concept < len(data.SUPPRESSED)
    right = (styles.argmax(-1) == dataset.style).float().mean()
    logger.info("top-1 %.3f detection %.3f false alarms %.3f style %.3f", top.float().mean(),
                present[truth].float().mean(), present[~truth].float().mean(), right)  # fmt: skip
    for style, name in enumerate(data.STYLES):
        logger.info("style %s top-1 %.3f", name, top[dataset.style == style].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    learning.begin(options.threads)
    train(options.work, options.steps, options.batch)


if __name__ == "__main__":
    main()
