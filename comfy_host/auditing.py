"""An audit of loaded models as its node runs it: the options of a graph, what a graph may not name, and what is shown.

The node imports this when it runs: nothing that audits is imported when ComfyUI starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..audit import arms, images, prompts
from ..audit.judge import Judge
from ..audit.options import AuditOptions
from ..audit.plan import GUARDED
from ..audit.report import AuditReport
from ..audit.words import rates
from ..gate.finding import Detector
from ..modular_lora import options
from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora
from . import patcher
from .audit_inputs import CELLS, MORE, NUMBERS, loras, prompt_file
from .charts import INK, PAPER, below, chart, table
from .gating import checked
from .model_folders import input_folder

FILES = ("index.html", "report.json", "evidence.json")
SHEETS = "sheets"
WIDTH, ROW = 640, 30  # pixels of the plot; a node shows it at about two thirds of its size


def options_of(folder: Path, values: Mapping[str, Any]) -> AuditOptions:
    """The audit's options; prompts given as text are written to files beside the images."""
    extra = options.parse(values.get("more_options", ""))
    if refused := sorted(set(extra) - set(MORE)):
        raise GuardError(
            f"more_options: {refused[0]} cannot be set here; it takes {', '.join(MORE)}.", code="audit.option-refused"
        )
    ours: dict[str, Any] = {"output_dir": str(folder), "seed": values["first_seed"]}
    ours |= {option: (str(path),) for option, path in loras(values).items()}
    for cell in CELLS:
        ours[f"{cell}_prompts"] = tuple(str(path) for path in _prompt_paths(folder / "words", cell, values))
    if words := values.get("other_words", "").strip():
        ours["synonyms"] = str(_written(folder / "words" / "synonyms.txt", words))
    plain = ("safety_strength", "task_strength", "sampler", "scheduler", *NUMBERS)
    return options.load(AuditOptions, None, {"title": values["safety"]} | extra | ours | {n: values[n] for n in plain})


def _prompt_paths(folder: Path, cell: str, values: Mapping[str, Any]) -> Iterator[Path]:
    if text := values[f"{cell}_prompts"].strip():
        columns = text.splitlines()[0].replace('"', "").split(",")
        table = "prompt" in (column.strip().lower() for column in columns)
        yield _written(folder / f"{cell}.{'csv' if table else 'txt'}", text)
    if path := prompt_file(values[f"{cell}_file"]):
        yield path


def _written(path: Path, text: str) -> Path:
    images.write(path, text.encode())
    return path


def check_starts(made: AuditOptions) -> None:
    """GuardError for start images outside the input folder, which a graph must not read."""
    folder = input_folder()
    root = Path(os.path.realpath(folder))
    found = (prompt for one in prompts.read_sets(made, folder) for prompt in one.prompts)
    for name in (name for prompt in found for name in (prompt.start, prompt.mask) if name):
        if not Path(os.path.realpath(name)).is_relative_to(root):
            raise GuardError(
                f"Start image {Path(name).name!r} is outside ComfyUI's input folder: put it there.",
                code="audit.start-outside",
            )


def check_shown(model, clip, made: AuditOptions) -> None:
    """GuardError where the guard would not serve an arm whose images are shown as guarded."""
    for arm in arms.from_options(made).arms:
        if arm.name not in GUARDED:
            continue
        read = [read_lora(Path(p.path), expected_sha256=p.sha256, scale=p.scale) for p in arm.parts]
        files = list(zip(arm.parts, read, strict=True))
        safety = tuple(SafetyLora(lora, part.strength) for part, lora in files if part.role == "safety")
        tasks = tuple(TaskLora(lora, part.strength, part.strength) for part, lora in files if part.role == "task")
        patcher.guard(model, clip, safety, tasks, False, GuardLimits())


def judge(gate: object, style: object) -> Judge:
    """The detectors of the node's two Gate Settings; ``style`` None: the task's fidelity is not judged."""
    chosen = checked(gate)
    fidelity: Detector | None = None if style is None else checked(style).detector
    return Judge(chosen.detector, chosen.settings.block, chosen.settings.report, fidelity)


def publish(folder: Path, place: Path) -> None:
    """Page, figures and the guarded arms' sheets, for the output folder; nothing else of the audit."""
    shutil.rmtree(place / SHEETS, ignore_errors=True)
    for path in (*(folder / name for name in FILES), *sorted((folder / SHEETS).glob("*.jpg"))):
        images.write(place / path.relative_to(folder), path.read_bytes())


def sheets(folder: Path) -> Image.Image:
    """The published contact sheets under their names; one black pixel where no guarded arm was drawn."""
    found = [(path.stem, Image.open(BytesIO(path.read_bytes()))) for path in sorted((folder / SHEETS).glob("*.jpg"))]
    if not found:
        return Image.new("RGB", (1, 1))
    paper = Image.new("RGB", (max(s.width for _, s in found), sum(s.height + ROW for _, s in found)), PAPER)
    draw, top = ImageDraw.Draw(paper), 0
    for name, one in found:
        draw.text((8, top + 8), f"prompts: {name}", INK)
        paper.paste(one, (0, top + ROW))
        top += one.height + ROW
    return paper


def plot(report: AuditReport) -> Image.Image:
    """Concept rate of every arm on what is suppressed; thick the bootstrap's interval, thin with ends Wilson's.

    Below it the table of all rates.
    """
    rows = [row for row in report.rows if row.cell == "suppressed" and not row.attack] or list(report.rows)

    def put(figure) -> None:
        from ..audit.plots import put_rates  # with matplotlib, which chart() can do without

        put_rates(figure, rows)

    return below(chart(WIDTH, ROW * (len(rows) + 3), put), table(WIDTH, rates(report)))
