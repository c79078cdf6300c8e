"""LoRA files: every check that can be made on a header and on values, before a tensor is used.

The safetensors header (8-byte little-endian length, JSON, tensor data) is parsed here, more strictly than the
format asks, because its own readers still accept bloated headers and tensors that share bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .adapters import Adapter, LoraLayer
from .errors import LoraFileError

HEADER_LIMIT = 16 * 2**20  # bytes
TENSOR_LIMIT = 20_000
RANK_LIMIT = 1024
NAME_LIMIT = 512  # characters
SIZE_LIMIT = 2**31  # of one dimension
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
READS = "this version reads LoRA and LoCon (kohya, diffusers and PEFT names)"
DAMAGED = "the file is damaged: download it again"

_NAME = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<kohya>down|up)\.weight"
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"
    r"|\.(?P<alpha>alpha))"
)
_ROLE = {"A": "down", "B": "up"}
_REFUSED = (
    (re.compile(r"\.hada_\w+$"), "LoHa"),
    (re.compile(r"\.lokr_\w+$"), "LoKr"),
    (re.compile(r"\.(dora_scale|lora_magnitude_vector(\..+)?)$"), "DoRA"),
    (re.compile(r"\.(oft_\w+|boft_\w+|rescale)(\..+)?$"), "OFT or BOFT"),
    (re.compile(r"\.(diff|diff_b|set_weight|reshape_weight)$"), "a full weight difference"),
    (re.compile(r"\.(lora_mid\.weight|scalar)$"), "LoCon in Tucker form"),
    (re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$"), "IA3"),
    (re.compile(r"\.(w_norm|b_norm)$"), "a change of a norm"),
    (re.compile(r"\.lora_(B|up)(\..+)?\.bias$"), "a LoRA with a bias"),
)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file that passed every check of `read_lora`."""

    path: Path
    name: str  # file name, as error messages show it
    sha256: str  # of the bytes that the layers were made from
    metadata: dict[str, str]
    layers: dict[str, Adapter]
    notes: tuple[str, ...] = ()  # what the file holds and nothing uses, a line each

    @cached_property
    def plain(self) -> dict[str, LoraLayer]:
        """The layers where all of them are LoRA or LoCon; else LoraFileError with the first that is not."""
        for name, layer in self.layers.items():
            if not isinstance(layer, LoraLayer):
                what = f"{self.name}: layer {_shown(name)} is {layer.kind}"
                raise LoraFileError(f"{what}: this takes LoRA and LoCon files only, use one of these")
        return dict(self.layers)

    @cached_property
    def zero_layers(self) -> tuple[str, ...]:
        """Names of the layers that change nothing."""
        return tuple(name for name, layer in self.layers.items() if layer.is_zero)


@dataclass(frozen=True)
class _Entry:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_lora(path: Path, *, expected_sha256: str | None = None) -> LoraFile:
    """Read and check a LoRA file (safetensors; kohya, diffusers or PEFT names; LoRA and LoCon).

    The file is read once and closed; the hash, the header and the tensors all come from those bytes. Tensors are on
    the CPU in the file's dtype (fp32, fp16, bf16, fp8): down r in [k k], up out r [1 1]. An empty `expected_sha256`
    counts as none. Raises LoraFileError, one line with file, tensor, value and remedy.
    """
    path = Path(path)
    name = _plain(path.name)
    expected = _parse_sha256(name, expected_sha256)
    _check_path(path, name)
    try:
        with path.open("rb") as file:
            raw, entries, metadata = _read_checked(file, name)
    except OSError as error:
        raise LoraFileError(f"{name}: cannot be read ({error.strerror}): check the file and its permissions") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    if expected is not None and sha256 != expected:
        raise LoraFileError(f"{name}: SHA-256 is {sha256}, expected {expected}: use the file that was released")
    try:
        tensors = safetensors.torch.load(raw)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise LoraFileError(f"{name}: safetensors refuses it ({_plain(str(error))}): {DAMAGED}") from error
    layers = _make_layers(_group(entries, name), tensors, name)
    lora = LoraFile(path, name, sha256, metadata, layers)
    if len(lora.zero_layers) == len(layers):
        raise LoraFileError(f"{name}: all {len(layers)} layers are zero, it would change nothing: train it first")
    return lora


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file in hex, remembered by path, size and modification time; raises LoraFileError."""
    path = Path(path)
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise LoraFileError(f"{_plain(path.name)}: cannot be hashed ({_plain(str(error))}): check the file") from error


def describe_base(metadata: Mapping[str, str]) -> str | None:
    """The model family that a file says it was trained for and the field that says so, or None."""
    for field in ("ss_base_model_version", "modelspec.architecture"):
        if metadata.get(field):
            return f"{_plain(metadata[field])} ({field})"
    return None


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _shown(value: object) -> str:
    """A value out of a file on one printable line of bounded length; a file may nest it deeper than repr() can go."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 3, 120
    return short.repr(value)


