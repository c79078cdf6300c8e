"""Whether the memory that a training says it will take is what it takes: resident memory beside what was counted.

    python -m tools.benchmarks.training_memory CHECKPOINT --comfyui COMFYUI [--record]

Trainings of a few steps on the demo world, without the count in front of them. The process's resident memory is read
every few milliseconds from before the first step on; then one micro-batch is counted as `training/memory.py` does it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
import tempfile
import threading
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
    "task, rank 64, batch 4": TASK | {"network_dim": 64, "network_alpha": 64.0, "train_batch_size": 4},
    "safety, esd-x": SAFETY,
}


class Watched:
    """The most resident memory of this process above what it had at first, in bytes."""

    def __enter__(self) -> Watched:
        gc.collect()
        if name := ctypes.util.find_library("c"):
            trim = getattr(ctypes.CDLL(name), "malloc_trim", None)
            if trim is not None:
                trim(0)  # what was freed before must not be taken for room
        self._process, self._done = psutil.Process(), threading.Event()
        self.first = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.most - self.first


def measured(host, chosen, values: dict[str, Any], steps: int) -> tuple[int, int]:
    """(foreseen, taken) bytes of one training."""
    found: list[int] = []
    train = loop._train

    def watched(run: loop._Fit, *given: Any) -> None:
        run.job.prepare(run.step)
        with Watched() as seen:
            train(run, *given)
        need = memory.foresee(lambda: run.job.loss(0, 0), run.masters.values, run.options, run.device)
        found.extend((need.total, seen.growth))

    loop._train = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            cls, train_it = (
                (options.SafetyOptions, safety.train_safety)
                if "concept" in values
                else (options.TaskOptions, task.train_task)
            )
            made = cls(output_dir=folder, max_train_steps=steps, **values)
            loaded = host.load_checkpoint(chosen.checkpoint, None, made.mixed_precision)
            with host.opened(*loaded, made) as host_model:
                train_it(host_model, made, cli.TrainingLines(), engine="benchmark")
    finally:
        loop._train = train
    return found[0], found[1]


def main() -> None:
    made = parser(__doc__, "training_memory.json", checkpoint=True)
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    chosen = made.parse_args()
    torch.set_num_threads(1)
    host = cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True})
    rows: dict[str, object] = {}
    for name in chosen.only:
        foreseen, taken = measured(host, chosen, RUNS[name], chosen.steps)
        value = f"{memory.size(foreseen)} said, {memory.size(taken)} taken"
        rows[name] = {"value": value, "ratio": round(foreseen / taken, 3)}
        print(f"{name}: {value}", file=sys.stderr, flush=True)
    finish(
        rows, "training_memory.json", "python -m tools.benchmarks.training_memory CHECKPOINT --record", chosen.record
    )


if __name__ == "__main__":
    main()
