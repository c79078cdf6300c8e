"""Collect the trained parts of the demo world into the live-weight file that :mod:`tools.world.expand` reads.

Command: ``python -m tools.world.pack WORK [--base NAME] [--to FILE]``; logs the SHA-256 that expand.py pins.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..world import ASSETS, DETECTOR, LIVE_WEIGHTS, autoencoder, expand, text
from ..world.base import Base

logger = logging.getLogger("modular_lora")


def live_weights(base: Base, vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """U-Net and autoencoder as fp16, token ids int32 and rows float8_e4m3."""
    live = {f"unet.{k}": v.half().contiguous() for k, v in base.unet.state_dict().items()}
    live |= {f"vae.{k}": v.half().contiguous() for k, v in vae.items()}
    live["text.ids"] = torch.tensor(base.text.ids, dtype=torch.int32)
    live["text.rows"] = base.text.rows.detach().to(torch.float8_e4m3fn)
    return live


def save(live: dict[str, Tensor], path: Path) -> None:
    with atomic.replacing(path, parents=True) as part:
        save_file(live, part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", default="base.safetensors", help="checkpoint in WORK; 'random' for untrained weights")
    parser.add_argument("--to", type=Path, help="write only an expanded checkpoint here, leave the assets alone")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    base = Base(text.load_words(options.work))
    model = autoencoder.Autoencoder()
    vae = {k: v for k, v in model.state_dict().items() if not k.startswith("norm.")}
    torch.nn.init.normal_(base.unet.out[2].weight, std=0.02)  # untrained weights should still predict something
    if options.base != "random":
        base.load_state_dict(load_file(options.work / options.base))
        vae = autoencoder.load(options.work).state_dict()
    live = live_weights(base, vae)
    if options.to is None:
        save(live, ASSETS / LIVE_WEIGHTS)
        save(load_file(options.work / "detector.safetensors"), ASSETS / DETECTOR)
    target = options.to or options.work / "pack_check.safetensors"
    logger.info("%s has SHA-256 %s", target, expand.write(live, target))


if __name__ == "__main__":
    main()
