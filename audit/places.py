"""Files and folders that an audit reads or writes late, looked at before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..modular_lora.errors import GuardError
from ..modular_lora.places import check_writable
from .options import AuditOptions

FILES, FOLDERS = ("synonyms", "inception"), ("task_pictures", "start_pictures", "clip")


def check(options: AuditOptions) -> None:
    """GuardError for what is not there, and for an output_dir that cannot be written to."""
    for name, kind in _missing(options):
        raise GuardError(f"{name} {getattr(options, name)}: no such {kind}: check the path.")
    check_writable(options.output_dir, "output_dir")


def _missing(options: AuditOptions) -> Iterator[tuple[str, str]]:
    yield from ((n, "file") for n in FILES if (path := getattr(options, n)) and not Path(path).is_file())
    yield from ((n, "folder") for n in FOLDERS if (path := getattr(options, n)) and not Path(path).is_dir())
