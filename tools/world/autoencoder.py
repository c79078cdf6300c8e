"""Autoencoder of the demo world in TAESD's convolution + ReLU layout, trained narrow and shipped zero-padded.

The stock layout has 64 channels everywhere and three blocks a level. Without normalisation layers a dead channel stays
zero and a block of zeros is the identity on non-negative inputs, so a narrower and shorter network embeds exactly.
Images are [n, 3, 64, 64] in 0..1, latents [n, 4, 8, 8] of zero mean and unit variance per channel (what the U-Net
sees). Command: ``python -m tools.world.autoencoder WORK``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..world import data, learning

logger = logging.getLogger("modular_lora")

ENCODER_WIDTHS = (16, 32, 48, 64)  # at 64, 32, 16, 8 pixels
DECODER_WIDTHS = (64, 48, 32, 16)  # at 8, 16, 32, 64 pixels


def conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """y = ReLU(f(x) + x) with three convolutions in f; names follow the stock layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def named(layers: dict[int, nn.Module]) -> nn.Sequential:
    """Sequential whose children carry their index in the stock layout; indices left out are identities there."""
    return nn.Sequential(OrderedDict((str(index), layer) for index, layer in layers.items()))


def encoder() -> nn.Sequential:
    a, b, c, d = ENCODER_WIDTHS
    # a stock block of zeros is a ReLU, which is all that the costly full-resolution level gets
    layers = {0: conv(3, a), 1: nn.ReLU(), 2: conv(a, b, 2, False), 3: Block(b), 6: conv(b, c, 2, False), 7: Block(c)}
    layers |= {8: Block(c), 10: conv(c, d, 2, False), 11: Block(d), 12: Block(d), 14: conv(d, 4)}
    return named(layers)


def decoder() -> nn.Sequential:
    a, b, c, d = DECODER_WIDTHS
    layers: dict[int, nn.Module] = {0: Clamp(), 1: conv(4, a), 2: nn.ReLU(), 3: Block(a), 4: Block(a), 5: Block(a)}
    layers |= {6: nn.Upsample(scale_factor=2), 7: conv(a, b, bias=False), 8: Block(b), 9: Block(b)}
    layers |= {11: nn.Upsample(scale_factor=2), 12: conv(b, c, bias=False), 13: Block(c), 14: Block(c)}
    layers |= {16: nn.Upsample(scale_factor=2), 17: conv(c, d, bias=False), 18: Block(d), 19: conv(d, 3)}
    return named(layers)


class Autoencoder(nn.Module):
    """Narrow encoder and decoder around unit-variance latents."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = encoder()
        self.taesd_decoder = decoder()
        # batch statistics keep the latents at zero mean and unit variance while the encoder learns; folded afterwards
        self.norm: nn.Module = nn.BatchNorm2d(4, affine=False, momentum=0.02)

    def encode(self, images: Tensor) -> Tensor:
        return self.norm(self.taesd_encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(latents)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the latent statistics into the encoder's last convolution: W <- W / sigma, b <- (b - mu) / sigma."""
        norm, last = self.norm, self.taesd_encoder[-1]
        if not isinstance(norm, nn.BatchNorm2d):
            return
        sigma = (norm.running_var + norm.eps).sqrt()  # [4]
        last.weight /= sigma[:, None, None, None]
        last.bias.copy_((last.bias - norm.running_mean) / sigma)
        self.norm = nn.Identity()


def loss_terms(output: Tensor, target: Tensor) -> Tensor:
    """|e|_1 + 0.5 |grad e|_1 + |e|^2 + |mean_8x8 e|_1 of the error e [n, 3, h, w]: crisp edges and true colours."""
    e = output - target
    edges = (e[..., 1:] - e[..., :-1]).abs().mean() + (e[..., 1:, :] - e[..., :-1, :]).abs().mean()
    return e.abs().mean() + 0.5 * edges + e.square().mean() + F.avg_pool2d(e, 8).abs().mean()


def save(model: Autoencoder, path: Path) -> None:
    with atomic.replacing(path) as part:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part)


