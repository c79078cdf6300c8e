"""Files and folders that are written whole or not at all.

Everything is written under a temporary name in the folder that it belongs in and takes its name at the end. A failed
write leaves what was there before and no temporary file. All functions raise OSError; callers say what the user can
do about it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

PART = ".part-"  # every temporary name starts with it


def temporary(folder: Path, ending: str = "") -> Path:
    """A new temporary name in ``folder``. It is short, as the final name may be as long as names can be."""
    return folder / f"{PART}{secrets.token_hex(6)}{ending}"


def write(path: str | Path, content: str | bytes, *, sync: bool = False, parents: bool = False) -> None:
    """Write a whole file, over the one that is there.

    Args:
        content: Bytes, or text that is written as UTF-8.
        sync: As in `replacing`.
        parents: As in `replacing`.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path, sync=sync, parents=parents) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def replacing(
    path: str | Path, *, ending: str = "", sync: bool = False, parents: bool = False
) -> AbstractContextManager[Path]:
    """A temporary file to write, which replaces the file at ``path`` at the end of the block.

    Args:
        ending: End of the temporary name, for writers that choose the format by it.
        sync: Wait until the contents are on the disk before the file takes its name.
        parents: Make the folder where it is missing.

    Returns:
        A context whose value is the temporary path; nothing is there yet.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    return _written(path, ending, sync, os.replace)


def creating(path: str | Path, *, ending: str = "", sync: bool = False) -> AbstractContextManager[Path]:
    """A temporary file to write, which takes the name ``path`` at the end of the block unless that is taken.

    Arguments and value are those of `replacing`.

    Raises:
        FileExistsError: Something has that name, before the block or after it; it stays as it is.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(path)
    return _written(path, ending, sync, _take_free_name)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new temporary folder to fill, which replaces the folder at ``path`` at the end of the block.

    Its name is fixed, so that the next writer clears what a killed process has left; two at a time are not supported.

    Raises:
        OSError: The folder cannot be written.
    """
    part = path.with_name(f"{PART}{path.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, path: Path) -> None:
    """Give the finished folder ``part`` the name of the folder at ``path``, which is deleted where there is one."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Wait until a new name in a folder is on the disk; Windows has no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _written(path: Path, ending: str, sync: bool, name: Callable[[Path, Path], None]) -> Iterator[Path]:
    part = temporary(path.parent, ending)
    try:
        yield part
        if sync:
            with part.open("r+b") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
        name(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def _take_free_name(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # in one step, and unlike a renaming never over a file that has just come
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise
