"""Combine Safety LoRAs: several safety LoRAs as one file, each on its own concept only."""

from __future__ import annotations

from itertools import groupby

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.model_folders import SAFETY_FOLDER, model_folder
from ..comfy_host.training_files import published, work_folder
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.places import check_writable
from ..training.safety.closed.options import CombineOptions
from .load import handles
from .search_words import found_by
from .sockets import SafetySocket
from .training import GROUP, gathered, lines_of, more_input, option_inputs, saved_as

NAME = "Combine Safety LoRAs"
OPTIONS = ("output_name", "preserve", "everything_else", "tokens", "save_precision")
OWN = "-"  # a list of concept prompts that is this line: those in the LoRA's own file


def lists_of(text: str) -> list[tuple[str, ...]]:
    """Lists of lines with a blank line between them; an empty list for one that is only `OWN`."""
    parts = groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    lists = [lines_of("\n".join(lines)) for filled, lines in parts if filled]
    return [() if lines == (OWN,) else lines for lines in lists]


class CombineSafetyLoras(io.ComfyNode):
    """Several safety LoRAs as one, by their concepts' words alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraCombineSafety",
            **found_by("merge loras", "combine loras", "lora fusion", "mace", "several concepts"),
            display_name=NAME,
            category=GROUP,
            description="Makes one safety LoRA of several, each on its own concept only, for layers that take the text "
            "alone; without training. Says what each still does to the others' concepts.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader; it is not changed."),
                io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
                SafetySocket.Input(
                    "safety_lora", tooltip="Two or more, chained in Load Safety LoRA, at your strengths."
                ),
                io.String.Input(
                    "concept_prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts of each one's concept, one per line, a blank line between two LoRAs, in the order "
                    "in which they are chained; - for those in its file. Empty: those in every file.",
                ),
                *option_inputs(CombineOptions, OPTIONS),
                more_input("combine-safety"),
                SafetySocket.Input(
                    "more_safety_lora", optional=True, tooltip="Further ones, for instance one that was just made."
                ),
            ],
            outputs=[
                SafetySocket.Output(
                    "safety_lora_out", display_name="safety_lora", tooltip="The new LoRA, for Guard Model."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What each LoRA still does to its own concept, to the others' and to what is preserved.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, safety_lora, concept_prompts, more_options="", more_safety_lora=(), **values
    ) -> io.NodeOutput:
        from ..comfy_host import text_inputs, trainer_model  # imported when it runs, as what trains
        from ..training.safety.closed.combine import combine_safety

        safety = (*handles(safety_lora, SafetyLora), *handles(more_safety_lora, SafetyLora))
        ours = {"output_dir": str(work_folder(values["output_name"]))}
        chosen = gathered(CombineOptions, values, more_options, **ours)
        check_writable(model_folder(SAFETY_FOLDER), f"{SAFETY_FOLDER} folder")
        text = text_inputs.opened(model, clip, NAME)
        made = combine_safety(text, safety, lists_of(concept_prompts), chosen, engine=trainer_model.ENGINE)
        path = published(made.lora.path, SAFETY_FOLDER)
        line = f"{len(safety)} safety LoRAs were combined into one of {len(made.lora.layers)} layers."
        report = f"{line}\n{saved_as(path)}\n{made.report}"
        more = "\n".join((saved_as(path), *made.remarks))
        return io.NodeOutput((SafetyLora(read_lora(path), 1.0),), report, ui=answer(line, more))
