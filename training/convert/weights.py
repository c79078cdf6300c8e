"""Published weights as tensors by part: single files, pickles (tensors only), folders of diffusers and transformers.

Tensors are read when they are asked for, so that two models of some gigabytes need no memory for both. PyTorch's own
files go through ``torch.load(weights_only=True)``, which builds tensors and refuses everything that could run.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...modular_lora.errors import one_line, plain, shown
from ...modular_lora.util.hashing import hash_file
from .errors import ConvertError

SAFETENSORS, PICKLES = (".safetensors", ".sft"), (".pt", ".pth", ".bin", ".ckpt")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # subfolders of a diffusers pipeline that count
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANT = re.compile(r"\.(fp16|fp32|bf16|non_ema|ema)(?=\.|-)")
_INNER = ("state_dict", "model_state_dict", "model")  # what some programs put around the tensors

Get = Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of a file or folder.

    Attributes:
        name: of the file or folder.
        parts: part ("unet", "text_encoder", ...; "" where no folder and no key says it) -> name -> how to get it.
        files: what was read.
        pickled: whether PyTorch's own format held them.
        folder: whether it is a folder.
        nested: whether one file named the parts itself.
    """

    name: str
    parts: Mapping[str, Mapping[str, Get]]
    files: tuple[Path, ...]
    pickled: bool
    folder: bool = False
    nested: bool = False
    ignored: tuple[str, ...] = field(default=())  # entries that are no tensors

    @property
    def names(self) -> list[str]:
        return [f"{part}.{name}" if self.nested else name for part, names in self.parts.items() for name in names]

    def sha256(self) -> str:
        """Of the one file, or over the names and hashes of several."""
        if len(self.files) == 1:
            return hash_file(self.files[0])
        lines = sorted(f"{file.parent.name}/{file.name} {hash_file(file)}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_weights(path: Path, option: str) -> Weights:
    """The tensors of a file or folder; ConvertError, naming ``option``, where there are none that can be read."""
    path = Path(path)
    if path.is_dir():
        return _folder(path, option)
    if not path.is_file():
        raise ConvertError(f"{option}: {path}: no such file or folder: check the path.", code="convert.no-such-file")
    parts, nested, ignored = _file(path)
    return Weights(path.name, parts, (path,), _is_pickle(path), nested=nested, ignored=ignored)


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES


def _folder(path: Path, option: str) -> Weights:
    found = {part: _weight_files(path / part) for part in PARTS if (path / part).is_dir()}
    found = {part: files for part, files in found.items() if files} or {"": _weight_files(path)}
    files = tuple(file for each in found.values() for file in each)
    if not files:
        raise ConvertError(
            f"{option}: {path}: holds no weights that are known ({', '.join(_STEMS)} with {', '.join(SAFETENSORS)} or "
            f"{', '.join(PICKLES)}, in it or in {', '.join(PARTS)}): name the folder of the pipeline, of one model, or "
            "the file.",
            code="convert.no-weights",
        )
    parts: dict[str, dict[str, Get]] = {}
    ignored: list[str] = []
    for part, each in found.items():
        for file in each:
            inner, nested, more = _file(file)
            ignored += more
            for name, names in inner.items():
                parts.setdefault(name if nested else part, {}).update(names)
    return Weights(path.name, parts, files, any(map(_is_pickle, files)), folder=True, ignored=tuple(ignored))


def _weight_files(folder: Path) -> list[Path]:
    """The files of one model: all pieces of it, safetensors before pickles, the plain variant before others."""
    for endings in (SAFETENSORS, PICKLES):
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in endings and f.name.startswith(_STEMS))
        variants: dict[str, list[Path]] = {}
        for file in files:
            which = _VARIANT.search(file.name)
            variants.setdefault(which[1] if which else "", []).append(file)
        if variants:
            return variants[min(variants)]
    return []


def _file(path: Path) -> tuple[dict[str, dict[str, Get]], bool, tuple[str, ...]]:
    """Tensors by part, whether the file itself names the parts, and names of what is no tensor."""
    if path.suffix.lower() in SAFETENSORS:
        return {"": _safetensors(path)}, False, ()
    if not _is_pickle(path):
        endings = ", ".join((*SAFETENSORS, *PICKLES))
        raise ConvertError(f"{path.name}: is not one of {endings}: use such a file.", code="convert.ending")
    return _sorted(_pickled(path), path.name)


def _safetensors(path: Path) -> dict[str, Get]:
    try:
        file = safe_open(path, framework="pt")
        return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ConvertError(
            f"{path.name}: cannot be read as safetensors ({one_line(error)}): download it again.",
            code="convert.unreadable",
        ) from error


def _pickled(path: Path) -> Any:
    """What a file of PyTorch's holds, tensors and plain values alone."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # PyTorch's older format is read, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path.name}: holds more than tensors ({one_line(error)}), and what else is in it could run code, so it "
            "was not opened: ask its author for a safetensors file, or for one with the state_dict alone.",
            code="convert.not-only-tensors",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ConvertError(
            f"{path.name}: cannot be read as a PyTorch file ({one_line(error)}): download it again.",
            code="convert.unreadable",
        ) from error


def _sorted(held: Any, name: str) -> tuple[dict[str, dict[str, Get]], bool, tuple[str, ...]]:
    if not isinstance(held, dict):
        raise ConvertError(
            f"{name}: holds {type(held).__name__}, no tensors by name: ask its author for the state_dict.",
            code="convert.no-weights",
        )
    for key in _INNER:
        if isinstance(held.get(key), dict):
            return _sorted(held[key], name)
    parts: dict[str, dict[str, Get]] = {}
    ignored: list[str] = []
    for part in PARTS:
        if isinstance(held.get(part), dict):
            parts[part] = _tensors(held[part], ignored)
    nested = bool(parts)
    if not nested:
        parts = {"": _tensors(held, ignored)}
    if not any(parts.values()):
        raise ConvertError(
            f"{name}: holds no tensor by name (first key {shown(next(iter(held), None))}): use the file with the "
            "weights.",
            code="convert.no-weights",
        )
    return {part: names for part, names in parts.items() if names}, nested, tuple(ignored)


def _tensors(held: Mapping[Any, Any], ignored: list[str]) -> dict[str, Get]:
    found: dict[str, Get] = {}
    for key, value in held.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            found[key] = value.detach
        else:
            ignored.append(plain(str(key)))
    return found