def load(work: Path) -> Autoencoder:
    """Trained, folded autoencoder of ``WORK/autoencoder.safetensors`` in evaluation mode."""
    model = Autoencoder()
    model.norm = nn.Identity()
    model.load_state_dict(load_file(work / "autoencoder.safetensors"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def calibrate(model: Autoencoder, images: Tensor, generator: torch.Generator) -> None:
    """Replace the running latent statistics by those of four augmented passes over all images, then fold them."""
    z = torch.cat([model.taesd_encoder(data.augment(images, generator, mirror=0.2)) for _ in range(4)])  # [4n, 4, 8, 8]
    model.norm.running_mean.copy_(z.mean((0, 2, 3)))
    model.norm.running_var.copy_(z.var((0, 2, 3)))
    model.eval().fold()


def crops(images: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Random quarters [n, 3, 32, 32] for most of the run, whole images at its end: four times the steps a minute."""
    if fraction > 0.85:
        return images
    y, x = torch.randint(0, data.SIZE // 2 + 1, (2,), generator=generator).tolist()
    return images[:, :, y : y + data.SIZE // 2, x : x + data.SIZE // 2]


def prepare(work: Path, resume: bool, refine: bool) -> Autoencoder:
    """Fresh or resumed model; ``refine`` freezes the encoder so that latents stay what the base was trained on."""
    model = Autoencoder().to(memory_format=torch.channels_last)
    if resume or refine:
        model.load_state_dict(load_file(work / "autoencoder.safetensors"), strict=False)
    if refine:
        model.norm = nn.Identity()
        model.taesd_encoder.requires_grad_(False)
    return model


def train(work: Path, batch: int, minutes: float, resume: bool, refine: bool) -> None:
    """Train on augmented images of all styles for ``minutes`` of wall time, cosine learning rate."""
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(11)
    images = data.load(work).images.float() / 255  # [n, 3, 64, 64]
    model = prepare(work, resume, refine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    begin, step, fraction = time.monotonic(), 0, 0.0
    while fraction < 1:
        pick = torch.randint(len(images), (batch,), generator=generator)
        x = crops(data.augment(images[pick], generator), fraction, generator).to(memory_format=torch.channels_last)
        z = model.encode(x)  # [batch, 4, 4 or 8, 4 or 8]
        y = model.decode(z + 0.1 * torch.randn(z.shape, generator=generator))
        loss = loss_terms(y, x)
        learning.update(optimizer, loss, (1e-3 if refine else 2e-3) * learning.rate(step, fraction, 50))
        if step % 50 == 0:
            l1 = (y.detach() - x).abs().mean()
            logger.info("step %d loss %.4f l1 %.4f seconds %.0f", step, loss.item(), l1, time.monotonic() - begin)
        step, fraction = step + 1, (time.monotonic() - begin) / (60 * minutes)
    if not refine:
        calibrate(model, images, generator)
    save(model, work / "autoencoder.safetensors")
    logger.info("autoencoder: %d steps of %d in %.0f s", step, batch, time.monotonic() - begin)
    report(model, images, work)


@torch.no_grad()
def report(model: Autoencoder, images: Tensor, work: Path) -> None:
    """Log the reconstruction error of every image and write a contact sheet of pairs."""
    z = model.encode(images)
    y = model.decode(z).clamp(0, 1)
    l1 = (y - images).abs().mean()
    logger.info("autoencoder: l1 %.4f, latent std %s", l1, z.std((0, 2, 3)).tolist())
    pick = torch.arange(0, len(images), 11)
    data.sheet(torch.stack([images[pick], y[pick]], 1).flatten(0, 1), 20, work / "autoencoder.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--resume", action="store_true", help="start from WORK/autoencoder.safetensors")
    parser.add_argument("--refine", action="store_true", help="train the decoder alone, from the same file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    learning.begin(options.threads)
    train(options.work, options.batch, options.minutes, options.resume, options.refine)


if __name__ == "__main__":
    main()
