"""The pack's version, which stands in pyproject.toml alone: ComfyUI's registry reads it there."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path


def _version() -> str:
    """That of the clone or the folder in custom_nodes; elsewhere that of the installed distribution."""
    project = Path(__file__).with_name("pyproject.toml")
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    stated = re.search(r'^version = "([^"]+)"$', text, re.MULTILINE)
    return stated.group(1) if stated else metadata.version("modular-lora-guard")


VERSION = _version()
