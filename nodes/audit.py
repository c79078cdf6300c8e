"""Audit: every arm of the loaded checkpoint drawn with the same prompts and seeds, judged and counted.

Images stay in ComfyUI's protected user folder, which it does not serve over HTTP; what is published in the output
folder, and what leaves the node, are figures and the contact sheets of arms that the guard itself would serve.
"""

from __future__ import annotations

import shutil

from comfy_api.latest import io, ui

from ..audit.options import AuditOptions
from ..comfy_host.answers import answer
from ..comfy_host.audit_inputs import CELLS, LORAS, MORE, NONE, NUMBERS, loras, prompt_file, prompt_files
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.model_folders import TASK_FOLDERS, lora_names, offered, output_folder
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.progress import NodeWatch, image_tensor
from ..comfy_host.stock import sampler_names, scheduler_names
from ..comfy_host.training_files import check_name
from ..modular_lora.places import check_writable
from ..modular_lora.util.file_state import file_state
from .search_words import found_by
from .sockets import GateSocket, rarely
from .training import option_inputs

PUBLISHED = "modular_lora_audit"  # in the output folder
RARELY = ("first_seed", "unit_size", "other_words", "more_options")  # see sockets.rarely


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
        named = [*loras(values).values(), *filter(None, (prompt_file(values.get(f"{c}_file")) for c in CELLS))]
        return [(str(path), file_state(path)) for path in named]

    @classmethod
    def execute(cls, model, clip, vae, name, gate=None, style=None, **values) -> io.NodeOutput:
        from ..audit import session  # what audits is imported when it does: ComfyUI's start is shorter by it
        from ..audit.engines import Local
        from ..audit.report import to_json
        from ..audit.words import format_differences, format_report
        from ..comfy_host import auditing
        from ..comfy_host.pipeline import ComfyPipeline

        policies.check_open("audit")
        check_name("name", name, "a folder")
        folder = policies.folder() / "audit" / name
        made = auditing.options_of(folder, values)
        auditing.check_starts(made)
        place = output_folder() / PUBLISHED / name
        check_writable(place, "output folder")
        pipeline = ComfyPipeline(model, clip, vae)
        auditing.check_shown(model, clip, made)
        shutil.rmtree(folder / auditing.SHEETS, ignore_errors=True)  # of cells that this audit may not have
        judge = auditing.judge(gate, style)
        report = session.run(made, Local(pipeline), NodeWatch(cls), "Audit node", judge)
        auditing.publish(folder, place)
        page = f"page: output/{PUBLISHED}/{name}/index.html"
        names = {row.arm for row in report.rows}
        line = f"Audited {len(names)} arm{'s' * (len(names) != 1)}: the image has their concept rates and the table."
        chart = image_tensor(auditing.plot(report))
        shown = answer(
            line, "\n".join((*format_differences(report), page)), **ui.PreviewImage(chart, cls=cls).as_dict()
        )
        text = f"{line}\n{format_report(report)}\n{page}"
        return io.NodeOutput(text, to_json(report), chart, image_tensor(auditing.sheets(folder)), ui=shown)


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
    files = [NONE, *offered(prompt_files())]
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
