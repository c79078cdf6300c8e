"""Calibrate Safety LoRA: what a safety LoRA's activity is on prompts, written into a copy of its file."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.calibrating import calibrated
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.progress import NodeWatch
from ..comfy_host.stock import MAX_SEED
from ..comfy_host.training_files import copy_path
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import activity
from ..modular_lora.guard.build import SafetyLora
from .load import handles
from .search_words import found_by
from .sockets import SafetySocket
from .training import GROUP, lines_of, saved_as


class CalibrateSafetyLora(io.ComfyNode):
    """A copy of a safety LoRA's file by which its activity on a prompt can be judged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        many = f"one per line, {activity.LEAST_PROMPTS} to {activity.MOST_PROMPTS}"
        return io.Schema(
            node_id="ModularLoraCalibrateSafety",
            display_name="Calibrate Safety LoRA",
            category=GROUP,
            **found_by("calibration", "safety activity", "is this prompt about the concept", "lora metadata"),
            description="Measures on your own base how strongly a safety LoRA answers to prompts of its concept and to "
            "prompts that are to be kept, and writes both into a copy of its file. Guarded runs then say whether an "
            "image's prompt is about the concept. The tensors and the original file do not change.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader."),
                io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
                SafetySocket.Input("safety_lora", tooltip="One safety LoRA, from Load Safety LoRA, at your strength."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size that you draw."),
                io.String.Input(
                    "concept_prompts",
                    default="",
                    multiline=True,
                    tooltip=f"Prompts of the concept, {many}; empty: those in the safety LoRA's file.",
                ),
                io.String.Input(
                    "preserved_prompts",
                    default="",
                    multiline=True,
                    tooltip=f"Prompts that are not of the concept, {many}: such as people write for this base.",
                ),
                io.Int.Input("noises", default=2, min=1, max=64, tooltip="Noises for each prompt, one small batch."),
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, control_after_generate=False, tooltip="Seed of the noises."
                ),
                io.String.Input(
                    "output_name", default="safety_calibrated", tooltip="Name of the copy, in models/safety_loras."
                ),
            ],
            outputs=[
                SafetySocket.Output(
                    "safety_lora_out", display_name="safety_lora", tooltip="The copy, for Guard Model."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Both distributions, AUC, bounds, and the copy's SHA-256."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, safety_lora, latent_image, concept_prompts, preserved_prompts, noises, seed, output_name
    ) -> io.NodeOutput:
        policies.check_open("training")
        safety = handles(safety_lora, SafetyLora)
        if len(safety) != 1:
            raise GuardError(
                f"Calibrate Safety LoRA got {len(safety)} safety LoRAs: connect one, and calibrate each apart.",
                code="activity.one-lora",
            )
        target = copy_path(output_name)
        about, preserved = map(lines_of, (concept_prompts, preserved_prompts))
        latent = latent_image["samples"][:1]
        found = calibrated(model, clip, safety[0], about, preserved, latent, noises, seed, NodeWatch(cls))
        made = activity.write_copy(safety[0].lora, target, found)
        report = f"{activity.format_copy(made, target.name)}\n{activity.format_calibration(found)}"
        line = f"A calibrated copy was written, AUC {found.auc:.3f}."
        handle = dataclasses.replace(safety[0], lora=made)
        shown = answer(line, f"{saved_as(target)}\n{activity.format_bounds(found)}")
        return io.NodeOutput((handle,), f"{line}\n{report}", ui=shown)
