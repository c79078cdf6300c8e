"""Project Task LoRA: a task LoRA's file kept clear of a safety LoRA's row space."""

from __future__ import annotations

import dataclasses
import typing

from comfy_api.latest import io

from ..comfy_host import introspection
from ..comfy_host.answers import answer
from ..comfy_host.model_folders import LORA_FOLDER, model_folder
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.build import SafetyLora, TaskLora
from ..modular_lora.guard.summary import warnings
from ..training.choices import SavePrecision, Sides
from .load import handles
from .search_words import found_by
from .sockets import SafetySocket, TaskSocket
from .training import GROUP, saved_as


class ProjectTaskLora(io.ComfyNode):
    """An existing task LoRA kept clear of a safety LoRA's row space, as a new file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraProjectTask",
            **found_by("orthogonal lora", "lora projection", "remove conflict"),
            display_name="Project Task LoRA",
            category=GROUP,
            description="Removes from a task LoRA what acts on the safety LoRA's inputs. On each layer, and for "
            "inputs in the safety LoRA's row space, both together then give the output of the safety LoRA alone.",
            inputs=[
                io.Model.Input("model", tooltip="The model that gives the layers their names; it is not changed."),
                io.Clip.Input("clip", tooltip="Its CLIP, for layers of the text encoder."),
                TaskSocket.Input("task_lora", tooltip="One task LoRA, from Load Task LoRA."),
                SafetySocket.Input("safety_lora", tooltip="From Load Safety LoRA."),
                io.Combo.Input(
                    "save_precision",
                    list(typing.get_args(SavePrecision)),
                    default="fp16",
                    tooltip="Type of the new file's numbers.",
                ),
                io.Combo.Input(
                    "sides",
                    list(typing.get_args(Sides)),
                    default="input",
                    optional=True,
                    tooltip="What is kept clear: the inputs that the safety LoRA reacts to, the outputs that it "
                    "writes, or both. Each costs some of the task LoRA.",
                ),
            ],
            outputs=[
                TaskSocket.Output("task_lora_out", display_name="task_lora", tooltip="The new LoRA, for Guard Model."),
                io.String.Output("report", display_name="report", tooltip="Energy removed, layer by layer."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, task_lora, safety_lora, save_precision, sides="input") -> io.NodeOutput:
        from ..training import output, projection  # imported when it runs, as what trains

        tasks, safety = handles(task_lora, TaskLora), handles(safety_lora, SafetyLora)
        if len(tasks) != 1:
            raise GuardError(
                f"Project Task LoRA got {len(tasks)} task LoRAs: connect one, and project the others apart.",
                code="project.one-lora",
            )
        task, loras = tasks[0], [s.lora for s in safety]
        infos = (introspection.model_info(model), introspection.clip_info(clip))
        tensors, report = projection.project_file(task.lora, loras, infos, output.DTYPES[save_precision], sides)
        path = model_folder(LORA_FOLDER) / f"{task.lora.path.stem}_projected.safetensors"
        lora = output.write_tensors(path, tensors, output.projected_metadata(task.lora, loras, report))
        text = projection.format_projection(report)
        line = f"Projected: {report.removed:.2%} of the task LoRA's energy was removed."
        shown = answer(line, "\n".join((saved_as(path), *warnings(text))))
        return io.NodeOutput((dataclasses.replace(task, lora=lora),), f"{line}\n{text}", ui=shown)
