"""LoRA files: every check that can be made on a header and on values, before a tensor is used.

The safetensors header (8-byte little-endian length, JSON, tensor data) is parsed here, more strictly than the
format asks, because its own readers still accept bloated headers and tensors that share bytes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraFileError, plain, shown
from ..util.file_state import FileState, file_state
from ..util.hashing import hash_file
from .formats import DAMAGED, Adapter, LoraLayer, check_layers, make_layers
from .kinds import refuse_contents, refuse_ending
from .names import Names, refuse_other_files, sort_names
from .scales import Scale, Stated, remark, rescaled, stated_scales

HEADER_LIMIT = 16 * 2**20  # bytes; JSON of this size takes half a gigabyte while it is looked at
TENSOR_LIMIT = 20_000
SMALL_HEADER = 2**21  # bytes, below which it is not worth a look at what they hold
MARKS = 30  # commas, colons and opening brackets a tensor, and quotes: twice what a header of the largest shapes has
ENDINGS = (".safetensors", ".sft")  # as ComfyUI lists them
SIZE_LIMIT = 2**31  # of one dimension
DIMENSIONS = 5  # of a tensor that is read
PIECE = 2**22  # bytes that are read and hashed at a time
READINGS = 3  # of a file that changes meanwhile
YOUNG = 2.0  # seconds; a file system may give a file that is written twice within these the same time
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F64": torch.float64,  # becomes float32, in which ComfyUI computes with it
}
_INTEGERS = {
    f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
ALPHA_DTYPES = {name: getattr(torch, kind) for name, kind in _INTEGERS.items()}  # some tools save these as well
_TYPES = DTYPES | ALPHA_DTYPES | {"BOOL": torch.bool}
_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}  # from here on, the sign bit aside


class Entry(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the first tensor's
    end: int


@dataclass(frozen=True, eq=False)
class Stored:
    """The bytes of a file whose header passed, and what the header says."""

    data: Tensor  # bytes
    entries: dict[str, Entry]
    names: Names
    metadata: dict[str, str]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, whether it is used or not, as a view of the bytes where it lies on a whole number."""
        dtype, shape, start, end = self.entries[name]
        row = self.data[start:end]
        return (row if start % _TYPES[dtype].itemsize == 0 else row.clone()).view(_TYPES[dtype]).reshape(shape)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file that passed every check of `read_lora`."""

    path: Path
    name: str  # file name, as error messages show it
    sha256: str  # of the bytes that the layers were made from
    metadata: dict[str, str]
    layers: dict[str, Adapter]
    remarks: tuple[str, ...] = ()  # what the file holds and nothing uses, a line each
    unread: tuple[str, ...] = ()  # tensors that no LoRA format of ComfyUI's has
    stated: Mapping[str, Stated] = field(default_factory=dict)  # layers of which the metadata states another scale
    scale: Scale = "refuse"  # which of the two was chosen
    places: Mapping[str, tuple] | None = None  # where the layers go, if no file's names say it (see pending.py)
    factors: Mapping[str, float] = field(default_factory=dict)  # layers that a loader gave a share of the strength
    content: str = ""  # SHA-256 of what a loader handed over: values, places and factors; "" of a file as a whole
    stored: Stored | None = None  # what was read, None for what comes from no file

    @property
    def pending(self) -> bool:
        """Whether a loader left or handed over its values, and no file is known that holds exactly these."""
        return bool(self.content) and self.sha256 == self.content

    @property
    def lifted(self) -> bool:
        """Whether a loader of the host's left it or handed it over, instead of our own reading of a file."""
        return self.places is not None

    @property
    def shares(self) -> str:
        """In words: what layers have of the strength, where a loader gave them shares of it."""
        if not self.factors:
            return ""
        return f"by layer, {min(self.factors.values()):g} to {max(self.factors.values()):g} of the strength"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is worth a line on the node: what is left out, a scale that the metadata gives otherwise."""
        said = remark(self.stated, self.layers, self.scale)
        return (*self.remarks, said) if said else self.remarks

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file under their own names, those that are left out too, in the file's dtypes.

        They share the bytes that were read and hashed. Raises LoraFileError for a dtype that is not known.
        """
        if self.stored is None:
            return {}
        unknown = [name for name, entry in self.stored.entries.items() if entry.dtype not in _TYPES]
        if unknown:
            what = f"{self.name}: tensor {shown(unknown[0])}"
            raise LoraFileError(f"{what}: its dtype is not known: save the file without it", code="file.dtype")
        return {name: self.stored.tensor(name) for name in self.stored.entries}

    @cached_property
    def values_sha256(self) -> str:
        """SHA-256 of all tensors, whatever they are called: the same for a file that was saved again, or renamed."""
        each = sorted(f"{entry.dtype} {entry.shape} {self._bytes(entry)}" for entry in self._entries())
        return hashlib.sha256("\n".join(each).encode()).hexdigest()

    def _entries(self) -> Iterable[Entry]:
        return () if self.stored is None else self.stored.entries.values()

    def _bytes(self, entry: Entry) -> str:
        assert self.stored is not None
        return hashlib.sha256(self.stored.data[entry.start : entry.end].numpy().data).hexdigest()

    @property
    def roles(self) -> Mapping[str, Mapping[str, str]]:
        """Layer -> role -> name of the tensor."""
        return {} if self.stored is None else self.stored.names.layers

    @property
    def acts_as(self) -> str:
        """What the layers compute is a function of this: the file's hash, and whether its metadata scales them."""
        if self.content:
            return self.content
        return f"{self.sha256}, scaled by its metadata" if self.scale_shown == "metadata" else self.sha256

    @property
    def scale_shown(self) -> str:
        """Which scale was chosen, "" where there was nothing to choose."""
        return self.scale if self.stated and self.scale != "refuse" else ""

    def with_scale(self, scale: Scale) -> LoraFile:
        """The file with one of two scales chosen where tensors and metadata differ; LoraFileError for none to choose.

        What it is asked of must be as `read_lora` gave it.
        """
        if scale != "metadata":
            return replace(self, scale=scale)
        try:
            layers = self.layers | {name: rescaled(self.layers[name], said) for name, said in self.stated.items()}
        except ValueError as error:
            raise LoraFileError(f"{self.name}: {error}", code="file.scale") from error
        return replace(self, layers=layers, scale=scale)

    @cached_property
    def plain(self) -> dict[str, LoraLayer]:
        """The layers where all of them are LoRA or LoCon; else LoraFileError with the first that is not."""
        found: dict[str, LoraLayer] = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, LoraLayer):
                what = f"{self.name}: layer {shown(name)} is {layer.kind}"
                raise LoraFileError(
                    f"{what}: this takes LoRA and LoCon files only, use one of these", code="file.not-plain"
                )
            found[name] = layer
        return found

    @cached_property
    def zero_layers(self) -> tuple[str, ...]:
        """Names of the layers that change nothing."""
        return tuple(name for name, layer in self.layers.items() if layer.is_zero)


