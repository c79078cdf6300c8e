"""CPU-seconds and memory of a training step, ours beside a real sd-scripts checkout, alternating in one run.

    python -m tools.benchmarks.training CHECKOUT CHECKPOINT --comfyui COMFYUI --tokenizers FOLDER [--python PYTHON]

CHECKPOINT: stock SD1.5 layout, full width (random weights will do). Both train a rank-8 LoRA on the U-Net at 256² and
batch 1 with the same pictures. A step's cost is the difference of two whole processes, many steps and few, by their
number; memory is the largest resident size from the start of training on, without what loading took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from .bench import finish, parser
from .figures import FOLDER, ROOT

BEGUN = {"sd-scripts": "running training", "ours": "caching latents: 4 of 4"}  # what each prints when training starts


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    cpu: float  # seconds, user and system
    peak: float  # GiB resident since training began


def main() -> None:
    made = parser(__doc__)
    made.add_argument("checkout", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--tokenizers", type=Path, required=True, help="tokenizer_cache_dir of sd-scripts")
    made.add_argument("--python", default=sys.executable, help="interpreter that sd-scripts runs with")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--steps", type=int, nargs=2, default=(2, 8), help="few and many")
    made.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    made.add_argument("--programs", nargs="+", default=list(BEGUN), choices=tuple(BEGUN))
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pictures(work)
        costs = {p: measure(options, work, p) for p in options.precisions}
    report(options, costs)


def pictures(work: Path) -> None:
    """Four pictures of noise with captions, and the data set's TOML."""
    folder, generator = work / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):
        noise = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 256)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing number {i}", encoding="utf-8")
    head = "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 256\nbatch_size = 1\n"
    table = f"{head}[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    (work / "data.toml").write_text(table, encoding="utf-8")


def measure(options: argparse.Namespace, work: Path, precision: str) -> dict[str, list[tuple[float, float]]]:
    """(CPU-seconds a step, GiB) of every round, by program; the two alternate."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in options.programs}
    for _ in range(options.rounds):
        for name in found:
            command = ours if name == "ours" else theirs
            few, many = (run(name, command(options, work, precision, n), options) for n in options.steps)
            found[name].append(((many.cpu - few.cpu) / (options.steps[1] - options.steps[0]), many.peak))
            sys.stderr.write(f"{precision} {name}: {found[name][-1][0]:.2f} CPU-s a step, {many.peak:.2f} GiB\n")
    return found


def theirs(options: argparse.Namespace, work: Path, precision: str, steps: int) -> list[str]:
    values = {
        "pretrained_model_name_or_path": options.checkpoint, "dataset_config": work / "data.toml",
        "output_dir": work / "theirs", "output_name": "lora", "save_model_as": "safetensors", "save_precision": "fp16",
        "tokenizer_cache_dir": options.tokenizers, "learning_rate": 1e-4, "network_dim": 8, "network_alpha": 8,
        "mixed_precision": precision, "optimizer_type": "AdamW", "seed": 42, "max_data_loader_n_workers": 0,
        "lr_scheduler": "constant", "network_module": "networks.lora", "max_train_steps": steps,
    }  # fmt: skip
    flags = ["--cache_latents", "--sdpa", "--no_half_vae", "--network_train_unet_only"]
    return [options.python, str(options.checkout / "train_network.py"), *flags, *_arguments(values)]


def ours(options: argparse.Namespace, work: Path, precision: str, steps: int) -> list[str]:
    values = {
        "checkpoint": options.checkpoint, "comfyui": options.comfyui, "dataset_config": work / "data.toml",
        "output_dir": work / "ours", "learning_rate": 1e-4, "network_dim": 8, "network_alpha": 8,
        "mixed_precision": precision, "lr_scheduler": "constant", "max_train_steps": steps,
    }  # fmt: skip
    return [sys.executable, "-m", "training", "train-task", "--cpu", *_arguments(values)]


def _arguments(values: dict[str, object]) -> list[str]:
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def run(name: str, command: list[str], options: argparse.Namespace) -> Cost:
    """A whole process; RuntimeError with its last lines where it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    where = options.checkout if name == "sd-scripts" else ROOT
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen(
        command,
        cwd=where,
        env=os.environ | offline | threads,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    begun, peaks = threading.Event(), []
    sampler = threading.Thread(target=_watch, args=(child.pid, begun, peaks))
    sampler.start()
    lines = []
    for line in child.stdout:
        lines.append(line)
        if BEGUN[name] in line:
            begun.set()
    code = child.wait()
    sampler.join()
    if code or not begun.is_set():
        raise RuntimeError(f"{name} failed with exit code {code}:\n{''.join(lines[-20:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, max(peaks))


def _watch(pid: int, begun: threading.Event, peaks: list[float]) -> None:
    """Resident GiB, ten times a second, from ``begun`` on."""
    while True:
        try:
            size = psutil.Process(pid).memory_info().rss / 2**30
        except psutil.Error:
            return
        if not size:
            return
        if begun.is_set():
            peaks.append(size)
        time.sleep(0.1)


def report(options: argparse.Namespace, costs: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Medians of the rounds, and their ratios, into docs/figures/training.json."""
    rows: dict[str, object] = {}
    middle = {
        (p, name): [statistics.median(column) for column in zip(*runs, strict=True)]
        for p, both in costs.items()
        for name, runs in both.items()
    }
    base = middle.get(("no", "sd-scripts")) or _before("sd-scripts, fp32")
    for (precision, name), (cpu, peak) in middle.items():
        words = {"no": "fp32"}.get(precision, precision)
        rows[f"step cpu-s, {name}, {words}"] = round(cpu, 2)
        rows[f"peak GiB in training, {name}, {words}"] = round(peak, 2)
        if name == "ours" and base:
            rows[f"step cpu-s / sd-scripts, {words}"] = round(cpu / base[0], 3)
            rows[f"peak memory / sd-scripts, {words}"] = round(peak / base[1], 3)
    command = "python -m tools.benchmarks.training CHECKOUT CHECKPOINT --comfyui COMFYUI --tokenizers FOLDER"
    for name in ("rounds", "threads", "steps", "precisions", "programs"):
        value = getattr(options, name)
        command += f" --{name} {value if isinstance(value, int) else ' '.join(map(str, value))}"
    finish(rows, "training.json", command, True)


def _before(which: str) -> tuple[float, float] | None:
    """What an earlier run recorded of fp32, where this one measured half precision alone."""
    path = FOLDER / "training.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    found = {row["name"]: row["value"] for row in rows}
    names = (f"step cpu-s, {which}", f"peak GiB in training, {which}")
    return tuple(found[name] for name in names) if all(name in found for name in names) else None


if __name__ == "__main__":
    main()
