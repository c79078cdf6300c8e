"""The pack's socket types and what its nodes share: category, LoRA drop-downs, the report on a node."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..modular_lora.errors import GuardError, LoraFileError
from ..modular_lora.files.reader import ENDINGS, sha256_file

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


def offered(names: Iterable[str]) -> list[str]:
    """Names for a drop-down. The front end puts them into the page as HTML, so one with ``<`` could be a script.

    Such names are left out; the last entry counts them and says what to do. It is the name of no file.
    """
    names = list(names)
    kept = [name for name in names if "<" not in name]
    left = len(names) - len(kept)
    return [*kept, f"({left} left out, with < in the name: rename)"] if left else kept


def lora_names(*folders: str) -> list[str]:
    """What a drop-down offers of the safetensors files in these model folders: each once, the first folder's first."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return offered(dict.fromkeys(name for name in names if name.lower().endswith(ENDINGS)))


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
    """What a drop-down offers of the files with this ending in a model folder."""
    return offered(name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(ending))


def file_path(folder: str, name: str) -> Path:
    """Path of a file of a model folder by its name in a drop-down; GuardError for any other name, ``..`` among them."""
    plain = name.replace("\\", "/")  # a graph may come from Windows, or go there
    known = next((n for n in folder_paths.get_filename_list(folder) if n.replace("\\", "/") == plain), None)
    if path := known and folder_paths.get_full_path(folder, known):
        return Path(path)
    raise GuardError(f"File {name!r} is in no {folder} folder: put it there and refresh the page.")


def show(node: type[io.ComfyNode], text: str) -> None:
    """Put a report on the node itself, where the front end draws it as HTML (0.3.75 and 0.33.0)."""
    if node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id)


def as_html(text: str) -> str:
    """HTML that shows ``text`` as it is; names, metadata, prompts and captions in a report are anybody's words.

    Beside HTML's own characters, two notations are escaped that the front end makes links of: ``[[label|address]]``,
    where the label hides the address, and the ``__LNK0__`` that it puts in the place of one.
    """
    return html.escape(text).replace("[", "&#91;").replace("__LNK", "_&#95;LNK")
