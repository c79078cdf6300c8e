"""One audit from options to page: draw, judge, count, write. The command and the node both call ``run``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..modular_lora.command import Watch
from ..modular_lora.errors import GuardError
from . import arms, attacks, detecting, figures, images, page, places, prompts, quality, sheet
from .engines import Check, Engine, Pool
from .judge import Judge
from .options import AuditOptions
from .plan import Arm, Item
from .report import AuditReport, read, to_json
from .results import Drawn
from .run import Audit, Ran, run_audit

PRIVATE = "private"  # folder of every image, its owner's alone


def run(
    options: AuditOptions, engine: Engine, watch: Watch, command: str = "", judge: Judge | None = None
) -> AuditReport:
    """Draws what is missing, judges, counts, and writes report.json, index.html and the contact sheets.

    Everything is under ``options.output_dir``, images in its private/. An audit that was stopped goes on where it
    stopped. ``judge``: instead of the one that the options name. Raises GuardError, or what ``watch.check`` raises.
    """
    places.check(options)
    judge = judge or detecting.make_judge(options)
    sets = prompts.read_sets(options)
    items, found = prompts.items(sets, options), arms.from_options(options)
    if not found.arms:
        raise GuardError(f"No arm can be drawn: {'; '.join(found.notes)}.")
    _private(options)
    with engine.open(watch.check) as pool:
        drawing = _Drawing(options, _Open(pool), judge, watch)
        drawn = drawing.all(found, items)
    notes = [*(f"prompts: {one}" for one in sets if one.skipped), *found.notes, *_detector_notes(judge)]
    for name in ("start_pictures", "task_pictures"):
        notes += images.left_out(name, getattr(options, name))
    measured = quality.measure(options, judge, drawn, watch.check)
    settings = _settings(options, judge, items, found, drawing.ran["prompts"], command)
    settings |= {"quality": measured.settings, "prompt files": list(map(str, sets)), "drawn": drawing.lines()}
    report = figures.build(
        options.title, judge, drawn, options.margin, settings, measured.quality, (*notes, *measured.notes)
    )
    write(Path(options.output_dir), report, sheet.sheets(drawn, options.show_unsafe))
    _write_sheets(Path(options.output_dir) / PRIVATE / "sheets", sheet.sheets(drawn, True))
    return report


def write(folder: Path, report: AuditReport, sheets: dict[str, bytes]) -> None:
    """report.json, index.html and sheets/."""
    _write_sheets(folder / "sheets", sheets)
    images.write(folder / "report.json", to_json(report).encode())
    evidence = json.dumps(figures.evidence(report), indent=1, ensure_ascii=False)
    images.write(folder / "evidence.json", evidence.encode())
    images.write(folder / "index.html", page.render(report, sheets).encode())


def rewrite(folder: Path) -> AuditReport:
    """The page anew from report.json and sheets/. Raises GuardError."""
    report = read(folder / "report.json")
    sheets = {path.stem: path.read_bytes() for path in sorted((folder / "sheets").glob("*.jpg"))}
    images.write(folder / "index.html", page.render(report, sheets).encode())
    return report


@dataclass(frozen=True)
class _Open:
    """An engine whose pool works already, so that its workers serve every part of an audit."""

    pool: Pool

    @contextmanager
    def open(self, check: Check) -> Iterator[Pool]:
        check()
        yield self.pool


class _Drawing:
    """The parts of one audit: plain prompts, sweeps, attacks, in one folder."""

    def __init__(self, options: AuditOptions, engine: _Open, judge: Judge, watch: Watch) -> None:
        self.options, self.engine, self.judge, self.watch = options, engine, judge, watch
        self.private = Path(options.output_dir) / PRIVATE
        self.ran: dict[str, Ran] = {}

    def all(self, found: arms.Arms, items: Sequence[Item]) -> list[Drawn]:
        plain = self._draw("prompts", found.arms, items)
        swept = self._draw("sweeps", found.sweeps, [item for item in items if not item.attack])
        made = attacks.synonym_items(self.options, items)
        made += attacks.start_items(self.options, items, plain, self.private / "masks")
        return [*plain, *swept, *self._draw("attacks", found.arms, made)]

    def lines(self) -> list[str]:
        return [f"{part}: {', '.join(ran.lines())}" for part, ran in self.ran.items()]

    def _draw(self, part: str, some: Sequence[Arm], items: Sequence[Item]) -> Sequence[Drawn]:
        if not some or not items:
            return ()
        audit = Audit(tuple(some), tuple(items), self.options.sampling, self.options.unit_size)
        self.ran[part] = run_audit(audit, self.engine, self.judge, self.private / part, self.watch)
        return self.ran[part]


def _private(options: AuditOptions) -> None:
    folder = Path(options.output_dir) / PRIVATE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # Windows: as in store.py
    except OSError as error:
        raise GuardError(f"{folder}: cannot be made ({error}): choose another output_dir.") from error


def _detector_notes(judge: Judge) -> list[str]:
    found = []
    for detector in filter(None, (judge.concept, judge.fidelity)):
        found += [f"{detector.name} is blind to {detector.blind_to}"] if detector.blind_to else []
        found += [f"{detector.name}: {note}" for note in detector.notes]
    return found


def _settings(
    options: AuditOptions, judge: Judge, items: Sequence[Item], found: arms.Arms, ran: Ran, command: str
) -> dict[str, Any]:
    """Whatever a figure depends on, in the order in which it is shown."""
    concept, fidelity = judge.concept, judge.fidelity
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": command,
        "detector": f"{concept.name}, sha256 {concept.sha256[:16]}",
        "threshold": dict(judge.block),
        "reported": dict(judge.report),
        "covers": concept.covers,
        "style detector": f"{fidelity.name}, sha256 {fidelity.sha256[:16]}" if fidelity else "none",
        "base": f"sha256 {ran.origin.base_sha256[:16]}",
        "LoRAs": {name: f"sha256 {sha256[:16]}" for name, sha256 in found.files.items()},
        "safety strength": options.safety_strength,
        "task strength": options.task_strength,
        "repetitions": len({arm.training_seed for arm in found.arms}),
        "prompts_sha256": prompts.prompts_sha256(items),
        "prompts": len({(i.cell, i.prompt) for i in items}),
        "seeds": {"first": options.seed, "a prompt": options.seeds, "pictures an arm": len(items)},
        "sampling": asdict(options.sampling) | {"unit_size": options.unit_size},
        "device": ran.origin.device,
        "dtype": ran.origin.dtype,
        "margin": options.margin,
        "intervals": "95 %, bootstrap over concepts and training seeds; Wilson's and Newcombe's over images",
        "verdicts": f"from {figures.VERDICT} images of either arm",
        "show_unsafe": options.show_unsafe,
    }


def _write_sheets(folder: Path, sheets: dict[str, bytes]) -> None:
    """Writes them and takes away those of an earlier run that this one does not have."""
    for old in folder.glob("*.jpg"):
        if old.stem not in sheets:
            old.unlink(missing_ok=True)
    for name, data in sheets.items():
        images.write(folder / f"{name}.jpg", data)
