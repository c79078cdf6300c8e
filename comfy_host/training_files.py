"""Files of a training in ComfyUI's folders: data sets among inputs, states among outputs, LoRAs among models.

What a graph names is looked for there and nowhere else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..modular_lora.errors import GuardError
from ..modular_lora.util import atomic
from ..modular_lora.util.file_state import file_state
from ..training import options
from ..training.options import TaskOptions
from .model_folders import SAFETY_FOLDER, input_folder, model_folder, output_folder

if TYPE_CHECKING:
    from ..training.data.config import DatasetConfig

NUMBERED = re.compile(r"\d+_.*")
NAME = re.compile(r"[\w][\w .+-]*")


def check_name(option: str, name: str, named: str) -> None:
    """GuardError for a text that cannot name a file or folder of ours on every system."""
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        raise GuardError(
            f"{option} {name!r}: letters, digits, _, spaces and . + - only, no space or mark but _ first, no dot or "
            f"space last: it names {named}.",
            code="name.not-plain",
        )


def copy_path(output_name: str) -> Path:
    """Where a copy of a safety LoRA goes; its folder is made. GuardError for a text that cannot name the file."""
    if not NAME.fullmatch(output_name) or output_name.endswith("."):
        raise GuardError(
            f"output_name {output_name!r}: letters, digits, space and . _ + - only: it names the file.",
            code="name.not-plain",
        )
    folder = model_folder(SAFETY_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{output_name}.safetensors"


def data_sets() -> list[str]:
    """Folders of N_name folders, and data-set TOML files, in ComfyUI's input folder."""
    root = input_folder()
    entries = sorted(root.iterdir(), key=lambda e: e.name) if root.is_dir() else []
    return [e.name for e in entries if e.suffix == ".toml" or (e.is_dir() and any(map(_numbered, e.iterdir())))]


def _numbered(folder: Path) -> bool:
    return folder.is_dir() and bool(NUMBERED.fullmatch(folder.name))


def data_set_option(name: str) -> dict[str, str]:
    """The option for a name in the drop-down, which ComfyUI 0.3.75 does not check a value against (0.33.0 does)."""
    if name not in data_sets():
        raise GuardError(
            f"Data set {name!r} is not a data set in the input folder: put it there and refresh the page.",
            code="train.no-data-set",
        )
    path = input_folder() / name
    return {"dataset_config" if path.suffix == ".toml" else "train_data_dir": str(path)}


def inside(made: TaskOptions) -> DatasetConfig:
    """The data set; DatasetError where it is outside ComfyUI's input folder, whether or not anything is there."""
    from ..training.task.train import configure  # when there is a data set: what trains is not imported at the start

    return configure(made, input_folder())


def data_set_state(name: str) -> str:
    """Changes with the data set's files, so that a cached training or report is not taken for a new one."""
    chosen = data_set_option(name)
    places = [Path(path) for path in chosen.values()]
    if "dataset_config" in chosen:
        config = inside(options.load(TaskOptions, None, chosen))
        places += [*config.folders, *config.files]
    files = sorted(p for place in places for p in (place, *place.rglob("*")) if p.is_file())
    found = [(str(file), file_state(file)) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def work_folder(name: str) -> Path:
    """Where a training of that name keeps checkpoints, states, previews and logs; GuardError for what is no name."""
    check_name("output_name", name, "the file")
    return output_folder() / "modular_lora" / name


def newest_state(name: str) -> Path | None:
    """The folder of the newest saved state of a training of that name."""
    kinds = f"{name}-step*-state", f"{name}-state"  # sd-scripts' last one has no step
    states = (folder for kind in kinds for folder in work_folder(name).glob(kind))
    return max(states, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), default=None)


def state_to_resume(name: str, resume: bool) -> str:
    """Its path as an option; "" where none is wanted. GuardError where there is none."""
    found = newest_state(name) if resume else None
    if resume and found is None:
        raise GuardError(
            f"resume: {name} has no saved state: switch resume off, and it starts anew.", code="resume.no-state"
        )
    return str(found) if found else ""


def published(lora: Path, folder: str) -> Path:
    """A copy of the LoRA in a model folder under a name of its own, whole or not at all."""
    target = model_folder(folder)
    target.mkdir(parents=True, exist_ok=True)
    free = (target / f"{lora.stem}{f'_{i:03d}' if i else ''}.safetensors" for i in range(10_000))
    path = next(p for p in free if not p.exists())
    with atomic.replacing(path) as part:
        shutil.copyfile(lora, part)
    return path
