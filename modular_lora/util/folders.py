"""Folders that will be written to."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path


def try_writing(folder: str | Path) -> None:
    """Make a file in ``folder`` and remove it again, and with it every folder that had to be made.

    Raises:
        OSError: That is not possible.
    """
    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
