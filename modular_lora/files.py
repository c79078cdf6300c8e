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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .adapters import Adapter, LoraLayer
from .errors import LoraFileError, plain, shown
from .formats import DAMAGED, Entry, Names, check_layers, make_layers, sort_names

HEADER_LIMIT = 16 * 2**20  # bytes
TENSOR_LIMIT = 20_000
SIZE_LIMIT = 2**31  # of one dimension
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
ALPHA_DTYPES = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32}  # some tools save these as well
_TYPES = DTYPES | ALPHA_DTYPES
_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}  # from here on, the sign bit aside


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
                what = f"{self.name}: layer {shown(name)} is {layer.kind}"
                raise LoraFileError(f"{what}: this takes LoRA and LoCon files only, use one of these")
        return dict(self.layers)

    @cached_property
    def zero_layers(self) -> tuple[str, ...]:
        """Names of the layers that change nothing."""
        return tuple(name for name, layer in self.layers.items() if layer.is_zero)


@dataclass(frozen=True, eq=False)
class _Raw:
    """The bytes of a file whose header passed, and what the header says."""

    head: bytes  # length and header
    data: bytearray
    entries: dict[str, Entry]
    names: Names
    metadata: dict[str, str]

    def sha256(self) -> str:
        digest = hashlib.sha256(self.head)
        digest.update(self.data)
        return digest.hexdigest()


