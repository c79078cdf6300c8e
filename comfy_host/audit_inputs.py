"""What a graph may say of an audit: its options, LoRAs of the model folders, and prompts of the input folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modular_lora.errors import GuardError
from .model_folders import SAFETY_FOLDERS, TASK_FOLDERS, input_folder, lora_path

NONE = "none"
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
PROMPT_FILES = (".txt", ".lst", ".csv", ".tsv", ".json", ".jsonl")


def loras(values: Mapping[str, Any]) -> dict[str, Path]:
    """Option -> file of every LoRA that was chosen; LoraFileError where one is not there."""
    return {o: lora_path(values[o], *folders) for o, folders in LORAS.items() if values.get(o) not in (None, NONE)}


def prompt_files() -> list[str]:
    """Names of the input folder's files that may hold prompts."""
    root = input_folder()
    return sorted(p.name for p in root.iterdir() if p.suffix.lower() in PROMPT_FILES) if root.is_dir() else []


def prompt_file(name: str | None) -> Path | None:
    """Path of what a drop-down names, which ComfyUI 0.3.75 does not check a value against; None for none."""
    if name in (None, NONE):
        return None
    if name not in prompt_files():
        raise GuardError(
            f"Prompts {name!r} are not in the input folder: put the file there and refresh the page.",
            code="audit.no-prompts-file",
        )
    return input_folder() / name