def read_lora(path: str | Path, *, expected_sha256: str | None = None, scale: Scale = "refuse") -> LoraFile:
    """Read and check a LoRA file: safetensors, any of the formats in formats/.

    The file is read once and closed; the hash, the header and the tensors all come from those bytes, and a file that
    another program writes meanwhile is read again or refused. Tensors are on the CPU in the file's dtype (fp32, fp16,
    bf16, fp8; fp64 as fp32) and share those bytes. An empty `expected_sha256` counts as none. `scale`: see
    `LoraFile.with_scale`. Raises LoraFileError, one line with file, tensor or layer, value and remedy.
    """
    path = Path(path)
    name = plain(path.name)
    expected = _parse_sha256(name, expected_sha256)
    _check_path(path, name)
    with no_collection():
        lora = _read(path, name, expected)
    if all(layer.is_zero for layer in lora.layers.values()):
        raise LoraFileError(
            f"{name}: all {len(lora.layers)} layers are zero, it would change nothing: train it first",
            code="file.all-zero",
        )
    return lora if scale == "refuse" else lora.with_scale(scale)


def _read(path: Path, name: str, expected: str | None) -> LoraFile:
    for _ in range(READINGS):
        try:
            before = file_state(path)
            raised, lora = None, None
            try:
                lora = _read_once(path, name, expected)
            except LoraFileError as error:  # of what another program has written in part, it may not be true
                raised = error
            if _is_still(path, before, lora.sha256 if lora else None):
                if lora is not None:
                    return lora
                if raised is not None:
                    raise raised
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise LoraFileError(
                f"{name}: {what}: check the file and its permissions", code="file.unreadable"
            ) from error
    what = f"another program wrote to it in each of {READINGS} readings"
    raise LoraFileError(f"{name}: {what}: load it again when it is written", code="file.being-written")


