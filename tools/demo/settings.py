"""Which files and prompts of the demo world the demo uses."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

from ...modular_lora.util import atomic
from .. import world
from ..bootstrap.console import RunError, say
from ..bootstrap.environment import is_current
from ..bootstrap.paths import LOGS, ROOT
from ..bootstrap.process import run_logged
from ..world import data
from .graphs import Setting

EVERY = {"suppressed": 2, "kept": 30}  # of the world's concepts, in its own order, every so many from the first on
CONCEPTS = data.SUPPRESSED_IDS[:: EVERY["suppressed"]], data.KEPT_IDS[:: EVERY["kept"]]
# Of the vehicles the style in which the evidence counted most of them coming back; of the others the task LoRA's.
STYLES = "twemoji", data.STYLES[data.TASK_STYLE]
SUPPRESSED, KEPT = (
    tuple(f"{style}, {data.WORDS[i]}" for i in ids) for style, ids in zip(STYLES, CONCEPTS, strict=True)
)


@dataclass(frozen=True)
class Shown:
    """The LoRAs that the demo draws with: those of the evidence at equal quality, of one training seed."""

    safety: Path
    task: Path
    sequential: Path
    words: Path


@dataclass(frozen=True)
class DemoWorld:
    """The files, in place."""

    checkpoint: Path
    safety: Path
    task: Path
    sequential: Path
    shown: Shown

    @classmethod
    def at(cls, folder: Path) -> DemoWorld:
        """The world whose checkpoint lies in `folder`; the LoRAs ship with the pack."""
        assets = world.ASSETS
        found = cls(
            folder / world.CHECKPOINT,
            assets / world.SAFETY_LORA,
            assets / world.TASK_LORA,
            assets / world.SEQUENTIAL_LORA,
            Shown(**{role: assets / name for role, name in world.EQUAL.items()}),
        )
        missing = [str(file) for file in (found.checkpoint, *found.loras) if not file.is_file()]
        if missing:
            raise RunError(
                f"demo world: {', '.join(missing)} missing; restore the folder tools/world/ from the repository.",
                code="command.no-world",
            )
        return found

    @classmethod
    def expanded(cls, folder: Path) -> DemoWorld:
        """The same, with the checkpoint written first unless it is there already."""
        live = world.ASSETS / world.LIVE_WEIGHTS
        if not live.is_file():
            raise RunError(
                f"demo world: {live} missing; restore the folder tools/world/ from the repository.",
                code="command.no-world",
            )
        stamp = folder / "world.stamp"
        expected = hashlib.sha256(live.read_bytes() + (ROOT / "tools" / "world" / "expand.py").read_bytes()).hexdigest()
        if not is_current(stamp, expected) or not (folder / world.CHECKPOINT).is_file():
            say("Preparing the demo world (once)")
            folder.mkdir(parents=True, exist_ok=True)
            run_logged(
                [sys.executable, "-m", "tools.world.expand", folder],
                cwd=ROOT,
                title="demo checkpoint",
                log=LOGS / "world.log",
                remedy="Restore the folder tools/world/ from the repository and run the same command again.",
            )
            atomic.write(stamp, expected)
        return cls.at(folder)

    @property
    def loras(self) -> tuple[Path, ...]:
        return self.safety, self.task, self.sequential, *astuple(self.shown)

    def setting(self, *, steps: int, seed: int, prompts: tuple[str, ...] = SUPPRESSED + KEPT) -> Setting:
        """Graphs with the world's own LoRAs."""
        return self._setting(self.safety, self.task, self.sequential, steps, seed, prompts)

    def demo(self, *, steps: int, seed: int, prompts: tuple[str, ...] = SUPPRESSED + KEPT) -> Setting:
        """What all arms of the demo share."""
        return self._setting(self.shown.safety, self.shown.task, self.shown.sequential, steps, seed, prompts)

    def _setting(
        self, safety: Path, task: Path, sequential: Path, steps: int, seed: int, prompts: tuple[str, ...]
    ) -> Setting:
        return Setting(
            checkpoint=self.checkpoint.name,
            safety=safety.name,
            task=task.name,
            sequential=sequential.name,
            words=self.shown.words.name,
            prompts=prompts,
            negative=world.NEGATIVE_PROMPT,
            steps=steps,
            seed=seed,
            cfg=world.CFG,
            sampler=world.SAMPLER,
            scheduler=world.SCHEDULER,
            size=world.SIZE,
        )
