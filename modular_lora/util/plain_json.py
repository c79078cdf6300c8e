"""JSON that every reader takes: a number that is none (NaN, infinity) has no form in it and becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import atomic


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` of a value, with null in the place of NaN and infinity."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def write(value: Any, path: str | Path) -> None:
    """Write a value as a JSON file, whole or not at all, and the folder where it is missing. Raises OSError."""
    atomic.write(path, dumps(value, indent=1, ensure_ascii=False) + "\n", parents=True)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises OSError, and ValueError for a text that is something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def finite(value: Any) -> Any:
    """The value with None in the place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value
