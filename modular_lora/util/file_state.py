"""How a file is recognised as unchanged without reading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """What changes when a file is written or replaced, also by one of the same size and modification time."""

    size: int  # bytes
    modified: int  # last change of the contents, ns
    changed: int  # last change of the entry, ns; Windows: when the file was made
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def file_state(path: str | Path) -> FileState:
    """The state of the file at ``path``, links followed. Raises OSError, and ValueError for a path with a NUL."""
    return FileState.of(os.stat(path))


def find_file_state(path: str | Path) -> FileState | None:
    """`file_state`, or None where there is no file to look at."""
    try:
        return file_state(path)
    except (OSError, ValueError):
        return None
