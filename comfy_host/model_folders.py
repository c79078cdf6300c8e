"""ComfyUI's folders: models by their kind, with three kinds of our own, input and output; LoRA files by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ..modular_lora.errors import GuardError, LoraFileError
from ..modular_lora.files.reader import ENDINGS, sha256_file

SAFETY_FOLDER = "safety_loras"
DETECTOR_FOLDER = "modular_lora_detectors"  # ONNX classifiers and their labels
PRESET_FOLDER = "modular_lora_gates"  # settings of gates, as JSON
LORA_FOLDER = "loras"
SAFETY_FOLDERS = (SAFETY_FOLDER, LORA_FOLDER)
TASK_FOLDERS = (LORA_FOLDER,)
BASE_FOLDERS = ("checkpoints", "diffusion_models")  # that a checkpoint named to the kohya engine is looked for in


def register_folders() -> None:
    """Give safety LoRAs, detectors and gates' presets model folders of their own."""
    for folder in (SAFETY_FOLDER, DETECTOR_FOLDER, PRESET_FOLDER):
        folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))


def input_folder() -> Path:
    """Where users put what graphs read."""
    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    """Where nodes put what they make; served over HTTP."""
    return Path(folder_paths.get_output_directory())


def save_place(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
    """Where an image of that size is saved under a prefix.

    Returns:
        The folder, the file name's stem, the next number by ComfyUI's count, and the folder below the output folder.
    """
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(output_folder()), width, height)
    return Path(folder), name, counter, subfolder


def model_folder(kind: str) -> Path:
    """The first folder of a kind of model, where new files go."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def offered(names: Iterable[str]) -> list[str]:
    """Names for a drop-down. The front end puts them into the page as HTML, so one with ``<`` could be a script.

    Such names are left out; the last entry counts them and says what to do. It is the name of no file.
    """
    names = list(names)
    kept = [name for name in names if "<" not in name]
    left = len(names) - len(kept)
    return [*kept, f"({left} left out, with < in the name: rename)"] if left else kept


def _names(folders: Iterable[str], ending: str | tuple[str, ...]) -> Iterator[str]:
    names = (name for folder in folders for name in folder_paths.get_filename_list(folder))
    return (name for name in names if name.lower().endswith(ending))


def file_names(*folders: str, ending: str = "") -> list[str]:
    """What a drop-down offers of the files with this ending in model folders."""
    return offered(_names(folders, ending))


def file_path(folder: str, name: str) -> Path:
    """Path of a file of a model folder by its name in a drop-down; GuardError for any other name, ``..`` among them."""
    plain = name.replace("\\", "/")  # a graph may come from Windows, or go there
    known = next((n for n in folder_paths.get_filename_list(folder) if n.replace("\\", "/") == plain), None)
    if path := known and folder_paths.get_full_path(folder, known):
        return Path(path)
    raise GuardError(
        f"File {name!r} is in no {folder} folder: put it there and refresh the page.", code="place.no-such-file"
    )


def find_model(name: str, *kinds: str) -> Path | None:
    """Path of a model file by its name, in the first kind of model that has it."""
    found = (folder_paths.get_full_path(kind, name) for kind in kinds)
    return next((Path(path) for path in found if path), None)


def lora_names(*folders: str) -> list[str]:
    """What a drop-down offers of the safetensors files in these model folders: each once, the first folder's first."""
    return offered(dict.fromkeys(_names(folders, ENDINGS)))


def lora_files(folder: str) -> list[Path]:
    """The safetensors files in a model folder."""
    found = (folder_paths.get_full_path(folder, name) for name in _names((folder,), ENDINGS))
    return [Path(path) for path in found if path]


def lora_path(name: str, *folders: str) -> Path:
    """Path of a LoRA file by its name in a drop-down or LORA_STACK.

    Raises LoraFileError where no folder has it, and where several have different files of this name.
    """
    found = {folder: path for folder in folders if (path := _in_folder(name, folder))}
    if len(found) > 1 and len({sha256_file(path) for path in found.values()}) > 1:
        raise LoraFileError(
            f"LoRA file {name!r} is in {' and '.join(found)}, and these are different files: rename one of them.",
            code="file.two-places",
        )
    for path in found.values():
        return path
    raise LoraFileError(
        f"LoRA file {name!r} is in no {' or '.join(folders)} folder: put it there and refresh the page.",
        code="file.no-such-file",
    )


def _in_folder(name: str, folder: str) -> Path | None:
    spellings = (name, name.replace("\\", "/"))  # stacks written on Windows
    return next(filter(None, (find_model(spelling, folder) for spelling in spellings)), None)


def shown_name(path: Path, *folders: str) -> str:
    """The name under which people know a LoRA file: its path below one of these model folders, as two may share one."""
    return (name_below(path, *folders) or path.name).replace(os.sep, "/")


def name_below(path: str | os.PathLike, *folders: str) -> str | None:
    """A path as a name below one of these model folders, links followed if need be; None where it is below none."""
    for as_it_is in (os.path.abspath, os.path.realpath):
        whole = as_it_is(path)
        for root in (as_it_is(root) for folder in folders for root in folder_paths.get_folder_paths(folder)):
            if os.path.normcase(whole).startswith(os.path.normcase(os.path.join(root, ""))):
                return os.path.relpath(whole, root)
    return None
