"""Registers the repository as the package `modular_lora_guard`, the way ComfyUI loads a pack from custom_nodes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _register() -> None:
    spec = importlib.util.spec_from_file_location(
        "modular_lora_guard", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["modular_lora_guard"] = module
    spec.loader.exec_module(module)


_register()
