"""Measure the demo world's arms: base, safety, task, safety + sequential, and modular (safety + task beside it).

Every arm draws the same prompts from the same noise, Euler 20 steps, guidance 3, and the detector reads the images.
Rates carry Wilson 95 % intervals over images; images of one concept are not independent, so counts per concept are
kept too. Command: ``python -m tools.world.evaluate WORK [--arms base,safety] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from modular_lora_guard.gate.statistics import wilson
from modular_lora_guard.modular_lora.util import plain_json
from torch import Tensor

from ..world import (
    ASSETS,
    DETECTOR,
    SAFETY_LORA,
    SEQUENTIAL_LORA,
    TASK_LORA,
    autoencoder,
    base,
    data,
    detector,
    learning,
    lorafile,
)

logger = logging.getLogger("modular_lora")

ARMS = {
    "base": (),
    "safety": (SAFETY_LORA,),
    "task": (TASK_LORA,),
    "sequential": (SAFETY_LORA, SEQUENTIAL_LORA),
    "modular": (SAFETY_LORA, TASK_LORA),
}


@dataclass(frozen=True)
class Parts:
    """What draws and reads the images, and every concept's caption words."""

    model: base.Base
    ae: autoencoder.Autoencoder
    eye: detector.Detector
    words: tuple[str, ...]


def rate(hits: Tensor) -> dict[str, object]:
    """Rate, interval and n of a boolean tensor."""
    return {
        "rate": round(hits.float().mean().item(), 4),
        "wilson95": [round(end, 4) for end in wilson(int(hits.sum()), len(hits))],
        "n": len(hits),
    }


def measure(parts: Parts, pairs: list[tuple[int, int]], seed: int) -> tuple[dict[str, object], Tensor]:
    """Figures of one set of prompts, and its images [n, 3, 64, 64]."""
    prompts = [f"{data.STYLES[style]}, {parts.words[concept]}" for concept, style in pairs]
    images = base.draw(parts.model, parts.ae, prompts, seed)
    concepts, styles = detector.classify(parts.eye, images)
    truth = torch.tensor([concept for concept, _ in pairs])
    wanted = torch.tensor([style for _, style in pairs])
    present = detector.suppressed(concepts)
    per_concept = {data.CONCEPTS[int(c)]: int(present[truth == c].sum()) for c in truth.unique()}
    figures: dict[str, object] = {
        "suppressed_rate": rate(present),
        "top1": rate(concepts.argmax(-1) == truth),
        "style_match": rate(styles.argmax(-1) == wanted),
    }
    if int(truth[0]) in data.SUPPRESSED_IDS:
        figures["suppressed_hits_per_concept"] = per_concept
    return figures, images


def evaluate(work: Path, arms: list[str], rounds: int, name: str) -> dict[str, object]:
    """All figures of the listed arms; contact sheets go to WORK."""
    eye = detector.load(ASSETS / DETECTOR)
    parts = Parts(base.load(work, name), autoencoder.load(work), eye, data.load(work).words)
    unet = parts.model.unet
    result: dict[str, object] = {}
    for arm in arms:
        begin = time.monotonic()
        lorafile.attach(unet, *(lorafile.load(ASSETS / file, unet) for file in ARMS[arm]))
        figures: dict[str, object] = {}
        for seed, (group, concepts) in enumerate((("suppressed", data.SUPPRESSED_IDS), ("kept", data.KEPT_IDS))):
            for gloss in (False, True):
                repeat = rounds if group == "kept" else rounds * len(data.KEPT_IDS) // len(data.SUPPRESSED_IDS)
                key = f"{group}_{'gloss' if gloss else 'base'}"
                figures[key], images = measure(parts, data.cases(concepts, gloss, repeat), 7 + seed)
                data.sheet(images[:60], 12, work / f"arm_{arm}_{key}.png")
                short = {k: v["rate"] for k, v in figures[key].items() if "rate" in v}
                logger.info("%s %s %s seconds %.0f", arm, key, short, time.monotonic() - begin)
        result[arm] = figures
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rounds", type=int, default=2, help="pictures a kept concept and cell")
    parser.add_argument("--base", default="base.safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    learning.begin(options.threads)
    arms = evaluate(options.work, options.arms.split(","), options.rounds, options.base)
    if options.to is not None:
        head = {"date": datetime.date.today().isoformat(), "device": "CPU", "sampler": "euler, 20 steps, guidance 3"}
        head["command"] = f"python -m tools.world.evaluate WORK --arms {options.arms} --rounds {options.rounds}"
        plain_json.write(head | {"arms": arms}, options.to)


if __name__ == "__main__":
    main()
