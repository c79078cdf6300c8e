"""What a whole erasure run costs, pooled and on-policy, until the detector finds the concept no more often than asked.

    python -m tools.benchmarks.erasure [--objective esd-x] [--rate 0.25] [--record]

Both arms train on the demo world's narrow net with the recipe's prompts; on-policy draws every x_t anew over the
papers' 50 steps. CPU-seconds of training alone, the pool's included; the detector's own time is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.files import reader as files
from modular_lora_guard.training import model as host_models
from modular_lora_guard.training import options
from modular_lora_guard.training.safety import train as safety

from ..world import ASSETS, DETECTOR, base, data, detector, lorafile, narrow
from .bench import Silent, parser
from .figures import ROOT, record

logger = logging.getLogger("modular_lora")
RECIPE = ROOT / "tools" / "world" / "recipes" / "safety.toml"
ARMS = {"pooled": {"on_policy": False}, "on-policy": {"on_policy": True, "denoising_steps": 50}}


@dataclass
class Clock(Silent):
    """A watch that keeps the CPU-seconds of every step."""

    begun: float = field(default_factory=time.process_time)
    at: list[float] = field(default_factory=list)

    def step(self, step: int, total: int, losses: list[float]) -> None:
        self.at.append(time.process_time() - self.begun)
        if step % 10 == 0:
            logger.info("step %d of %d loss %.3f, %.1f CPU-s", step, total, losses[-1], self.at[-1])

    def say(self, text: str) -> None:
        logger.info(text)


def judge(model, ae, eye, lora: Path, count: int) -> dict[str, float]:
    """Vehicles found in vehicle prompts, and kept concepts recognised."""
    found, layers = {}, files.read_lora(lora).layers
    for path, module in lorafile.targets(model.unet).items():
        layer = layers.get(lorafile.kohya_name(path))
        module.adapters = [(layer.down, layer.up, layer.scale)] if layer else []
    for seed, (name, concepts) in enumerate((("vehicles", data.SUPPRESSED_IDS), ("kept", data.KEPT_IDS))):
        prompts, truth = data.asked(concepts, False, count)
        seen, _ = detector.classify(eye, base.draw(model, ae, prompts, 7 + seed))
        right = seen.argmax(-1) == truth
        found[name] = (detector.suppressed(seen) if name == "vehicles" else right).float().mean().item()
    for module in lorafile.targets(model.unet).values():
        module.adapters = []
    return found


def arm(name: str, chosen: argparse.Namespace, model, ae, eye) -> list[dict[str, float]]:
    """The curve of one arm: CPU-seconds and rates at every ``every`` steps, until the rate is reached."""
    host_model = narrow.NarrowHostModel(model, host_models.Schedule, host_models.Cond)
    with tempfile.TemporaryDirectory() as folder:
        values = {"objective": chosen.objective, "negative_guidance": chosen.negative_guidance, "output_dir": folder}
        values |= {"max_train_steps": chosen.steps, "save_every_n_steps": chosen.every, "save_precision": "float"}
        values |= {"sample_every_n_steps": 0, "learning_rate": chosen.learning_rate} | ARMS[name]
        made, clock = options.load(options.SafetyOptions, RECIPE, values), Clock()
        safety.train_safety(host_model, made, clock, engine="benchmark")
        curve = []
        for step in range(chosen.every, chosen.steps + 1, chosen.every):
            last = f"-step{step:08d}" if step < chosen.steps else ""
            rates = judge(model, ae, eye, Path(folder) / f"{made.output_name}{last}.safetensors", chosen.pictures)
            curve.append({"step": step, "cpu-s": round(clock.at[step - 1], 1), **rates})
            logger.info("%s %s", name, curve[-1])
            if rates["vehicles"] <= chosen.rate:
                break
    return curve


def main() -> None:
    made = parser(__doc__, "training.json")
    made.add_argument("--objective", default="esd-x", choices=("esd-x", "esd-u", "leco"))
    made.add_argument("--negative_guidance", type=float, default=2.0)
    made.add_argument("--learning_rate", type=float, default=3e-3)
    made.add_argument("--rate", type=float, default=0.25, help="share of vehicle prompts where the detector finds one")
    made.add_argument("--steps", type=int, default=120)
    made.add_argument("--every", type=int, default=20)
    made.add_argument("--pictures", type=int, default=72)
    made.add_argument("--arms", nargs="+", default=list(ARMS))
    chosen = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    (model, ae), eye = narrow.load(), detector.load(ASSETS / DETECTOR)
    curves = {name: arm(name, chosen, model, ae, eye) for name in chosen.arms}
    sys.stdout.write(json.dumps(curves, indent=1) + "\n")
    if chosen.record:
        report(chosen, curves)


def report(chosen: argparse.Namespace, curves: dict[str, list[dict[str, float]]]) -> None:
    """The ratio, where both arms reached the rate; else that they did not."""
    kind = "ESD" if chosen.objective.startswith("esd") else "LECO"
    first = {name: next((p for p in curve if p["vehicles"] <= chosen.rate), None) for name, curve in curves.items()}
    rows: dict[str, object] = {}
    for name, point in first.items():
        words = "not reached" if point is None else f"{point['cpu-s']} CPU-s, step {point['step']}"
        kept = "" if point is None else f", kept concepts right {point['kept']:.1%}"
        rows[f"{kind} to a vehicle rate of {chosen.rate:.0%}, {name}"] = words + kept
    both = all(first.values())
    ratio = round(first["pooled"]["cpu-s"] / first["on-policy"]["cpu-s"], 3) if both else "not reached by both"
    chosen_ones = ("objective", "negative_guidance", "rate", "steps")
    command = "python -m tools.benchmarks.erasure --record " + " ".join(
        f"--{n} {getattr(chosen, n)}" for n in chosen_ones
    )
    record("training.json", {f"erasure run / on-policy {kind}": ratio} | rows, command)


if __name__ == "__main__":
    main()
