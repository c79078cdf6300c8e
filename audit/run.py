"""Runs an audit: what is finished stays, the rest is drawn by an engine, everything is judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..modular_lora.command import Watch
from ..modular_lora.errors import GuardError
from .engines import Engine
from .judge import Judge
from .plan import Arm, Item, Origin, Sampling, Unit, units
from .results import Drawn
from .store import Store

logger = logging.getLogger("modular_lora")


@dataclass(frozen=True)
class Audit:
    """What is drawn: every item by every arm."""

    arms: tuple[Arm, ...]
    items: tuple[Item, ...]
    sampling: Sampling
    unit_size: int = 8  # images a batch; decides pixels, since a batch of another size rounds otherwise

    def __post_init__(self):
        if not self.arms or not self.items:
            raise GuardError(
                f"The audit has {len(self.arms)} arms and {len(self.items)} items: give one of each.",
                code="audit.empty",
            )
        if self.unit_size < 1:
            raise GuardError(f"unit_size: {self.unit_size} must be above 0: correct it.", code="audit.unit-size")
        names = [f"{arm.name}-{arm.training_seed}" for arm in self.arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise GuardError(
                f"Arm {twice[0]} is there twice: give every arm its own name or training seed.", code="audit.arm-twice"
            )


@dataclass(frozen=True)
class Ran(Sequence[Drawn]):
    """The images in the plan's order, and how they came about; a sequence of Drawn."""

    drawn: tuple[Drawn, ...]
    origin: Origin
    units: int
    reused: int  # of them, finished before this run
    twice: int  # finished by another process in the same folder while this one drew them
    replaced: int  # workers that died and were replaced; their units were drawn by others

    def __getitem__(self, index):
        return self.drawn[index]

    def __len__(self) -> int:
        return len(self.drawn)

    def lines(self) -> list[str]:
        """For the report, one line a fact."""
        lines = [f"images: {len(self)} in {self.units} units, on {self.origin.device} in {self.origin.dtype}"]
        lines.append(f"units finished before this run: {self.reused} of {self.units}")
        if self.twice:
            lines.append(f"units that another process finished first, so that its images count: {self.twice}")
        if self.replaced:
            lines.append(f"workers that died and were replaced, whose units were drawn again: {self.replaced}")
        return lines


def run_audit(audit: Audit, engine: Engine, judge: Judge, folder: Path, watch: Watch) -> Ran:
    """Draw what is missing in ``folder``, judge all of it.

    An interrupt (whatever ``watch.check`` raises) or an error leaves finished units and verdicts to go on from. Raises
    GuardError where an image file is missing or changed, a worker fails, or workers die again and again.
    """
    store = Store(folder)
    with engine.open(watch.check) as pool:
        plan = list(units(audit.arms, audit.items, audit.sampling, pool.origin, audit.unit_size))
        missing = list({store.place(unit): unit for unit in plan if not store.finished(unit)}.values())
        _say_what_for(store, audit, plan, len(missing), pool.origin)
        total = len(audit.arms) * len(audit.items)
        done = total - sum(len(unit.items) for unit in missing)
        watch.stage("drawing", done, total)
        for unit, images in pool.draw(missing, watch.check):
            store.put(unit, images)
            done += len(unit.items)
            watch.stage("drawing", done, total)
        replaced = pool.replaced()
    drawn = _judged(plan, store, judge, watch, total)
    return Ran(tuple(drawn), pool.origin, len(plan), len(plan) - len(missing), store.twice, replaced)


def _judged(plan: list[Unit], store: Store, judge: Judge, watch: Watch, total: int) -> list[Drawn]:
    """Every unit is read, so that no verdict counts for an image that is gone or changed."""
    drawn: list[Drawn] = []
    identity = judge.identity
    for unit in plan:
        watch.check()
        images = store.images(unit)
        verdicts = store.verdicts(unit, identity)
        if verdicts is None:
            verdicts = judge.judge(images)
            store.put_verdicts(unit, identity, verdicts)
        judged = zip(unit.items, store.paths(unit), verdicts, strict=True)
        drawn += [Drawn(unit.arm, item, path, verdict) for item, path, verdict in judged]
        watch.stage("judging", len(drawn), total)
    return drawn


def _say_what_for(store: Store, audit: Audit, plan: list[Unit], missing: int, origin: Origin) -> None:
    """The manifest; a folder that was for another audit is used on, and only units of equal keys with it."""
    said = json.loads(json.dumps(asdict(audit) | {"origin": asdict(origin)}))
    before = store.manifest()
    if before and before.get("audit") != said:
        logger.info("audit: %s was for another audit, %d of %d units fit", store.folder, len(plan) - missing, len(plan))
    store.put_manifest({"audit": said, "units": len(plan), "missing": missing})
