"""CPU-seconds of a training step, and memory, beside sd-scripts, ComfyUI's own trainer and the bare step, side by side.

    python -m tools.benchmarks.training CHECKOUT CHECKPOINT --comfyui COMFYUI --tokenizers FOLDER [--python PYTHON]

CHECKPOINT: stock SD1.5 layout, full width; where it is no file yet, one with random weights is written there. Every
program (`training_programs` says what each is; sd-scripts is its own script, unchanged) trains a LoRA of rank 8 on the
U-Net at 256² and batch 1, ComfyUI's on every weight, as it does. They take turns, one process each; in every process
the processor time of all its threads is read at every step, and the first step, which also warms up, does not count. A
ratio is taken within a round; its median over the rounds is recorded. Memory is the largest resident size from the
start of training on, without what loading took.
"""

from __future__ import annotations

import argparse
import os
import re
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
from .figures import ROOT
from .training_programs import BEGUN, IMAGES, PIXELS, RANK, RATE, STEP

THEIRS = "sd-scripts"
PROGRAMS = {  # program -> its name in the figures
    THEIRS: THEIRS,
    "ours": "ours",
    "comfyui": "ComfyUI's trainer",
    "bare": "bare step",
    "bare-products": "bare step, small convolutions as products",
}
MARKS = {  # what is printed when training begins, and at every step
    THEIRS: (re.compile("running training"), re.compile(r"steps:.*?\s(\d+)/\d+ \[")),
    "": (re.compile(f"^{BEGUN}$"), re.compile(rf"^{STEP} (\d+)$")),
}


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    step: float  # CPU-seconds, user and system, mean of all steps but the first
    peak: float  # GiB resident since training began


def main() -> None:
    made = parser(__doc__, "training.json")
    made.add_argument("checkout", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--tokenizers", type=Path, required=True, help="tokenizer_cache_dir of sd-scripts")
    made.add_argument("--python", default=sys.executable, help="interpreter that sd-scripts runs with")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--precisions", nargs="+", default=["no"], choices=("no", "bf16"))
    made.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=tuple(PROGRAMS))
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(work)
        if not options.checkpoint.is_file():
            subprocess.run(program("checkpoint", options, work, "no"), check=True, cwd=ROOT)
        costs = {precision: measure(options, work, precision) for precision in options.precisions}
    report(options, costs)


def write_images(work: Path) -> None:
    """Images of noise with captions, and the data set's TOML."""
    folder, generator = work / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(IMAGES):
        noise = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((PIXELS, PIXELS)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing number {i}", encoding="utf-8")
    head = f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = {PIXELS}\nbatch_size = 1\n"
    table = f"{head}[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    (work / "data.toml").write_text(table, encoding="utf-8")


def measure(options: argparse.Namespace, work: Path, precision: str) -> list[dict[str, Cost]]:
    """What every program cost, round by round; every other round goes backwards."""
    rounds = []
    for turn in range(options.rounds):
        rounds.append({})
        for name in options.programs[:: -1 if turn % 2 else 1]:
            rounds[-1][name] = cost = run(name, program(name, options, work, precision), options)
            sys.stderr.write(f"{precision} {name}: {cost.step:.2f} CPU-s a step, {cost.peak:.2f} GiB\n")
    return rounds


def program(name: str, options: argparse.Namespace, work: Path, precision: str) -> list[str]:
    """The command of a program."""
    if name != THEIRS:
        values = {"checkpoint": options.checkpoint.absolute(), "comfyui": options.comfyui, "data": work / "data.toml",
                  "precision": precision, "steps": options.steps}  # fmt: skip
        return [sys.executable, "-m", "tools.benchmarks.training_programs", name, *_arguments(values)]
    values = {
        "pretrained_model_name_or_path": options.checkpoint.absolute(), "dataset_config": work / "data.toml",
        "output_dir": work / "theirs", "output_name": "lora", "save_model_as": "safetensors", "save_precision": "fp16",
        "tokenizer_cache_dir": options.tokenizers, "learning_rate": RATE, "network_dim": RANK, "network_alpha": RANK,
        "mixed_precision": precision, "optimizer_type": "AdamW", "seed": 42, "max_data_loader_n_workers": 0,
        "lr_scheduler": "constant", "network_module": "networks.lora", "max_train_steps": options.steps,
    }  # fmt: skip
    flags = ["--cache_latents", "--sdpa", "--no_half_vae", "--network_train_unet_only"]
    return [options.python, str(options.checkout / "train_network.py"), *flags, *_arguments(values)]


def _arguments(values: dict[str, object]) -> list[str]:
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def run(name: str, command: list[str], options: argparse.Namespace) -> Cost:
    """A whole process; RuntimeError with its last lines where it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.Popen(
        command,
        cwd=options.checkout if name == THEIRS else ROOT,
        env=os.environ | offline | threads,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    begin, step = MARKS.get(name, MARKS[""])
    begun, peaks, spent, lines = threading.Event(), [], {}, []
    sampler = threading.Thread(target=_watch, args=(child.pid, begun, peaks))
    sampler.start()
    for line in child.stdout:
        lines.append(line)
        if begin.search(line):
            begun.set()
        if (found := step.search(line)) and int(found[1]) > 0:
            spent.setdefault(int(found[1]), _spent(child.pid))
    code = child.wait()
    sampler.join()
    if code or not begun.is_set() or len(spent) != options.steps:
        raise RuntimeError(f"{name} ended with exit code {code}, {len(spent)} steps seen:\n{''.join(lines[-20:])}")
    return Cost((spent[options.steps] - spent[1]) / (options.steps - 1), max(peaks))


def _spent(pid: int) -> float:
    """Processor seconds of a process up to now."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


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


def report(options: argparse.Namespace, costs: dict[str, list[dict[str, Cost]]]) -> None:
    """Medians over the rounds, and of their ratios, into docs/figures/training.json."""
    rows: dict[str, object] = {}
    for precision, rounds in costs.items():
        words = {"no": "fp32"}.get(precision, precision)
        others = [PROGRAMS[name] for name in options.programs if name != "ours"]
        beside = "" if THEIRS in options.programs else f", beside {' and '.join(others)}"  # a run of its own
        for name in options.programs:
            step, peak = (statistics.median(getattr(one[name], part) for one in rounds) for part in ("step", "peak"))
            of = words + (beside if name == "ours" else "")
            rows[f"step cpu-s, {PROGRAMS[name]}, {of}"] = round(step, 2)
            if not name.startswith("bare"):
                rows[f"peak GiB in training, {PROGRAMS[name]}, {of}"] = round(peak, 2)
        for name in options.programs if "ours" in options.programs else ():
            if name != "ours":
                ratio = statistics.median(one["ours"].step / one[name].step for one in rounds)
                rows[f"step cpu-s / {PROGRAMS[name]}, {words}"] = round(ratio, 3)
            if name == THEIRS:
                ratio = statistics.median(one["ours"].peak / one[name].peak for one in rounds)
                rows[f"peak memory / {THEIRS}, {words}"] = round(ratio, 3)
    command = "python -m tools.benchmarks.training CHECKOUT CHECKPOINT --comfyui COMFYUI --tokenizers FOLDER"
    for name in ("rounds", "threads", "steps", "precisions", "programs"):
        value = getattr(options, name)
        command += f" --{name} {value if isinstance(value, int) else ' '.join(map(str, value))}"
    finish(rows, "training.json", command, options.record)


if __name__ == "__main__":
    main()
