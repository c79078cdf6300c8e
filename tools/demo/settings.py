"""Which files and prompts of the demo world the demo uses."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ...modular_lora.util import atomic
from .. import world
from ..bootstrap.console import RunError, say
from ..bootstrap.environment import is_current
from ..bootstrap.paths import LOGS, ROOT
from ..bootstrap.process import run_logged
from .graphs import Setting

SUPPRESSED = ("gloss, racing car", "gloss, helicopter", "gloss, sailboat", "gloss, tractor")
KEPT = ("gloss, cat face", "gloss, pizza", "gloss, cactus", "gloss, guitar")


@dataclass(frozen=True)
class DemoWorld:
    """The files, in place."""

    checkpoint: Path
    safety: Path
    task: Path
    sequential: Path

    @classmethod
    def at(cls, folder: Path) -> DemoWorld:
        """The world whose checkpoint lies in `folder`; the LoRAs ship with the pack."""
        assets = world.ASSETS
        found = cls(
            folder / world.CHECKPOINT,
            assets / world.SAFETY_LORA,
            assets / world.TASK_LORA,
            assets / world.SEQUENTIAL_LORA,
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
        return self.safety, self.task, self.sequential

    def setting(self, *, steps: int, seed: int, prompts: tuple[str, ...] = SUPPRESSED + KEPT) -> Setting:
        """What all arms of the demo share."""
        return Setting(
            checkpoint=self.checkpoint.name,
            safety=self.safety.name,
            task=self.task.name,
            sequential=self.sequential.name,
            prompts=prompts,
            negative=world.NEGATIVE_PROMPT,
            steps=steps,
            seed=seed,
            cfg=world.CFG,
            sampler=world.SAMPLER,
            scheduler=world.SCHEDULER,
            size=world.SIZE,
        )