def _read_once(path: Path, name: str, expected: str | None) -> LoraFile:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as pool:  # hashes one piece while the next one is read, and while values are looked at
        with path.open("rb") as file:
            raw = _read_checked(file, name, lambda piece: pool.submit(digest.update, piece))
        sha256 = pool.submit(digest.hexdigest)
        if expected is not None and sha256.result() != expected:
            what = f"SHA-256 is {sha256.result()}, expected {expected}"
            raise LoraFileError(f"{name}: {what}: use the file that was released", code="file.other-sha256")
        layers = make_layers(raw.names.layers, raw.names.wide, *_make_tensors(raw, name), name)
    stated = stated_scales(raw.metadata, layers, raw.names.layers)
    notes, unread = raw.names.notes, raw.names.left_out
    return LoraFile(path, name, sha256.result(), raw.metadata, layers, notes, unread, stated, stored=raw)


def _is_still(path: Path, before: FileState, sha256: str | None) -> bool:
    """Whether a file is what it was before it was read, with contents of this hash (None: they were not read whole).

    The times tell, unless the file is so young that a later change may have left them as they were.
    """
    if file_state(path) != before:
        return False
    if sha256 is None or not _is_young(before):
        return True
    return hash_file(path) == sha256 and file_state(path) == before


def _is_young(state: FileState) -> bool:
    return time.time() - max(state.modified, state.changed) / 1e9 <= YOUNG


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: a file of 10,000 tensors sets off dozens, which took two thirds of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file in hex, remembered by path and file state; raises LoraFileError."""
    path = Path(path)
    try:
        for _ in range(READINGS):
            before = file_state(path)
            digest = hash_file(path) if _is_young(before) else _digest(path, before)
            if _is_still(path, before, digest):
                return digest
    except (OSError, ValueError) as error:
        raise LoraFileError(
            f"{plain(path.name)}: cannot be hashed ({plain(str(error))}): check the file", code="file.unreadable"
        ) from error
    what = f"another program wrote to it in each of {READINGS} readings"
    raise LoraFileError(f"{plain(path.name)}: {what}: try again when it is written", code="file.being-written")


def describe_base(metadata: Mapping[str, str]) -> str | None:
    """The model family that a file says it was trained for and the field that says so, or None."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        if metadata.get(key):
            return f"{plain(metadata[key])} ({key})"
    return None


@lru_cache(maxsize=4096)
def _digest(path: Path, state: FileState) -> str:
    return hash_file(path)


def _parse_sha256(name: str, text: str | None) -> str | None:
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip().lower()):
        raise LoraFileError(
            f"{name}: expected SHA-256 {shown(text)} is not 64 hex digits: copy it again", code="file.no-sha256"
        )
    return text.strip().lower()


def _check_path(path: Path, name: str) -> None:
    if path.suffix.lower() not in ENDINGS:
        refuse_ending(path, name)
    if path.is_dir():
        raise LoraFileError(f"{name}: is a directory: choose a .safetensors file", code="file.directory")
    if not path.is_file():
        raise LoraFileError(f"{name}: no such file: check the name and the loras folder", code="file.no-such-file")


