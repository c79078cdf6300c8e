"""What the judged images come to: docs/figures/evidence.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .protocol import Cell, Protocol
from .results import Result


def write(path: Path, protocol: Protocol, done: Mapping[Cell, Result]) -> None:
    """Rates, intervals and tests of what is done."""