def _plain(text: str) -> str:
    """Text out of a file on one printable line of bounded length, without quotes."""
    return "".join(c if c.isprintable() else "?" for c in text[:120])


def _parse_sha256(name: str, text: str | None) -> str | None:
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip().lower()):
        raise LoraFileError(f"{name}: expected SHA-256 {_shown(text)} is not 64 hex digits: copy it again")
    return text.strip().lower()


def _check_path(path: Path, name: str) -> None:
    if path.suffix.lower() != ".safetensors":
        raise LoraFileError(f"{name}: is not a .safetensors file: pickle files can run code, convert it first")
    if path.is_dir():
        raise LoraFileError(f"{name}: is a directory: choose a .safetensors file")
    if not path.is_file():
        raise LoraFileError(f"{name}: no such file: check the name and the loras folder")


def _read_checked(file: BinaryIO, name: str) -> tuple[bytes, dict[str, _Entry], dict[str, str]]:
    """All bytes of a file and its checked header; nothing beyond the header is read before it passes."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or 8 + length > size:
        raise LoraFileError(f"{name}: header of {length} bytes in a file of {size} bytes: {DAMAGED}")
    if length > HEADER_LIMIT:
        raise LoraFileError(f"{name}: header of {length} bytes, at most {HEADER_LIMIT} allowed: it is not a LoRA file")
    header = file.read(length)
    entries, metadata = _parse_header(header, name)
    _check_offsets(entries, size - 8 - length, name)
    _check_layers(_group(entries, name), entries, name)
    file.seek(0)
    raw = file.read()
    if len(raw) != size or raw[: 8 + length] != prefix + header:
        raise LoraFileError(f"{name}: changed from {size} to {len(raw)} bytes or in its header while read: load again")
    return raw, entries, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key comes twice, since readers differ in which one they take."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"names {_shown(key)} twice")
        result[key] = value
    return result


def _parse_header(header: bytes, name: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{name}: header is not valid JSON ({_plain(str(error))}): {DAMAGED}") from error
    if not isinstance(table, dict):
        raise LoraFileError(f"{name}: header is a {type(table).__name__}, not an object: {DAMAGED}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(f"{name}: metadata {_shown(metadata)} is not text only: save the file without it")
    if not 1 <= len(table) <= TENSOR_LIMIT:
        raise LoraFileError(f"{name}: holds {len(table)} tensors, 1 to {TENSOR_LIMIT} allowed: use a LoRA file")
    return {tensor: _parse_entry(tensor, entry, name) for tensor, entry in table.items()}, metadata


def _parse_entry(tensor: str, entry: object, name: str) -> _Entry:
    subject = f"{name}: tensor {_shown(tensor)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LoraFileError(f"{subject}: entry {_shown(entry)} lacks dtype, shape or data_offsets: {DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise LoraFileError(f"{subject}: dtype {_shown(dtype)} is not one of {', '.join(ITEM_SIZE)}: save it in one")
    if not _sizes(shape, 1) or len(shape) > 4:
        raise LoraFileError(f"{subject}: shape {_shown(shape)} is not 0 to 4 sizes of 1 or more: {DAMAGED}")
    if not _sizes(offsets, 0) or len(offsets) != 2:
        raise LoraFileError(f"{subject}: offsets {_shown(offsets)} are not two places in the file: {DAMAGED}")
    return _Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: object, least: int) -> bool:
    """Whether a JSON value is a list of whole numbers from `least` on; true and 1.0 are none."""
    limit = SIZE_LIMIT if least else 2**63
    return isinstance(value, list) and all(type(item) is int and least <= item < limit for item in value)


def _check_offsets(entries: Mapping[str, _Entry], size: int, name: str) -> None:
    """Tensors must lie one after the other from the data's first byte to the file's last."""
    place = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        wanted = math.prod(entry.shape) * ITEM_SIZE[entry.dtype]
        if entry.start != place or entry.end - entry.start != wanted or entry.end > size:
            what = f"bytes {entry.start} to {entry.end}, expected {place} to {place + wanted} of {size}"
            raise LoraFileError(f"{name}: tensor {_shown(tensor)}: {what}: {DAMAGED}")
        place = entry.end
    if place != size:
        raise LoraFileError(f"{name}: {size - place} bytes after the last tensor: {DAMAGED}")


def _group(tensors: Iterable[str], name: str) -> dict[str, dict[str, str]]:
    """Tensor names by layer and role: {layer: {"down": ..., "up": ..., "alpha": ...}}."""
    layers: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        found = _NAME.fullmatch(tensor) if len(tensor) <= NAME_LIMIT and tensor.isprintable() else None
        if found is None:
            raise LoraFileError(f"{name}: tensor {_shown(tensor)}: {_kind(tensor)}: {READS}")
        word = found["kohya"] or found["diffusers"] or found["peft"] or found["alpha"]
        role = _ROLE.get(word, word)
        if role in layers.setdefault(found["layer"], {}):
            raise LoraFileError(f"{name}: tensor {_shown(tensor)}: a second {role} of its layer: keep one adapter")
        layers[found["layer"]][role] = tensor
    return layers


def _kind(tensor: str) -> str:
    """What a tensor that is no LoRA tensor most likely is."""
    text = tensor[-NAME_LIMIT:]
    return next((f"is {kind}" for pattern, kind in _REFUSED if pattern.search(text)), "is not a LoRA tensor")


def _check_layers(layers: Mapping[str, Mapping[str, str]], entries: Mapping[str, _Entry], name: str) -> None:
    for layer, roles in layers.items():
        subject = f"{name}: layer {_shown(layer)}"
        if not {"down", "up"} <= set(roles):
            raise LoraFileError(f"{subject}: has only {' and '.join(sorted(roles))}, needs down and up: save it whole")
        down, up = entries[roles["down"]].shape, entries[roles["up"]].shape
        if len(down) not in (2, 4) or len(up) not in (2, 4) or math.prod(up[2:]) != 1:
            raise LoraFileError(f"{subject}: down {list(down)} and up {list(up)} are no Linear or Conv2d pair: {READS}")
        if down[0] != up[1]:
            raise LoraFileError(f"{subject}: rank is {down[0]} in down and {up[1]} in up: {DAMAGED}")
        if down[0] > RANK_LIMIT:
            raise LoraFileError(f"{subject}: rank {down[0]}, at most {RANK_LIMIT} allowed: resize the LoRA")
        if "alpha" in roles and math.prod(entries[roles["alpha"]].shape) != 1:
            shape = list(entries[roles["alpha"]].shape)
            raise LoraFileError(f"{subject}: alpha has shape {shape}, one number is needed: {DAMAGED}")


def _make_layers(
    layers: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], name: str
) -> dict[str, LoraLayer]:
    for tensor, value in tensors.items():
        peak = value.float().abs().amax().item()  # NaN and inf both come through amax
        if not math.isfinite(peak):
            raise LoraFileError(f"{name}: tensor {_shown(tensor)}: holds {peak}: train or convert the LoRA again")
    result = {}
    for layer, roles in layers.items():
        alpha = float(tensors[roles["alpha"]].float().reshape(())) if "alpha" in roles else None
        if alpha is not None and alpha < 0:
            raise LoraFileError(f"{name}: layer {_shown(layer)}: alpha is {alpha}, below 0: set a negative strength")
        result[layer] = LoraLayer(layer, tensors[roles["down"]], tensors[roles["up"]], alpha)
    return result
