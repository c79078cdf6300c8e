"""What the tests of the sd-scripts engine share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import psutil
from modular_lora_guard.training.options import SafetyOptions, TaskOptions

STUB = Path(__file__).parent / "sd_scripts_stub"


def stub_weights():
    """A checkpoint of the stand-in."""
    spec = importlib.util.spec_from_file_location("stub_models", STUB / "library" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models.random_weights(0)


class Interrupted(Exception):
    pass


class Seen:
    """A host that remembers what it was told, and stops after ``stop`` steps."""

    def __init__(self, stop: int = 10**9):
        self.stop, self.stages, self.steps, self.samples, self.children = stop, [], [], [], []

    def check(self):
        if len(self.steps) >= self.stop:
            self.children = psutil.Process().children(recursive=True)
            raise Interrupted

    def stage(self, text, done, total):
        self.stages.append((text, done, total))

    def step(self, step, total, losses):
        self.steps.append((step, total, len(losses)))
        self.losses = losses

    def sample(self, step, images, without=()):
        self.samples += images

    def say(self, text):
        self.said = text


def task_options(place: Path, output: Path, **changes) -> TaskOptions:
    fixed = {"output_name": "mine", "output_dir": str(output), "train_data_dir": str(place / "pictures")}
    fixed |= {"network_dim": 3, "network_alpha": 2.0, "max_train_steps": 4, "resolution": 64, "learning_rate": 0.01}
    return TaskOptions(**(fixed | changes))


def safety_options(output: Path, **changes) -> SafetyOptions:
    fixed = {"output_name": "erased", "output_dir": str(output), "objective": "leco", "concept": ('a "thing"',)}
    fixed |= {"network_dim": 3, "network_alpha": 3.0, "max_train_steps": 4, "preserve": ("a house",)}
    return SafetyOptions(**(fixed | changes))


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]
