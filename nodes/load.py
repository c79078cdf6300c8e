"""Load Safety LoRA and Load Task LoRA: files become handles, no weights are touched."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..comfy_host.model_folders import SAFETY_FOLDERS, TASK_FOLDERS, lora_names, lora_path, name_below, shown_name
from ..comfy_host.node_report import CATEGORY
from ..modular_lora.errors import GuardError, LoraFileError
from ..modular_lora.files.cache import kept_lora, kept_sha256
from ..modular_lora.files.reader import LoraFile
from ..modular_lora.files.scales import Scale
from ..modular_lora.files.stacks import Row, parse_stack
from ..modular_lora.guard.build import SafetyLora, TaskLora
from .search_words import found_by
from .sockets import SafetySocket, StackSocket, TaskSocket, rarely

SCALES: dict[str, Scale] = {  # what stands on the node -> see modular_lora.options.Scale
    "refuse if they differ": "refuse",
    "as in the file's tensors": "tensors",
    "as stated in its metadata": "metadata",
}


def missing(name: str | None, folders: tuple[str, ...]) -> str | None:
    """The error for a file that is not there; None where it is, or where the name comes over a link."""
    if name is None:
        return None
    try:
        lora_path(name, *folders)
    except LoraFileError as error:
        return str(error)
    return None


def safety_inputs(strength_tooltip: str) -> list[io.Input]:
    """The file of a safety LoRA and its strength."""
    return [
        io.Combo.Input(
            "lora_name",
            lora_names(*SAFETY_FOLDERS),
            tooltip="Safety LoRA (.safetensors) from the safety_loras or loras folder.",
        ),
        io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=strength_tooltip),
    ]


def safety_problem(lora_name: str | None, strength: float | None) -> str | None:
    """The error for such a file and strength; None for what comes over a link, and where there is none."""
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        return f"strength {strength:g} must be above 0: 0 disables the safety LoRA, a negative value inverts it"
    return missing(lora_name, SAFETY_FOLDERS)


class LoadSafetyLora(io.ComfyNode):
    """One safety LoRA; several are chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraLoadSafety",
            **found_by("lora loader", "load lora", "safety lora", "erase concept", "nsfw", "safety"),
            display_name="Load Safety LoRA",
            category=f"{CATEGORY}/load",
            description="Loads a safety LoRA for Guard Model. It is kept outside the weights, and must apply to every "
            "layer that it names.",
            inputs=rarely(
                [
                    *safety_inputs("Strength on U-Net and text encoder; must be above 0."),
                    io.String.Input(
                        "expected_sha256",
                        default="",
                        optional=True,
                        tooltip="SHA-256 of the file. If given, a different file of the same name is refused.",
                    ),
                    SafetySocket.Input("safety_lora", optional=True, tooltip="Other safety LoRAs, to chain several."),
                    io.Combo.Input(
                        "scale",
                        list(SCALES),
                        default=next(iter(SCALES)),
                        optional=True,
                        tooltip="Which scale (alpha / rank) to use where the file's tensors and its metadata give "
                        "different ones: choose the one of its training. ComfyUI's own loader reads the tensors only.",
                    ),
                ],
                "expected_sha256",
                "scale",
            ),
            outputs=[
                SafetySocket.Output("safety_lora_out", display_name="safety_lora", tooltip="All safety LoRAs so far.")
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None, strength=None) -> bool | str:
        return safety_problem(lora_name, strength) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return kept_sha256(lora_path(lora_name, *SAFETY_FOLDERS))

    @classmethod
    def execute(cls, lora_name, strength, expected_sha256="", safety_lora=(), scale=None) -> io.NodeOutput:
        expected = expected_sha256.strip() or None
        lora = read(lora_path(lora_name, *SAFETY_FOLDERS), SAFETY_FOLDERS, expected)
        lora = lora.with_scale(chosen_scale(scale))
        return io.NodeOutput((*handles(safety_lora, SafetyLora), SafetyLora(lora, strength)))


