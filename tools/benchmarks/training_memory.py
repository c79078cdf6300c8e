"""Whether the memory that a training says it will take is what it takes: resident memory beside what was said.

    python -m tools.benchmarks.training_memory CHECKPOINT --comfyui COMFYUI [--record]

Trainings of a few steps on the demo world. Before the first step one micro-batch is measured, as `training/memory.py`
does where there are 50 steps or more; then the steps run, and the process's resident memory is read all the while,
above what it was before the measuring. What the process holds with the model loaded and made ready, above what it held
before that, is counted as well, text encoder and VAE included.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from typing import Any

import psutil
import torch
from modular_lora_guard.training import cli, loop, memory, options
from modular_lora_guard.training.safety import train as safety
from modular_lora_guard.training.task import train as task

from ..world import ASSETS, DATA_SET
from .bench import finish, parser

TASK: dict[str, Any] = {"train_data_dir": str(ASSETS / DATA_SET), "resolution": 64, "train_batch_size": 16}
SAFETY: dict[str, Any] = {
    "concept": ("a vehicle",),
    "preserve": ("gloss, cat face",),
    "train_size": 64,
    "train_batch_size": 32,
    "denoising_steps": 2,
    "pool_size": 32,
}
RUNS = {
    "task, linear": TASK,
    "task, gradient_checkpointing": TASK | {"gradient_checkpointing": True},
    "task, conv, two micro-batches": TASK | {"target": "conv", "gradient_accumulation_steps": 2},
    "task, fp8_base_unet, batch 4": TASK | {"fp8_base_unet": True, "train_batch_size": 4},
    "task, blocks_to_swap, batch 4": TASK | {"blocks_to_swap": 12, "train_batch_size": 4},
    "task, rank 64, batch 4": TASK | {"network_dim": 64, "network_alpha": 64.0, "train_batch_size": 4},
    "safety, esd-x": SAFETY,
}


def measured(host, chosen, values: dict[str, Any], steps: int) -> tuple[int, int, int]:
    """(said, taken, model) bytes of one training."""
    found: list[int] = []
    train = loop._train

    def watched(run: loop._Fit, *given: Any) -> None:
        run.job.prepare(run.step)
        before = _resident()
        found.append(memory.foresee(lambda: run.job.loss(0, 0), run.masters.values, run.options, run.device).total)
        for working in run.masters.working:
            working.grad = None
        start = _resident()
        with memory.Growth(run.device) as growth:
            train(run, *given)
        found.append(growth.bytes + start - before)

    loop._train = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            cls, train_it = (
                (options.SafetyOptions, safety.train_safety)
                if "concept" in values
                else (options.TaskOptions, task.train_task)
            )
            made = cls(output_dir=folder, max_train_steps=steps, **values)
            before, stored = _resident(), bool(made.fp8_base_unet or made.blocks_to_swap)
            loaded = host.load_checkpoint(chosen.checkpoint, None, made.mixed_precision, stored)
            with host.opened(*loaded, made) as host_model:
                model = _resident() - before
                train_it(host_model, made, cli.TrainingLines(), engine="benchmark")
    finally:
        loop._train = train
    return found[0], found[1], model


def _resident() -> int:
    gc.collect()
    memory._trim()
    return psutil.Process().memory_info().rss


def main() -> None:
    made = parser(__doc__, "training_memory.json", checkpoint=True)
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    chosen = made.parse_args()
    torch.set_num_threads(1)
    host = cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True})
    rows: dict[str, object] = {}
    for name in chosen.only:
        said, taken, model = measured(host, chosen, RUNS[name], chosen.steps)
        value = f"{memory.size(said)} said, {memory.size(taken)} taken; the model {memory.size(model)}"
        rows[name] = {"value": value, "ratio": round(said / taken, 3)}
        print(f"{name}: {value}", file=sys.stderr, flush=True)
    only = " ".join(f'"{name}"' for name in chosen.only)
    command = (
        f"python -m tools.benchmarks.training_memory CHECKPOINT --comfyui COMFYUI --steps {chosen.steps} --only {only}"
    )
    finish(rows, "training_memory.json", command, chosen.record)


if __name__ == "__main__":
    main()