def _read_checked(file: BufferedReader, name: str, seen: Callable[[memoryview | bytes], object]) -> Stored:
    """All bytes of a file and its checked header; nothing beyond the header is read before it passes.

    ``seen`` gets the bytes piece by piece, in their order.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or 8 + length > size:
        refuse_contents(prefix + file.read(1024), size, name)
        raise LoraFileError(
            f"{name}: header of {length} bytes in a file of {size} bytes: {DAMAGED}", code="file.header"
        )
    if length > HEADER_LIMIT:
        what = f"header of {length} bytes, at most {HEADER_LIMIT} allowed"
        raise LoraFileError(
            f"{name}: {what}: if it is a LoRA file, save it without its training metadata", code="file.header"
        )
    header = file.read(length)
    if length > SMALL_HEADER:
        _check_marks(header, name)
    entries, metadata = _parse_header(header, name)
    _check_offsets(entries, size - 8 - length, name)
    names = sort_names(entries, name)
    _check_read(names.layers, entries, name)
    check_layers(names.layers, {tensor: entry.shape for tensor, entry in entries.items()}, name)
    seen(prefix + header)
    data = _room(size - 8 - length)
    memory: memoryview = data.numpy().data
    read = 0
    for start in range(0, len(data), PIECE):
        piece = memory[start : start + PIECE]
        read += file.readinto(piece)
        seen(piece)
    if len(header) != length or read != len(data) or file.read(1):
        raise LoraFileError(
            f"{name}: changed from {size} bytes while it was read: load it again", code="file.being-written"
        )
    return Stored(data, entries, names, metadata)


def _room(size: int) -> Tensor:
    """Memory for a file's bytes; in large pages where Linux has them, which a big file fills in a third of the time."""
    if size < PIECE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def _check_marks(header: bytes, name: str) -> None:
    """LoraFileError for a header of more JSON values than as many tensors as are allowed have: they take seconds.

    Escaped quotes, of which the texts in a trainer's metadata are full, count for nothing.
    """
    text = header.replace(rb"\\", b"").replace(rb"\"", b"")
    most = MARKS * TENSOR_LIMIT
    many = text.count(b'"') > most
    if not many:
        outside = b"".join(text.split(b'"')[::2])
        many = sum(map(outside.count, (b",", b":", b"[", b"{"))) > most
    if many:
        what = f"header of {len(header)} bytes holds more values than {TENSOR_LIMIT} tensors have"
        raise LoraFileError(f"{name}: {what}: use a LoRA file, or save it without its metadata", code="file.header")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; ValueError where a key comes twice, since readers differ in which one they take."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"names {shown(key)} twice")
            seen.add(key)
    return result


