"""LoRA files that were read before, kept so that going back to them costs nothing."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import LoraFileError
from .files import LoraFile, read_lora, sha256_file
from .util.cache import Cache
from .util.file_state import FileState, find_file_state

FILES = 2**30  # bytes of LoRA files
Key = tuple[str, FileState]  # path and state

_files: Cache[Key, tuple[LoraFile, int]] = Cache(FILES, lambda entry: entry[1])
_digests: Cache[Key, str] = Cache(4096)  # of the last files, kept or not


def kept_lora(path: Path, expected_sha256: str | None = None) -> LoraFile:
    """`read_lora`, remembered by path and file state."""
    key = _key(path)
    entry = _files.get(key) if key else None
    wanted = (expected_sha256 or "").strip().lower()
    if entry is not None and wanted in ("", entry[0].sha256):
        return entry[0]
    lora = read_lora(path, expected_sha256=expected_sha256)
    if key and _key(path) == key:
        _files.put(key, (lora, key[1].size))
        _digests.put(key, lora.sha256)
    return lora


def kept_sha256(path: Path) -> str:
    """SHA-256 of a LoRA file that is about to be used: the reading that takes it is kept; raises LoraFileError."""
    if (key := _key(path)) and (known := _digests.get(key)):
        return known
    try:
        return kept_lora(path).sha256
    except LoraFileError:  # what is wrong with it is said where it is loaded
        return sha256_file(path)


def forget_files() -> None:
    """Drop all files and their hashes."""
    _files.clear()
    _digests.clear()


def _key(path: Path) -> Key | None:
    state = find_file_state(path)
    return (os.fspath(path), state) if state else None
