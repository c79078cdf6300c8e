"""LoRA Interference: how safety and task LoRAs overlap, layer by layer, as a table and an image."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..comfy_host import introspection
from ..comfy_host.answers import answer
from ..comfy_host.interference_chart import MOST, images
from ..comfy_host.node_report import CATEGORY
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora, build_part
from ..modular_lora.guard.report import format_interference
from ..modular_lora.guard.summary import warnings
from .load import handles, stacked
from .search_words import found_by
from .sockets import SafetySocket, StackSocket, TaskSocket


class LoraInterference(io.ComfyNode):
    """A report only: it changes nothing and refuses nothing that fits the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraInterference",
            **found_by("compare lora", "lora conflict", "cosine", "lora similarity", "analyse lora", "analyze lora"),
            display_name="LoRA Interference",
            category=f"{CATEGORY}/load",
            description="Cosine, energy overlap and net safety strength of safety and task LoRAs on every layer. A "
            "negative cosine across layers is the mark of a task LoRA trained on top of a safety-tuned model (arXiv "
            "2412.00357).",
            inputs=[
                io.Model.Input("model", tooltip="The model that gives the layers their names; it is not changed."),
                SafetySocket.Input("safety_lora", tooltip="From Load Safety LoRA."),
                TaskSocket.Input("task_lora", optional=True, tooltip="From Load Task LoRA."),
                StackSocket.Input("lora_stack", optional=True, tooltip="Task LoRAs from another pack's stacker."),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="One line per layer."),
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip=f"The {MOST} layers with the lowest net strength, each with a bar of its cosine; one image "
                    "per safety LoRA.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, safety_lora, task_lora=(), lora_stack=()) -> io.NodeOutput:
        safety, tasks = handles(safety_lora, SafetyLora), (*handles(task_lora, TaskLora), *stacked(lora_stack))
        part = build_part("model", introspection.model_info(model), safety, tasks, GuardLimits(), enforce=False)
        for line in (line for line in part.lines if line.refusal):
            raise GuardError(line.refusal, code="lora.applies-nowhere")
        table = "\n\n".join(format_interference(lora.name, result) for lora, result in part.interference)
        image = images([(lora.name, result) for lora, result in part.interference])
        nets = [result.net_strength for _, result in part.interference]
        beside = f"beside {len(tasks)} task LoRA{'s' * (len(tasks) != 1)}"
        first = (
            f"A net strength of {min(nets):.3f} is left {beside}." if nets else "No layer of this model is compared."
        )
        shown = answer(first, "\n".join(warnings(table)), **ui.PreviewImage(image, cls=cls).as_dict())
        return io.NodeOutput(table, image, ui=shown)
