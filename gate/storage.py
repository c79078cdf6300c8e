"""JSON files, written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from ..modular_lora import plain_json
from .errors import GateError, one_line


def write_json(value: object, path: str | Path) -> None:
    """Write ``value`` in the place of what is at ``path``. Raises GateError where that cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{uuid.uuid4().hex}.part")  # short: the file's own name may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(plain_json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise GateError(f"{path.name}: cannot be written ({one_line(error)}): check the folder.") from error
