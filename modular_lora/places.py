"""Folders that will be written to, tried before anything that takes long."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import GuardError


def check_writable(folder: str | Path, option: str) -> None:
    """Makes ``folder`` and a file in it, which goes again; GuardError, naming the option, where that fails."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GuardError(
            f"{option} {folder}: cannot be written to ({error.strerror or error}): choose another folder."
        ) from error
