"""Whether bf16 learns as float32 does: loss curves of the demo world's task training, the seed's own noise beside them.

    python -m tools.benchmarks.precision CHECKPOINT --comfyui COMFYUI [--steps 60] [--record]

Three trainings: float32, float32 with another seed, bf16 with the first seed. The same seed sees the same images,
timesteps and noise, so the two precisions differ by rounding alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import torch
from modular_lora_guard.training import cli, options
from modular_lora_guard.training.task import train as task

from ..world import ASSETS, DATA_SET
from .bench import finish, parser

RUNS = {"fp32": {}, "fp32, another seed": {"seed": 43}, "bf16": {"mixed_precision": "bf16"}}


def losses(host, chosen: argparse.Namespace, changes: dict) -> list[float]:
    """Loss of every step of one training."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"output_dir": folder, "train_data_dir": str(ASSETS / DATA_SET), "resolution": 64}
        values |= {"network_dim": 8, "network_alpha": 8.0, "learning_rate": 3e-3, "train_batch_size": 4}
        made = options.TaskOptions(**values, max_train_steps=chosen.steps, **changes)
        loaded = host.load_checkpoint(chosen.checkpoint, None, made.mixed_precision)
        with host.opened(*loaded, made) as host_model:
            return list(task.train_task(host_model, made, cli.TrainingLines(), engine="benchmark").losses)


def main() -> None:
    made = parser(__doc__, "training.json", checkpoint=True)
    made.add_argument("--steps", type=int, default=60)
    chosen = made.parse_args()
    torch.set_num_threads(1)
    host = cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True})
    curves = {name: losses(host, chosen, changes) for name, changes in RUNS.items()}
    first, *others = curves.items()
    rows: dict[str, object] = {f"mean loss, {name}": round(statistics.mean(c), 4) for name, c in curves.items()}
    for name, curve in others:
        gap = statistics.mean(abs(a - b) for a, b in zip(curve, first[1], strict=True))
        rows[f"mean |loss − fp32's|, {name}"] = float(f"{gap:.2g}")
    command = f"python -m tools.benchmarks.precision CHECKPOINT --steps {chosen.steps} --record"
    finish(rows, "training.json", command, chosen.record)


if __name__ == "__main__":
    main()