def _parse_header(header: bytes, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors by name, in the order in which they lie in the file, and the metadata."""
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(
            f"{name}: header is not valid JSON ({plain(str(error))}): {DAMAGED}", code="file.header"
        ) from error
    if not isinstance(table, dict):
        raise LoraFileError(f"{name}: header is a {type(table).__name__}, not an object: {DAMAGED}", code="file.header")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(
            f"{name}: metadata {shown(metadata)} is not text only: save the file without it", code="file.header"
        )
    if len(table) > TENSOR_LIMIT:
        refuse_other_files(table, name)
    if not 1 <= len(table) <= TENSOR_LIMIT:
        raise LoraFileError(
            f"{name}: holds {len(table)} tensors, 1 to {TENSOR_LIMIT} allowed: use a LoRA file", code="file.header"
        )
    try:
        entries = [(tensor, _parse_entry(tensor, entry, name)) for tensor, entry in table.items()]
    except LoraFileError:
        refuse_other_files(table, name)
        raise
    return dict(sorted(entries, key=lambda item: (item[1].start, item[1].end))), metadata


def _parse_entry(tensor: str, entry: Any, name: str) -> Entry:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        complete = len(entry) == 3
    except (TypeError, KeyError):
        complete = False
    if not complete:
        problem = f"entry {shown(entry)} lacks dtype, shape or data_offsets: {DAMAGED}"
    elif type(dtype) is not str:
        problem = f"dtype {shown(dtype)} is not text: {DAMAGED}"
    elif type(shape) is not list or len(shape) > 64 or not _are_sizes(shape):
        problem = f"shape {shown(shape)} is not 0 to 64 whole numbers: {DAMAGED}"
    elif type(offsets) is not list or [type(place) for place in offsets] != [int, int] or min(offsets) < 0:
        problem = f"data_offsets {shown(offsets)} must be two non-negative integers: {DAMAGED}"
    else:
        return Entry(dtype, tuple(shape), *offsets)
    raise LoraFileError(f"{name}: tensor {shown(tensor)}: {problem}", code="file.tensor")


def _are_sizes(values: list) -> bool:
    """Whether JSON values are whole numbers from 0 on and below the limit; true and 1.0 are none."""
    for value in values:  # noqa: SIM110, asked for every tensor, and a generator takes twice as long
        if type(value) is not int or not 0 <= value < SIZE_LIMIT:
            return False
    return True


def _check_read(layers: Mapping[str, Mapping[str, str]], entries: Mapping[str, Entry], name: str) -> None:
    """LoraFileError for a tensor of a layer whose dtype or shape is none that is read; the others are left out."""
    for roles in layers.values():
        for role, tensor in roles.items():
            dtype, shape, *_ = entries[tensor]
            if not (dtype in DTYPES or (role == "alpha" and dtype in ALPHA_DTYPES)):
                problem = f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}: save it in one"
            elif len(shape) > DIMENSIONS or 0 in shape:
                problem = f"shape {shown(list(shape))} is not 0 to {DIMENSIONS} sizes of 1 or more: {DAMAGED}"
            else:
                continue
            raise LoraFileError(f"{name}: tensor {shown(tensor)}: {problem}", code="file.tensor")


def _check_offsets(entries: Mapping[str, Entry], size: int, name: str) -> None:
    """Tensors must lie one after the other from the data's first byte to the file's last."""
    place = 0
    for tensor, entry in entries.items():
        known = _TYPES.get(entry.dtype)  # of another one the size is not known, and it is not read
        wanted = entry.end - entry.start if known is None else math.prod(entry.shape) * known.itemsize
        if entry.start != place or entry.end - entry.start != wanted or entry.end > size:
            what = f"bytes {entry.start} to {entry.end}, expected {place} to {place + wanted} of {size}"
            raise LoraFileError(f"{name}: tensor {shown(tensor)}: {what}: {DAMAGED}", code="file.tensor")
        place = entry.end
    if place != size:
        raise LoraFileError(f"{name}: {size - place} bytes after the last tensor: {DAMAGED}", code="file.tensor")


def _make_tensors(raw: Stored, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors of layers as views of a file's bytes and alphas as numbers; LoraFileError where a value is not finite.

    Tensors of one dtype that lie in a row are looked at together, as one tensor.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    used = {tensor: role == "alpha" for roles in raw.names.layers.values() for role, tensor in roles.items()}
    for (dtype, read), items in groupby(raw.entries.items(), key=lambda item: (item[1].dtype, item[0] in used)):
        if not read:
            continue
        run = dict(items)
        start, size = next(iter(run.values())).start, _TYPES[dtype].itemsize
        row = raw.data[start : next(reversed(run.values())).end]
        row = stored = (row if start % size == 0 else row.clone()).view(_TYPES[dtype])
        if stored.dtype == torch.float64:
            row = stored.float()
        if dtype in DTYPES and not _is_finite(row):
            _refuse_values(run, row, used, name)
        first, numbers = row.storage_offset() - start // size, []
        for tensor, entry in run.items():
            if used[tensor]:
                numbers.append((tensor, (entry.start - start) // size))
            else:
                tensors[tensor] = row.as_strided(entry.shape, _strides(entry.shape), first + entry.start // size)
        values = _at(stored, [place for _, place in numbers])
        alphas |= zip((tensor for tensor, _ in numbers), values, strict=True)
    return tensors, alphas


def _at(row: Tensor, places: list[int]) -> list[float]:
    """Numbers out of a row."""
    if row.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch picks none out of these
        return [float(row[place].item()) for place in places]
    return row[torch.tensor(places, dtype=torch.long)].double().tolist()


def _refuse_values(run: Mapping[str, Entry], row: Tensor, is_alpha: Mapping[str, bool], name: str) -> None:
    """LoraFileError for the first tensor of ``row`` that is not finite; what an alpha may be, its format decides."""
    pieces = row.split([math.prod(entry.shape) for entry in run.values()])
    for tensor, piece in zip(run, pieces, strict=True):
        if not is_alpha[tensor] and not _is_finite(piece):
            peak = piece.double().abs().amax().item()  # NaN and inf both come through amax
            raise LoraFileError(
                f"{name}: tensor {shown(tensor)}: holds {peak}: train or convert the LoRA again", code="file.not-finite"
            )


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_finite(values: Tensor) -> bool:
    if (limit := _NOT_FINITE.get(values.dtype)) is not None:
        return int((values.view(torch.uint8) & 0x7F).max()) < limit
    low, high = torch.aminmax(values)  # NaN comes through
    return math.isfinite(low.item()) and math.isfinite(high.item())
