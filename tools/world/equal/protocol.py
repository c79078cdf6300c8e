"""What is trained, drawn and counted: equal_quality.toml, and the cells that it asks for in the order of the work.

A cell is one arm: of one safety recipe, task and training seed, as far as the arm depends on them. Its images are those
of `images`, one after another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from modular_lora_guard.modular_lora import options as optionfile

from .. import ASSETS, data

WORLD = ASSETS.parent
PACK = WORLD.parents[1]
FILE = WORLD / "equal_quality.toml"
RECIPE = WORLD / "recipes" / "safety.toml"  # prompts of the recipes that are trained
INK = "ink"  # the task whose style the judge was not taught: drawing.py
ARMS = ("base", "safety", "task", "sequential", "sequential_full", "modular", "projected", "safety_first")
OF_RECIPE_AND_TASK = ("sequential", "modular", "safety_first", "projected", "sequential_full")
VEHICLES, KEPT, STYLED = "vehicles", "kept", "styled"


class Image(NamedTuple):
    """One image that is asked for."""

    kind: str  # VEHICLES; KEPT: kept concepts in base styles; STYLED: kept concepts with the task's word
    concept: int
    style: int
    seed: int  # of its noise

    @property
    def prompt(self) -> str:
        return f"{data.STYLES[self.style]}, {data.WORDS[self.concept]}"


@dataclass(frozen=True)
class Cell:
    """One arm; what it does not depend on is "" or 0."""

    arm: str
    recipe: str = ""
    task: str = ""
    training_seed: int = 0

    def __str__(self) -> str:
        parts = (self.recipe, self.task, f"training seed {self.training_seed}" if self.training_seed else "")
        return ": ".join([", ".join(part for part in parts if part), self.arm]).removeprefix(": ")


@dataclass(frozen=True)
class Protocol:
    """equal_quality.toml, or a smaller one for tests."""

    said: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path = FILE) -> Protocol:
        return cls(optionfile.parse(path))

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, comments aside, and of the prompts that the trained recipes have."""
        said = [self.said, optionfile.parse(RECIPE)]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def recipes(self) -> Mapping[str, Mapping[str, Any]]:
        return self.said["recipes"]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.said["training_seeds"])

    @property
    def tasks(self) -> Mapping[str, str]:
        return self.said["tasks"]

    def safety_seed(self, recipe: str, training_seed: int) -> int:
        """A recipe that is not trained has one safety LoRA for all training seeds."""
        return 0 if "file" in self.recipes[recipe] else training_seed

    def images(self) -> tuple[Image, ...]:
        """All images of an arm, in order."""
        how = self.said["images"]
        styles = range(len(data.STYLES))
        asked = [(VEHICLES, c, s) for _ in range(how["vehicles"]) for s in styles for c in data.SUPPRESSED_IDS]
        for kind, gloss in ((KEPT, False), (STYLED, True)):
            asked += [(kind, c, s) for c, s in data.cases(data.KEPT_IDS, gloss, how[kind])]
        return tuple(Image(*one, how["seed"] + i) for i, one in enumerate(asked))

    def cells(self) -> Iterator[Cell]:
        """In the order in which an unfinished run says most: every recipe and arm of one training seed, then the next
        seed, then the next task. A cell comes after those that it is made from.
        """
        done = set()
        for task in self.tasks:
            for seed in self.seeds:
                wanted = [Cell("base"), Cell("task", "", task, seed)]
                for recipe in self.recipes:
                    wanted.append(Cell("safety", recipe, "", self.safety_seed(recipe, seed)))
                    wanted += [Cell(arm, recipe, task, seed) for arm in OF_RECIPE_AND_TASK]
                for cell in wanted:
                    if cell not in done:
                        done.add(cell)
                        yield cell
