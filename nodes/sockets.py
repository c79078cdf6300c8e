"""The pack's socket types and what its nodes share: category, LoRA drop-downs, the report on a node."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..modular_lora.errors import GuardError, LoraFileError
from ..modular_lora.files import ENDINGS, sha256_file

CATEGORY = "modular lora"
SAFETY_FOLDER = "safety_loras"
DETECTOR_FOLDER = "modular_lora_detectors"  # ONNX classifiers and their labels
PRESET_FOLDER = "modular_lora_gates"  # settings of gates, as JSON

SafetySocket = io.Custom("MODULAR_LORA_SAFETY")
TaskSocket = io.Custom("MODULAR_LORA_TASK")
GuardedSocket = io.Custom("MODULAR_LORA_GUARDED_MODEL")
StackSocket = io.Custom("LORA_STACK")
GateSocket = io.Custom("MODULAR_LORA_GATE")


def model_input() -> io.Input:
    """A guarded model, or a MODEL that is checked to be guarded."""
    tip = "Guarded model from Guard Model, or the MODEL of Guarded Model as MODEL; an unguarded MODEL is refused."
    return io.MultiType.Input("model", [GuardedSocket, io.Model], tooltip=tip)


def register_folders() -> None:
    """Give safety LoRAs, detectors and gates' presets model folders of their own."""
    for folder in (SAFETY_FOLDER, DETECTOR_FOLDER, PRESET_FOLDER):
        folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))


def lora_names(*folders: str) -> list[str]:
    """Names of the safetensors files in these model folders, each once, the first folder's first."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return list(dict.fromkeys(name for name in names if name.lower().endswith(ENDINGS)))


def lora_path(name: str, *folders: str) -> Path:
    """Path of a LoRA file by its name in a drop-down or LORA_STACK.

    Raises LoraFileError where no folder has it, and where several have different files of this name.
    """
    found = {folder: path for folder in folders if (path := _in_folder(name, folder))}
    if len(found) > 1 and len({sha256_file(path) for path in found.values()}) > 1:
        raise LoraFileError(
            f"LoRA file {name!r} is in {' and '.join(found)}, and these are different files: rename one of them."
        )
    for path in found.values():
        return path
    raise LoraFileError(
        f"LoRA file {name!r} is in no {' or '.join(folders)} folder: put it there and refresh the page."
    )


def _in_folder(name: str, folder: str) -> Path | None:
    for spelling in (name, name.replace("\\", "/")):  # stacks written on Windows
        if path := folder_paths.get_full_path(folder, spelling):
            return Path(path)
    return None


def file_names(folder: str, ending: str) -> list[str]:
    """Names of the files with this ending in a model folder."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(ending)]


def file_path(folder: str, name: str) -> Path:
    """Path of a file of a model folder by its name in a drop-down; GuardError for any other name, ``..`` among them."""
    plain = name.replace("\\", "/")  # a graph may come from Windows, or go there
    known = next((n for n in folder_paths.get_filename_list(folder) if n.replace("\\", "/") == plain), None)
    if path := known and folder_paths.get_full_path(folder, known):
        return Path(path)
    raise GuardError(f"File {name!r} is in no {folder} folder: put it there and refresh the page.")


def show(node: type[io.ComfyNode], text: str) -> None:
    """Put a report on the node itself, as text that the front end draws under it (0.3.75 and 0.33.0)."""
    if node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
