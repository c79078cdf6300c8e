"""What was read and built before, kept so that going back to it costs nothing: bounded in bytes, oldest out first."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from .errors import LoraFileError
from .files import LoraFile, read_lora, sha256_file

T = TypeVar("T")
FILES = 2**30  # bytes of LoRA files

State = tuple[str, int, int, int]  # path, size, time of the last change, inode


class Warm(Generic[T]):
    """The last used values whose sizes together stay within ``limit``; ``size`` is asked anew at every change.

    Sizes are bytes, or 1 each where none is given: then ``limit`` is how many are kept.
    """

    def __init__(self, limit: int, size: Callable[[T], int] = lambda _: 1):
        self.limit, self._size = limit, size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(map(self._size, self._kept.values()))

    def get(self, key: Hashable) -> T | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, value: T) -> T:
        """Keep ``value``; the one that was used last stays even if it is larger than the limit by itself."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self.nbytes > self.limit:
            self._kept.popitem(last=False)
        return value

    def drop(self, where: Callable[[Hashable], bool]) -> None:
        for key in [key for key in self._kept if where(key)]:
            del self._kept[key]

    def clear(self) -> None:
        self._kept.clear()


_files: Warm[tuple[LoraFile, int]] = Warm(FILES, lambda entry: entry[1])
_digests: Warm[str] = Warm(4096)  # of the last files, kept or not


def kept_lora(path: Path, expected_sha256: str | None = None) -> LoraFile:
    """`read_lora`, remembered by path, size, modification time and inode."""
    state = _state(path)
    entry = _files.get(state) if state else None
    wanted = (expected_sha256 or "").strip().lower()
    if entry is not None and wanted in ("", entry[0].sha256):
        return entry[0]
    lora = read_lora(path, expected_sha256=expected_sha256)
    if state and _state(path) == state:
        _files.put(state, (lora, state[1]))
        _digests.put(state, lora.sha256)
    return lora


def kept_sha256(path: Path) -> str:
    """SHA-256 of a LoRA file that is about to be used: the reading that takes it is kept; raises LoraFileError."""
    if (state := _state(path)) and (known := _digests.get(state)):
        return known
    try:
        return kept_lora(path).sha256
    except LoraFileError:  # what is wrong with it is said where it is loaded
        return sha256_file(path)


def forget_files() -> None:
    """Drop all files and their hashes."""
    _files.clear()
    _digests.clear()


def _state(path: Path) -> State | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ino
