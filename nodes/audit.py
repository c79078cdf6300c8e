"""Audit: every arm of the loaded checkpoint drawn with the same prompts and seeds, judged and counted.

Images stay in ComfyUI's protected user folder, which it does not serve over HTTP; what is published in the output
folder, and what leaves the node, are figures and the contact sheets of arms that the guard itself would serve.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..audit import arms, images, prompts, session
from ..audit.engines import Local
from ..audit.judge import Judge
from ..audit.options import AuditOptions
from ..audit.plan import GUARDED
from ..audit.report import AuditReport, to_json
from ..audit.words import format_differences, format_report, rates
from ..comfy_host import patcher
from ..comfy_host.answers import answer
from ..comfy_host.charts import INK, PAPER, below, chart, table
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.gating import checked
from ..comfy_host.model_folders import (
    SAFETY_FOLDERS,
    TASK_FOLDERS,
    input_folder,
    lora_names,
    lora_path,
    offered,
    output_folder,
)
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.pipeline import ComfyPipeline
from ..comfy_host.progress import NodeWatch, image_tensor
from ..comfy_host.stock import sampler_names, scheduler_names
from ..comfy_host.training_files import check_name
from ..gate.finding import Detector
from ..modular_lora import options
from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora
from ..modular_lora.places import check_writable
from ..modular_lora.util.file_state import file_state
from .search_words import found_by
from .sockets import GateSocket, rarely
from .training import option_inputs

NONE = "none"
PUBLISHED = "modular_lora_audit"  # in the output folder
FILES = ("index.html", "report.json", "evidence.json")
SHEETS = "sheets"
PROMPT_FILES = (".txt", ".lst", ".csv", ".tsv", ".json", ".jsonl")
CELLS = {"unsafe": "what is suppressed", "kept": "what must stay", "task": "what the task LoRA is for"}
LORAS = {  # option -> model folders that its file may be in
    "safety": SAFETY_FOLDERS,
    "task": TASK_FOLDERS,
    "sequential": TASK_FOLDERS,
    "projected": TASK_FOLDERS,
}
NUMBERS = ("seeds", "steps", "cfg", "width", "height", "unit_size")
MORE = (  # what more_options may set: nothing that names a file, folder or package
    "title", "arms", "project", "max_prompts", "negative", "img2img", "inpaint", "safety_sweep", "task_sweep", "margin",
    "safety_scale",
)  # fmt: skip
RARELY = ("first_seed", "unit_size", "other_words", "more_options")  # see sockets.rarely
WIDTH, ROW = 640, 30  # pixels of the plot; a node shows it at about two thirds of its size


class Audit(io.ComfyNode):
    """The audit of one set of LoRAs; see audit.session."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraAudit",
            **found_by("evaluate lora", "benchmark", "nsfw", "red team", "safety test", "compare lora", "i2p"),
            display_name="Audit",
            category=f"{CATEGORY}/audit",
            description="Samples the same prompts and seeds with every arm (base, safety LoRA, task LoRA, sequential, "
            "modular, projected, model arithmetic), runs a detector, and reports what changed, with intervals. It "
            "continues where it was stopped. Images stay in a private folder of the server.",
            inputs=rarely(
                [*_model_inputs(), *_lora_inputs(), *_prompt_inputs(), *_sampling_inputs(), *_judge_inputs()], *RARELY
            ),
            outputs=[
                io.String.Output("report", display_name="report", tooltip="Rates, intervals, differences, remarks."),
                io.String.Output(
                    "json", display_name="json", tooltip="The same figures, with everything they depend on."
                ),
                io.Image.Output("plot", display_name="plot", tooltip="Concept rate by arm, with intervals."),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="Contact sheets of the guarded arms; the regions of the detector's hits are blanked.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **values):
        named = [*_loras(values).values(), *filter(None, (_prompt_file(values.get(f"{c}_file")) for c in CELLS))]
        return [(str(path), file_state(path)) for path in named]

    @classmethod
    def execute(cls, model, clip, vae, name, gate=None, style=None, **values) -> io.NodeOutput:
        policies.check_open("audit")
        folder = policies.folder() / "audit" / _checked_name(name)
        made = _options(folder, values)
        _check_starts(made)
        place = output_folder() / PUBLISHED / name
        check_writable(place, "output folder")
        pipeline = ComfyPipeline(model, clip, vae)
        _check_shown(model, clip, made)
        shutil.rmtree(folder / SHEETS, ignore_errors=True)  # of cells that this audit may not have
        report = session.run(made, Local(pipeline), NodeWatch(cls), "Audit node", _judge(gate, style))
        publish(folder, place)
        page = f"page: output/{PUBLISHED}/{name}/index.html"
        names = {row.arm for row in report.rows}
        line = f"Audited {len(names)} arm{'s' * (len(names) != 1)}: the image has their concept rates and the table."
        chart = image_tensor(plot(report))
        shown = answer(
            line, "\n".join((*format_differences(report), page)), **ui.PreviewImage(chart, cls=cls).as_dict()
        )
        text = f"{line}\n{format_report(report)}\n{page}"
        return io.NodeOutput(text, to_json(report), chart, image_tensor(sheets(folder)), ui=shown)


def _model_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader; it is not changed."),
        io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
        io.Vae.Input("vae", tooltip="The VAE that decodes the images."),
        io.String.Input("name", default="audit", tooltip="Name of the audit. The same name continues it."),
    ]


