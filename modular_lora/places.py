"""Folders that will be written to, tried before anything that takes long."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import GuardError


def check_writable(folder: str | Path, option: str) -> None:
    """GuardError, naming the option, where a file cannot be made in ``folder``; leaves nothing behind, made or not."""
    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GuardError(
            f"{option} {folder}: cannot be written to ({error.strerror or error}): choose another folder."
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
