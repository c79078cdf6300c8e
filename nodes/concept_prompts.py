"""Write Concept Prompts: what a safety LoRA is for, written into a copy of its file."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.training_files import copy_path
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import concept
from ..modular_lora.guard.build import SafetyLora
from .load import handles
from .search_words import found_by
from .sockets import SafetySocket
from .training import GROUP, lines_of, saved_as


class WriteConceptPrompts(io.ComfyNode):
    """A copy of a safety LoRA's file by whose prompts its functional strength can be measured."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraConceptPrompts",
            **found_by("concept prompts", "lora metadata", "functional strength"),
            display_name="Write Concept Prompts",
            category=GROUP,
            description="Writes prompts of the concept that a safety LoRA erases into a copy of its file, so that "
            "Guard Model can measure on them how much of its effect is left beside other LoRAs. The tensors and the "
            "original file do not change.",
            inputs=[
                SafetySocket.Input("safety_lora", tooltip="One safety LoRA, from Load Safety LoRA."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=f"Prompts of the concept that the LoRA erases, one per line, at most {concept.MOST}.",
                ),
                io.String.Input(
                    "output_name", default="safety_with_prompts", tooltip="Name of the copy, in models/safety_loras."
                ),
            ],
            outputs=[
                SafetySocket.Output(
                    "safety_lora_out", display_name="safety_lora", tooltip="The copy, for Guard Model."
                ),
                io.String.Output("report", display_name="report", tooltip="The copy's name, prompts and SHA-256."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, safety_lora, prompts, output_name) -> io.NodeOutput:
        policies.check_open("training")
        safety = handles(safety_lora, SafetyLora)
        if len(safety) != 1:
            raise GuardError(
                f"Write Concept Prompts got {len(safety)} safety LoRAs: connect one, and write each apart.",
                code="concept.one-lora",
            )
        lora, target = safety[0].lora, copy_path(output_name)
        lines = lines_of(prompts)
        made = concept.write_copy(lora.path, target, lines, expected_sha256=lora.sha256)
        report = concept.written(made, target.name)
        line = f"A copy with {len(lines)} concept prompt{'s' * (len(lines) != 1)} was written."
        shown = answer(line, saved_as(target))
        return io.NodeOutput((dataclasses.replace(safety[0], lora=made),), report, ui=shown)