def _lora_inputs() -> list[io.Input]:
    files = lora_names(*TASK_FOLDERS)
    strength = {"default": 1.0, "step": 0.05, "round": 0.01, "max": 10.0}
    combo = io.Combo.Input
    return [
        combo("safety", lora_names(*LORAS["safety"]), tooltip="The safety LoRA."),
        combo("task", [NONE, *files], default=NONE, tooltip="Task LoRA, trained on the checkpoint alone."),
        combo("sequential", [NONE, *files], default=NONE, tooltip="Task LoRA trained on the safety-tuned checkpoint."),
        combo("projected", [NONE, *files], default=NONE, tooltip="Task LoRA projected clear of the safety LoRA."),
        io.Float.Input("safety_strength", min=0.05, tooltip="Strength of the safety LoRA.", **strength),
        io.Float.Input("task_strength", min=-10.0, tooltip="Strength of the task LoRAs.", **strength),
    ]


def _prompt_inputs() -> list[io.Input]:
    files = [NONE, *offered(_prompt_files())]
    made = []
    for cell, what in CELLS.items():
        text = f"Prompts for {what}, one per line; or a table whose first line is prompt,concept,style,seed,negative."
        file = f"File of prompts for {what}, in the input folder (I2P's CSV and lists of attacks are understood)."
        made += [
            io.String.Input(f"{cell}_prompts", default="", multiline=True, tooltip=text),
            io.Combo.Input(f"{cell}_file", files, default=NONE, tooltip=file),
        ]
    return made


def _sampling_inputs() -> list[io.Input]:
    seeds, *settings = option_inputs(AuditOptions, NUMBERS)
    first = "Seed of the first image; every prompt has seeds of its own, the same in all arms."
    return [
        seeds,
        io.Int.Input("first_seed", default=1, min=0, max=2**63 - 1, tooltip=first),
        *settings,
        io.Combo.Input("sampler", sampler_names(), default="euler", tooltip="Sampling algorithm."),
        io.Combo.Input(
            "scheduler", scheduler_names(), default="normal", tooltip="How the noise is removed over the steps."
        ),
    ]


def _judge_inputs() -> list[io.Input]:
    gate = "Gate Settings: the detector of what is suppressed, and its thresholds; without one, the default detector."
    style = "Gate Settings with a classifier of styles, for the task's fidelity; its thresholds do not matter."
    words = "Attack by synonyms: lines of 'word = other, other'; empty: none."
    more = f"Further options as TOML, named as on the command line: {', '.join(MORE)}."
    return [
        GateSocket.Input("gate", optional=True, tooltip=gate),
        GateSocket.Input("style", optional=True, tooltip=style),
        io.String.Input("other_words", default="", multiline=True, optional=True, tooltip=words),
        io.String.Input("more_options", default="", multiline=True, optional=True, tooltip=more),
    ]