class LoadTaskLora(io.ComfyNode):
    """One task LoRA; several are chained, and other packs' LORA_STACK comes in and goes out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraLoadTask",
            **found_by("lora loader", "load lora", "style lora", "character lora"),
            display_name="Load Task LoRA",
            category=f"{CATEGORY}/load",
            description="Loads a task LoRA (style, character, ...) for Guard Model. It is kept outside the weights.",
            inputs=rarely(
                [
                    io.Combo.Input(
                        "lora_name",
                        lora_names(*TASK_FOLDERS),
                        tooltip="Task LoRA (.safetensors) from the loras folder.",
                    ),
                    io.Float.Input(
                        "strength_model", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="Strength on the U-Net."
                    ),
                    io.Float.Input(
                        "strength_clip",
                        default=1.0,
                        min=-10.0,
                        max=10.0,
                        step=0.01,
                        tooltip="Strength on the text encoder.",
                    ),
                    io.String.Input(
                        "block_weights",
                        default="",
                        optional=True,
                        tooltip='Factor by block: "1,0.5,..." (BASE, then the blocks) or "IN01:0.5, M00:0"; empty = 1.',
                    ),
                    TaskSocket.Input("task_lora", optional=True, tooltip="Other task LoRAs, to chain several."),
                    StackSocket.Input(
                        "lora_stack", optional=True, tooltip="Task LoRAs as the LORA_STACK of other packs."
                    ),
                ],
                "block_weights",
            ),
            outputs=[
                TaskSocket.Output(
                    "task_lora_out", display_name="task_lora", tooltip="All task LoRAs so far, for Guard Model."
                ),
                StackSocket.Output(
                    "lora_stack_out",
                    display_name="lora_stack",
                    tooltip="The same task LoRAs as a LORA_STACK; without the safety LoRA and without block weights.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None) -> bool | str:
        return missing(lora_name, TASK_FOLDERS) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return kept_sha256(lora_path(lora_name, *TASK_FOLDERS))

    @classmethod
    def execute(
        cls, lora_name, strength_model, strength_clip, block_weights="", task_lora=(), lora_stack=()
    ) -> io.NodeOutput:
        lora = read(lora_path(lora_name, *TASK_FOLDERS), TASK_FOLDERS)
        before = (*handles(task_lora, TaskLora), *stacked(lora_stack))
        tasks = (*before, TaskLora(lora, strength_model, strength_clip, block_weights))
        return io.NodeOutput(tasks, [(stack_name(t), t.strength_model, t.strength_clip) for t in tasks])


def chosen_scale(value: object) -> Scale:
    """See modular_lora.files.scales.Scale; GuardError for a value that no drop-down has."""
    if value is None:
        return "refuse"
    if value not in SCALES:
        raise GuardError(
            f"scale {value!r} is not one of {', '.join(map(repr, SCALES))}: choose one of these.", code="lora.scale"
        )
    return SCALES[value]


def handles(value: object, kind: type[SafetyLora] | type[TaskLora]) -> tuple:
    """The LoRAs on a socket; GuardError for anything else that an any-type node brought there."""
    if isinstance(value, tuple) and all(isinstance(item, kind) for item in value):
        return value
    role = "Safety" if kind is SafetyLora else "Task"
    raise GuardError(
        f"A {role.lower()} LoRA input got a {type(value).__name__}: connect Load {role} LoRA.", code="input.wrong-type"
    )


def stack_name(task: TaskLora) -> str:
    """The name under which a LORA_STACK knows the file: its path below a loras folder, links followed if need be."""
    return name_below(task.lora.path, *TASK_FOLDERS) or task.lora.name


def stacked(lora_stack) -> tuple[TaskLora, ...]:
    """Task LoRAs of a LORA_STACK (see modular_lora.files.stacks); a full path below a loras folder is that file."""
    return tuple(_stacked(row) for row in parse_stack(lora_stack))


def _stacked(row: Row) -> TaskLora:
    name = (name_below(row.name, *TASK_FOLDERS) if os.path.isabs(row.name) else None) or row.name
    try:
        path = lora_path(name, *TASK_FOLDERS)
    except LoraFileError as error:
        raise LoraFileError(f"{row.place}: {error}", code=error.code) from error
    return TaskLora(read(path, TASK_FOLDERS), row.model, row.clip, row.blocks)


def read(path: Path, folders: tuple[str, ...], expected_sha256: str | None = None) -> LoraFile:
    """A LoRA file under the name that people know it by, its path below the folder: two may have one file name."""
    lora = kept_lora(path, expected_sha256=expected_sha256)
    name = shown_name(path, *folders)
    return lora if name == lora.name else replace(lora, name=name)
