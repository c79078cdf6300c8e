"""Guarded runs with faults between and inside them: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability faults CHECKPOINT --comfyui COMFYUI --record

Before each guarded run, by seed, a model is swapped, a task LoRA is swapped, the base is sampled without the guard,
everything is unloaded, memory is asked for, or nothing. Half of the runs are then ended from inside a random layer of
a random evaluation: by an interrupt, an error, or an error for lack of memory. After each run, ComfyUI is asked for the
unguarded base, or to unload all; then no layer may carry a branch, and tensors of network, text encoder and VAE, drawn
at random, must hold the bits that they held at first: all of them every fifty runs and at the end. A run that was not
ended must read "guarded" and give the latent, bit for bit, that it gave before the first fault.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from modular_lora_guard.comfy_host import standalone
from modular_lora_guard.modular_lora.guard.build import GuardLimits

from ..world import ASSETS, SAFETY_LORA, SEQUENTIAL_LORA, TASK_LORA
from .bench import finish, loras, parser

TASKS = (TASK_LORA, SEQUENTIAL_LORA)
STEPS, SIDE = 2, 8  # of a latent: images of 64 pixels
SEEDS = 3
SOME, ALL_EVERY = 12, 50  # tensors that are looked at after each run; runs between looks at all
BETWEEN = ("nothing", "nothing", "task LoRA swapped", "unguarded run", "unloaded", "memory asked for", "model swapped")
INSIDE = ("interrupt", "error in a layer", "out of memory in a layer")
_log = logging.getLogger("modular_lora")


class _LayerError(RuntimeError):
    """What a layer is made to raise."""


@dataclass
class Count:
    """What became of the runs."""

    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    changed: set[str] = field(default_factory=set)  # tensors of the base
    wrong: list[str] = field(default_factory=list)  # runs that were not as they must be, and branches left behind
    resident: list[float] = field(default_factory=list)  # MiB after each run

    @property
    def growth(self) -> float:
        """Median of the last hundred (or last tenth) less that of the first, MiB."""
        part = min(100, max(1, len(self.resident) // 10))
        return statistics.median(self.resident[-part:]) - statistics.median(self.resident[:part])


class Rig:
    """The demo world in ComfyUI in this process, guarded with one task LoRA or another."""

    def __init__(self, checkpoint: Path):
        self.host = importlib.import_module("modular_lora_guard.comfy_host.patcher")
        self.drawing = importlib.import_module("modular_lora_guard.comfy_host.pipeline")
        self.management = importlib.import_module("comfy.model_management")
        self._encode = importlib.import_module("nodes").CLIPTextEncode().encode
        self.checkpoint = checkpoint
        self.model, self.clip, self.vae = self.drawing.load(checkpoint)
        self.bits = {name: _digest(tensor) for name, tensor in self.base().items()}
        self.references: dict[tuple, str] = {}
        self.swap(None)
        for task in (None, *TASKS):
            self.swap(task)
            for seed in range(SEEDS):
                self.references[task, seed] = self.sample(seed)

    def base(self) -> dict[str, torch.Tensor]:
        """Every weight and buffer of W0 by name."""
        parts = {"model": self.model.model, "text": self.clip.cond_stage_model, "vae": self.vae.first_stage_model}
        return {f"{part}.{k}": t for part, module in parts.items() for k, t in module.state_dict().items()}

    def swap(self, task: str | None) -> None:
        """Guard the base anew with the safety LoRA and this task LoRA."""
        safety, tasks = loras(ASSETS / SAFETY_LORA, [(ASSETS / task, 0.7)] if task else ())
        self.task = task
        self.guarded, clip = self.host.guard(self.model, self.clip, safety, tasks, False, GuardLimits())
        self.conds = [self._encode(clip, text)[0] for text in ("gloss, cat face", "")]

    def sample(self, seed: int) -> str:
        """One guarded run: digest of its latent. RuntimeError where it is not attested."""
        patcher = self.host.unwrap(self.guarded)
        latent = self._draw(patcher, seed)
        if (status := self.host.attestation(patcher).status) != "guarded":
            raise RuntimeError(f"the run reads {status!r}")
        return _digest(latent)

    def _draw(self, patcher, seed: int) -> torch.Tensor:
        latent = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
        settings = (seed, STEPS, 2.0, "euler", "normal", *self.conds, latent)
        return self.host.common_ksampler(patcher, *settings)["samples"]

    def between(self, what: str, rng: Random) -> None:
        """What happens before a run."""
        if what == "task LoRA swapped":
            self.swap(rng.choice([task for task in (None, *TASKS) if task != self.task]))
        elif what == "unguarded run":
            self._draw(self.model, 0)
        elif what == "unloaded":
            self.management.unload_all_models()
        elif what == "memory asked for":
            self.management.free_memory(1e30, self.drawing.device())
        elif what == "model swapped":
            other, *_ = self.drawing.load(self.checkpoint)
            self._draw(other, 0)

    def settle(self, rng: Random) -> int:
        """ComfyUI is asked for the unguarded base, or to unload all; layers that still carry a branch."""
        if rng.random() < 0.5:
            self.management.load_models_gpu([self.model])
        else:
            self.management.unload_all_models()
        modules = (*self.model.model.modules(), *self.clip.cond_stage_model.modules())
        return sum("forward" in module.__dict__ for module in modules)

    def changed(self, names: Sequence[str]) -> set[str]:
        """Which of these tensors hold other bits than at first, or are gone."""
        now = self.base()
        return {name for name in names if name not in now or _digest(now[name]) != self.bits[name]}

    @contextmanager
    def fault(self, what: str, rng: Random) -> Iterator[list[str]]:
        """A layer that, when it is called for the n-th time, ends the run; yields whether it was called."""
        layers = [m for m in self.model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear)]
        left, struck = rng.randrange(STEPS), []

        def strike(*_) -> None:
            nonlocal left
            left -= 1
            if left >= 0 or struck:
                return
            struck.append(what)
            if what == "interrupt":
                self.management.interrupt_current_processing(True)
            elif what == "error in a layer":
                raise _LayerError(what)
            else:
                raise torch.OutOfMemoryError(what)

        handle = rng.choice(layers).register_forward_pre_hook(strike)
        try:
            yield struck
        finally:
            handle.remove()
            self.management.interrupt_current_processing(False)


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def one_run(rig: Rig, rng: Random, count: Count) -> None:
    """One guarded run with what comes before it, inside it and after it."""
    between = rng.choice(BETWEEN)
    inside = rng.choice(INSIDE) if rng.random() < 0.5 else "none"
    rig.between(between, rng)
    seed, said = rng.randrange(SEEDS), ""
    ended = (_LayerError, torch.OutOfMemoryError, rig.management.InterruptProcessingException)
    with rig.fault(inside, rng) if inside != "none" else _no_fault() as struck:
        try:
            if rig.sample(seed) != rig.references[rig.task, seed]:
                said = "gave another latent than before the first fault"
            elif struck:
                said = "went on to its end"
        except ended as error:
            if not struck:
                said = f"ended with {type(error).__name__}"
        except Exception as error:
            said = f"ended with {type(error).__name__}: {error}"
    count.runs += 1
    count.faults.update({f"before: {between}": 1, f"inside: {inside}": 1})
    if left := rig.settle(rng):
        said = f"{said}; {left} layers kept a branch"
    if said:
        count.wrong.append(f"run {count.runs} ({between}, {inside}) {said}")
        _log.error(count.wrong[-1])


@contextmanager
def _no_fault() -> Iterator[list[str]]:
    yield []


def run(rig: Rig, runs: int, seed: int) -> Count:
    """That many guarded runs; the base is compared after each in part, every fifty runs and at the end as a whole."""
    count, rng, names = Count(), Random(seed), list(rig.bits)
    resident = importlib.import_module("psutil").Process(os.getpid()).memory_info
    begun = time.monotonic()
    for i in range(runs):
        one_run(rig, rng, count)
        whole = (i + 1) % ALL_EVERY == 0 or i + 1 == runs
        count.changed |= rig.changed(names if whole else rng.sample(names, min(SOME, len(names))))
        gc.collect()
        count.resident.append(resident().rss / 2**20)
        if whole:
            _log.info("%d runs, %.0f s, %.0f MiB", count.runs, time.monotonic() - begun, count.resident[-1])
    return count


def stop_where_interrupted() -> None:
    """As ComfyUI's server does, ask after each step whether to stop (main.py's progress hook, 0.3.75 and 0.33.0)."""
    management, utils = map(importlib.import_module, ("comfy.model_management", "comfy.utils"))
    utils.set_progress_bar_global_hook(lambda *_, **__: management.throw_exception_if_processing_interrupted())
    utils.set_progress_bar_enabled(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no tensor changed and every run was as it must be, else 1."""
    made = parser(__doc__, "reliability.json", checkpoint=True, part="faults")
    made.add_argument("--runs", type=int, default=1000, help="guarded runs (1000)")
    made.add_argument("--seed", type=int, default=1, help="of the faults (1)")
    chosen = made.parse_args(arguments)
    standalone.start(chosen.comfyui, cpu=True)
    stop_where_interrupted()
    logging.basicConfig(format="%(message)s", force=True)  # last: ComfyUI sets up logging of its own
    _log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    begun = time.monotonic()
    with torch.inference_mode():  # as ComfyUI's executor runs
        rig = Rig(chosen.checkpoint)
        count = run(rig, chosen.runs, chosen.seed)
    rows = {
        "runs with faults": count.runs,
        "base tensors changed": len(count.changed),
        "runs with faults: tensors of the base": len(rig.bits),
        "runs with faults: runs that were not as they must be": len(count.wrong),
        "runs with faults: kinds": ", ".join(f"{name} {n}" for name, n in sorted(count.faults.items())),
        "rss growth (MiB)": round(count.growth, 1),
        "runs with faults: seconds": round(time.monotonic() - begun),
    }
    told = f"CHECKPOINT --runs {chosen.runs} --seed {chosen.seed}"
    finish(rows, "reliability.json", f"python3 -m tools.benchmarks.reliability faults {told}", chosen.record)
    return int(bool(count.changed or count.wrong))


if __name__ == "__main__":
    sys.exit(main())