def _checked_name(name: str) -> str:
    check_name("name", name, "a folder")
    return name


def _options(folder: Path, values: Mapping[str, Any]) -> AuditOptions:
    """The audit's options; prompts given as text are written to files beside the images."""
    extra = options.parse(values.get("more_options", ""))
    if refused := sorted(set(extra) - set(MORE)):
        raise GuardError(
            f"more_options: {refused[0]} cannot be set here; it takes {', '.join(MORE)}.", code="audit.option-refused"
        )
    ours: dict[str, Any] = {"output_dir": str(folder), "seed": values["first_seed"]}
    ours |= {option: (str(path),) for option, path in _loras(values).items()}
    for cell in CELLS:
        ours[f"{cell}_prompts"] = tuple(str(path) for path in _prompt_paths(folder / "words", cell, values))
    if words := values.get("other_words", "").strip():
        ours["synonyms"] = str(_written(folder / "words" / "synonyms.txt", words))
    plain = ("safety_strength", "task_strength", "sampler", "scheduler", *NUMBERS)
    return options.load(AuditOptions, None, {"title": values["safety"]} | extra | ours | {n: values[n] for n in plain})


def _loras(values: Mapping[str, Any]) -> dict[str, Path]:
    """Option -> file of every LoRA that was chosen; LoraFileError where one is not there."""
    return {o: lora_path(values[o], *folders) for o, folders in LORAS.items() if values.get(o) not in (None, NONE)}


def _prompt_paths(folder: Path, cell: str, values: Mapping[str, Any]) -> Iterator[Path]:
    if text := values[f"{cell}_prompts"].strip():
        columns = text.splitlines()[0].replace('"', "").split(",")
        table = "prompt" in (column.strip().lower() for column in columns)
        yield _written(folder / f"{cell}.{'csv' if table else 'txt'}", text)
    if path := _prompt_file(values[f"{cell}_file"]):
        yield path


def _written(path: Path, text: str) -> Path:
    images.write(path, text.encode())
    return path


def _prompt_files() -> list[str]:
    root = input_folder()
    return sorted(p.name for p in root.iterdir() if p.suffix.lower() in PROMPT_FILES) if root.is_dir() else []


def _prompt_file(name: str | None) -> Path | None:
    """Path of what a drop-down names, which ComfyUI 0.3.75 does not check a value against; None for none."""
    if name in (None, NONE):
        return None
    if name not in _prompt_files():
        raise GuardError(
            f"Prompts {name!r} are not in the input folder: put the file there and refresh the page.",
            code="audit.no-prompts-file",
        )
    return input_folder() / name


def _check_starts(made: AuditOptions) -> None:
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


def _check_shown(model, clip, made: AuditOptions) -> None:
    """GuardError where the guard would not serve an arm whose images are shown as guarded."""
    for arm in arms.from_options(made).arms:
        if arm.name not in GUARDED:
            continue
        read = [read_lora(Path(p.path), expected_sha256=p.sha256, scale=p.scale) for p in arm.parts]
        loras = list(zip(arm.parts, read, strict=True))
        safety = tuple(SafetyLora(lora, part.strength) for part, lora in loras if part.role == "safety")
        tasks = tuple(TaskLora(lora, part.strength, part.strength) for part, lora in loras if part.role == "task")
        patcher.guard(model, clip, safety, tasks, False, GuardLimits())


def _judge(gate: object, style: object) -> Judge:
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

    def plot(figure) -> None:
        importlib.import_module("..audit.plots", __package__).put_rates(figure, rows)

    return below(chart(WIDTH, ROW * (len(rows) + 3), plot), table(WIDTH, rates(report)))
