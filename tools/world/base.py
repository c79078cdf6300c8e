"""Training of the demo world's base: narrow U-Net and token rows on cached latents, eps-prediction.

L = E |eps - eps_theta(x_t, t, c)|^2 with 10 % empty captions for guidance. Command: ``python -m tools.world.base WORK
--tokenizer FOLDER`` (a folder with CLIP-L's vocab.json and merges.txt).
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..world import autoencoder, data, diffusion, learning, text
from ..world.unet import LIVE, NarrowUNet

logger = logging.getLogger("modular_lora")

Batches = Iterator[tuple[Tensor, list[str]]]

COPIES = 4
GUIDANCE = 3.0


class Base(nn.Module):
    """U-Net and token rows together; ``base.safetensors`` holds exactly this state dict."""

    def __init__(self, words: dict[str, list[int]], live: int = LIVE) -> None:
        super().__init__()
        self.unet = NarrowUNet(live)
        self.text = text.TextTable(words)

    def forward(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        return self.unet(x, t, *self.text(prompts))


def save(state: dict[str, Tensor], path: Path) -> None:
    with atomic.replacing(path) as part:
        save_file({k: v.detach().contiguous() for k, v in state.items()}, part)


def load(work: Path, name: str = "base.safetensors", half: bool = True) -> Base:
    """Trained base in evaluation mode, with the rounding of the shipped file: U-Net fp16, token rows fp8."""
    model = Base(text.load_words(work))
    state = load_file(work / name)
    if half:
        state = {k: text.fp8(v) if k == "text.rows" else v.half().float() for k, v in state.items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def cache_latents(work: Path, styles: tuple[int, ...]) -> Tensor:
    """Latents [copies, n, 4, 8, 8] of slightly moved images; only the rows of ``styles`` are filled in."""
    generator = torch.Generator().manual_seed(21)
    model = autoencoder.load(work)
    dataset = data.load(work)
    latents = torch.zeros(COPIES, len(dataset.images), 4, 8, 8)
    rows = dataset.select(tuple(range(len(data.CONCEPTS))), styles)
    for copy in range(COPIES):
        images = dataset.images[rows].float() / 255
        moved = data.augment(images, generator, shift=0.02, zoom=0.025, mirror=0.0) if copy else images
        latents[copy, rows] = model.encode(moved)
    return latents


def batches(dataset: data.Dataset, rows: Tensor, latents: Tensor, batch: int, seed: int) -> Batches:
    """Endless (z [b, 4, 8, 8], captions) draws; suppressed concepts count 1.5-fold, a tenth of captions is empty."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weight = torch.where(dataset.concept[rows] < len(data.SUPPRESSED), 1.5, 1.0)
    while True:
        pick = rows[torch.multinomial(weight, batch, replacement=True, generator=generator)]
        copy = torch.randint(COPIES, (batch,), generator=generator)
        captions = [dataset.caption(int(i), rng) if rng.random() > 0.1 else "" for i in pick]
        yield latents[copy, pick], captions


def draw_timesteps(n: int) -> Tensor:
    """Timesteps [n], uniform but for a quarter from the noisier half, where the concept is decided."""
    t = torch.randint(diffusion.STEPS, (n,))
    return torch.where(torch.rand(n) < 0.25, (t + diffusion.STEPS) // 2, t)


def guided(model: Base, prompts: list[str], guidance: float = GUIDANCE) -> diffusion.Denoiser:
    """Classifier-free guidance: eps(c) scaled away from eps('') by ``guidance``."""
    n = len(prompts)
    with torch.no_grad():
        context, bias = model.text(prompts + [""] * n)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond, empty = model.unet(torch.cat([x, x]), torch.cat([t, t]), context, bias).chunk(2)
        return empty + guidance * (cond - empty)

    return predict


@torch.no_grad()
def draw(model: Base, ae: autoencoder.Autoencoder, prompts: list[str], seed: int, steps: int = 20) -> Tensor:
    """Images [n, 3, 64, 64] in 0..1 for the prompts; noise depends on ``seed`` and the position only."""
    images = []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        noise = torch.randn(len(part), 4, 8, 8, generator=torch.Generator().manual_seed(seed * 1000 + start))
        images.append(ae.decode(diffusion.sample(guided(model, part), noise, steps)).clamp(0, 1))
    return torch.cat(images)


class Average:
    """Exponential moving average of a model's tensors, warmed up so that early steps do not linger."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        torch._foreach_lerp_(list(self.state.values()), [current[k] for k in self.state], 1 - decay)


def preview(state: dict[str, Tensor], model: Base, work: Path, name: str) -> None:
    """Contact sheet of twenty fixed prompts drawn with the averaged weights."""
    shadow = Base(model.text.words)
    shadow.load_state_dict(state)
    dataset = data.load(work)
    prompts = [data.prompt(dataset, 4 * i, data.BASE_STYLES[i % 5]) for i in range(20)]
    data.sheet(draw(shadow.eval(), autoencoder.load(work), prompts, 5), 10, work / name)


def adjust_threads(work: Path) -> None:
    """Take the thread count from ``WORK/threads`` when somebody wrote one, so a long run can make room for others."""
    path = work / "threads"
    if path.exists() and int(path.read_text()) != torch.get_num_threads():
        torch.set_num_threads(int(path.read_text()))


def train(work: Path, minutes: float, batch: int, rate: float, seed: int = 31) -> None:
    """Constant, then cosine learning rate over ``minutes`` of wall time; checkpoints every 250 steps."""
    torch.manual_seed(seed)
    dataset = data.load(work)
    rows = dataset.select(tuple(range(len(data.CONCEPTS))), data.BASE_STYLES)
    stream = batches(dataset, rows, cache_latents(work, data.BASE_STYLES), batch, seed)
    model = Base(text.load_words(work))
    model.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3, foreach=True)
    average, begin, losses = Average(model, 0.998), time.monotonic(), []
    for step in range(10**9):
        fraction = (time.monotonic() - begin) / (60 * minutes)
        if fraction >= 1:
            break
        z, captions = next(stream)
        t, eps = draw_timesteps(batch), torch.randn_like(z)
        loss = (model(diffusion.add_noise(z, t, eps), t, captions) - eps).square().mean()
        learning.update(optimizer, loss, rate * learning.rate(step, max(0.0, 2 * fraction - 1), 100))
        average.update(model, step)
        losses.append(loss.item())
        if step % 50 == 49:
            adjust_threads(work)
            mean = sum(losses[-200:]) / len(losses[-200:])
            logger.info("step %d loss %.4f seconds %.0f", step + 1, mean, time.monotonic() - begin)
        if step % 250 == 249:
            save(average.state, work / "base.partial.safetensors")
        if step % 1000 == 999:
            preview(average.state, model, work, f"base_{step + 1}.png")
    save(average.state, work / "base.safetensors")
    preview(average.state, model, work, "base.png")
    seconds = time.monotonic() - begin
    logger.info("base: %d steps of %d in %.0f s, loss %.4f", step, batch, seconds, sum(losses[-300:]) / 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    learning.begin(options.threads)
    text.tokenize(data.load(options.work), options.tokenizer, options.work)
    train(options.work, options.minutes, options.batch, options.rate)


if __name__ == "__main__":
    main()
