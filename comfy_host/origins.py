"""Which file the tensors came from that a loader hands over: ComfyUI itself hands on values without a name.

comfy.utils.load_torch_file, through which loaders of LoRAs read, is watched: each tensor that it gives is remembered
with the file and its name there, as long as somebody holds it. What a loader hands over is that file's where all of it
came from there and the file, read again and checked as any other, still holds exactly these values.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import comfy.utils
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..modular_lora.errors import GuardError, LoraFileError
from ..modular_lora.files.cache import kept_lora
from ..modular_lora.files.pending import Change
from ..modular_lora.files.reader import LoraFile
from .model_folders import SAFETY_FOLDERS, shown_name

_origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (path, its name in the file)


def register() -> None:
    """Watch the reading of files, once."""
    if not hasattr(comfy.utils.load_torch_file, "notes_origins"):
        comfy.utils.load_torch_file = _noting(comfy.utils.load_torch_file)


def _noting(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_torch_file(ckpt, *args, **kwargs):
        loaded = original(ckpt, *args, **kwargs)
        tensors = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(tensors, dict):
            path = Path(os.path.abspath(ckpt))
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    _origins[tensor] = path, name
        return loaded

    vars(load_torch_file)["notes_origins"] = True
    return load_torch_file


def name_of(path: Path) -> str:
    """The name under which people know a LoRA file: its path below a folder of LoRAs."""
    return shown_name(path, *SAFETY_FOLDERS)


def path_of(changes: Iterable[Change]) -> Path | None:
    """The one file that all of these changes were read from; None where there is no such."""
    found = {(_origins.get(tensor) or (None,))[0] for change in changes for tensor in change.parts.values()}
    return found.pop() if len(found) == 1 else None


def file_of(path: Path | None, changes: Iterable[Change]) -> tuple[LoraFile | None, str]:
    """(The file that holds exactly these values, and of its layers how many are among them in words), or why not.

    A change whose values lie in several files, or that a node worked out, is of no file: see `path_of`.
    """
    if path is None:
        return None, "its file is not known, its sha256 is of its values"
    try:
        file = kept_lora(path)
        tensors = file.tensors
    except (LoraFileError, GuardError) as error:
        return None, f"it came from {name_of(path)}, which is not used as a file ({error}); its sha256 is of its values"
    layers = {name: layer for layer, roles in file.roles.items() for name in roles.values()}
    used = set()
    for change in changes:
        own = {_origins[tensor][1]: tensor for tensor in change.parts.values()}
        used |= {layers.get(name, "") for name in own}
        same = all(_same(tensors.get(name), tensor) for name, tensor in own.items())
        if not same or not _has_alpha(file, change, {layers.get(name) for name in own}):
            return None, f"a node changed the values of {name_of(path)}; its sha256 is of its values"
    return file, f"{len(used)} of the {len(file.layers)} layers of its file"


def _same(stored: Tensor | None, tensor: Tensor) -> bool:
    return (
        stored is not None
        and stored.shape == tensor.shape
        and stored.dtype == tensor.dtype
        and torch.equal(stored, tensor.detach().cpu())
    )


def _has_alpha(file: LoraFile, change: Change, layers: set[str | None]) -> bool:
    """Whether a change has the alpha of its layer in the file, or none where that has none."""
    if len(layers) != 1 or (roles := file.roles.get(layers.pop() or "")) is None:
        return False
    stored = None if change.parts.keys() & {"diff", "set"} else roles.get("alpha")  # ComfyUI scales no difference
    return change.alpha is None if stored is None else change.alpha == float(file.tensors[stored])
