"""A pipeline for tests of the audit: cheap, deterministic, writes down what it drew; dies or fails where it is told."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from modular_lora_guard.modular_lora.errors import GuardError


class FakePipeline:
    base_sha256, dtype = "0" * 64, "float32"

    def __init__(self, log: str, die: str = "", device_index: int | None = None) -> None:
        """``log`` gets a line a drawn unit; ``die`` is made by the first death and says that it has been."""
        self.log, self.die, self.device = log, die, f"fake {device_index or 0}"

    def draw(self, arm, items, sampling) -> np.ndarray:
        """Noise of arm, prompt and seed; prompts "die" (once), "die always", "fail" and "crash" do what they say."""
        prompts = [item.prompt for item in items]
        if "die always" in prompts or ("die" in prompts and self._first_time()):
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        if "fail" in prompts:
            raise GuardError("The pipeline fails: it was told to.")
        if "crash" in prompts:
            raise ValueError("no such thing")
        os.write(1, b"a library prints\n")
        shape, arm_key = (sampling.height, sampling.width, 3), list(f"{arm.name} {arm.training_seed}".encode())
        seeds = [[item.seed, *item.prompt.encode(), *arm_key] for item in items]
        images = np.stack([np.random.default_rng(seed).integers(0, 256, shape, np.uint8) for seed in seeds])
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{arm.name} {prompts}\n")
        return images

    def _first_time(self) -> bool:
        """Over all workers."""
        try:
            Path(self.die).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@contextmanager
def open_pipeline(**arguments):
    yield FakePipeline(**arguments)


@contextmanager
def open_missing(checkpoint: str):
    raise GuardError(f"{checkpoint}: no such file: choose another one.")
    yield