def read_lora(path: Path, *, expected_sha256: str | None = None) -> LoraFile:
    """Read and check a LoRA file: safetensors, any of the formats in formats.py.

    The file is read once and closed; the hash, the header and the tensors all come from those bytes. Tensors are on
    the CPU in the file's dtype (fp32, fp16, bf16, fp8) and share those bytes. An empty `expected_sha256` counts as
    none. Raises LoraFileError, one line with file, tensor or layer, value and remedy.
    """
    path = Path(path)
    name = plain(path.name)
    expected = _parse_sha256(name, expected_sha256)
    _check_path(path, name)
    try:
        with path.open("rb") as file:
            raw = _read_checked(file, name)
    except OSError as error:
        raise LoraFileError(f"{name}: cannot be read ({error.strerror}): check the file and its permissions") from error
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(raw.sha256)  # beside the work on values, both are long for a big file
        if expected is not None and digest.result() != expected:
            what = f"SHA-256 is {digest.result()}, expected {expected}"
            raise LoraFileError(f"{name}: {what}: use the file that was released")
        layers = make_layers(raw.names.layers, _make_tensors(raw, name), name)
    lora = LoraFile(path, name, digest.result(), raw.metadata, layers, raw.names.notes)
    if all(layer.is_zero for layer in layers.values()):
        raise LoraFileError(f"{name}: all {len(layers)} layers are zero, it would change nothing: train it first")
    return lora


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file in hex, remembered by path, size and modification time; raises LoraFileError."""
    path = Path(path)
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise LoraFileError(f"{plain(path.name)}: cannot be hashed ({plain(str(error))}): check the file") from error


def describe_base(metadata: Mapping[str, str]) -> str | None:
    """The model family that a file says it was trained for and the field that says so, or None."""
    for field in ("ss_base_model_version", "modelspec.architecture"):
        if metadata.get(field):
            return f"{plain(metadata[field])} ({field})"
    return None


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _parse_sha256(name: str, text: str | None) -> str | None:
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip().lower()):
        raise LoraFileError(f"{name}: expected SHA-256 {shown(text)} is not 64 hex digits: copy it again")
    return text.strip().lower()


def _check_path(path: Path, name: str) -> None:
    if path.suffix.lower() != ".safetensors":
        raise LoraFileError(f"{name}: is not a .safetensors file: pickle files can run code, convert it first")
    if path.is_dir():
        raise LoraFileError(f"{name}: is a directory: choose a .safetensors file")
    if not path.is_file():
        raise LoraFileError(f"{name}: no such file: check the name and the loras folder")


def _read_checked(file: BinaryIO, name: str) -> _Raw:
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
    names = sort_names(entries, name)
    check_layers(names.layers, entries, name)
    data = bytearray(size - 8 - length)
    read = file.readinto(data)
    if len(header) != length or read != len(data) or file.read(1):
        raise LoraFileError(f"{name}: changed from {size} bytes while it was read: load it again")
    return _Raw(prefix + header, data, entries, names, metadata)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key comes twice, since readers differ in which one they take."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"names {shown(next(key for key in keys if keys.count(key) > 1))} twice")
    return result


def _parse_header(header: bytes, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{name}: header is not valid JSON ({plain(str(error))}): {DAMAGED}") from error
    if not isinstance(table, dict):
        raise LoraFileError(f"{name}: header is a {type(table).__name__}, not an object: {DAMAGED}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(f"{name}: metadata {shown(metadata)} is not text only: save the file without it")
    if not 1 <= len(table) <= TENSOR_LIMIT:
        raise LoraFileError(f"{name}: holds {len(table)} tensors, 1 to {TENSOR_LIMIT} allowed: use a LoRA file")
    return {tensor: _parse_entry(tensor, entry, name) for tensor, entry in table.items()}, metadata


def _parse_entry(tensor: str, entry: object, name: str) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        what = f"entry {shown(entry)} lacks dtype, shape or data_offsets"
        raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: {DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and (dtype in DTYPES or (dtype in ALPHA_DTYPES and tensor.endswith(".alpha")))
    if not known:
        what = f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}"
        raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: save it in one")
    if not _sizes(shape, 1, SIZE_LIMIT) or len(shape) > 5:
        what = f"shape {shown(shape)} is not 0 to 5 sizes of 1 or more"
        raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: {DAMAGED}")
    if not _sizes(offsets, 0, 2**63) or len(offsets) != 2:
        what = f"offsets {shown(offsets)} are not two places in the file"
        raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: {DAMAGED}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: object, least: int, limit: int) -> bool:
    """Whether a JSON value is a list of whole numbers from `least` on and below `limit`; true and 1.0 are none."""
    return isinstance(value, list) and all(type(item) is int and least <= item < limit for item in value)


def _check_offsets(entries: Mapping[str, Entry], size: int, name: str) -> None:
    """Tensors must lie one after the other from the data's first byte to the file's last."""
    place = 0
    for tensor, entry in _in_order(entries):
        wanted = math.prod(entry.shape) * _TYPES[entry.dtype].itemsize
        if entry.start != place or entry.end - entry.start != wanted or entry.end > size:
            what = f"bytes {entry.start} to {entry.end}, expected {place} to {place + wanted} of {size}"
            raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: {DAMAGED}")
        place = entry.end
    if place != size:
        raise LoraFileError(f"{name}: {size - place} bytes after the last tensor: {DAMAGED}")


def _in_order(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    """Tensors by their place in the file."""
    return sorted(entries.items(), key=lambda item: item[1][2:])


def _make_tensors(raw: _Raw, name: str) -> dict[str, Tensor]:
    """All tensors as views of a file's bytes, by name; LoraFileError for a value that is not finite.

    Tensors of one dtype that lie in a row are looked at together, as one tensor.
    """
    tensors: dict[str, Tensor] = {}
    for dtype, items in groupby(_in_order(raw.entries), key=lambda item: item[1].dtype):
        run = list(items)
        flat = _view(raw.data, run[0][1].start, run[-1][1].end, _TYPES[dtype])
        parts = flat.split([math.prod(entry.shape) for _, entry in run])
        if not _is_finite(flat):
            place = next(i for i, part in enumerate(parts) if not _is_finite(part))
            tensor = run[place][0]
            peak = parts[place].double().abs().amax().item()  # NaN and inf both come through amax
            raise LoraFileError(f"{name}: tensor {shown(tensor)}: holds {peak}: train or convert the LoRA again")
        for (tensor, entry), part in zip(run, parts, strict=True):
            tensors[tensor] = part.view(entry.shape)
    return tensors


def _view(data: bytearray, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes `start` to `end` as one row of numbers; a copy of them where they do not lie as the dtype needs it."""
    if start % dtype.itemsize:
        data, start, end = data[start:end], 0, end - start
    return torch.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)


def _is_finite(row: Tensor) -> bool:
    if (limit := _NOT_FINITE.get(row.dtype)) is not None:
        return int((row.view(torch.uint8) & 0x7F).max()) < limit
    low, high = torch.aminmax(row)  # NaN comes through
    return math.isfinite(low.item()) and math.isfinite(high.item())
