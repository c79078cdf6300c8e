"""Folders that will be written to, tried before anything that takes long."""

from __future__ import annotations

from pathlib import Path

from .errors import GuardError
from .util.folders import try_writing


def check_writable(folder: str | Path, option: str) -> None:
    """GuardError, naming the option, where a file cannot be made in ``folder``; leaves nothing behind, made or not."""
    folder = Path(folder).absolute()
    try:
        try_writing(folder)
    except OSError as error:
        raise GuardError(
            f"{option} {folder}: cannot be written to ({error.strerror or error}): choose another folder.",
            code="place.not-writable",
        ) from error
