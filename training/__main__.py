"""``python -m training``: the trainers on the command line, from the pack's folder.

The pack is registered under one name, since its own folder may be called anything, and taken off the path, where its
``nodes`` would hide ComfyUI's.
"""

import importlib.util
import sys
from pathlib import Path

ROOT, NAME = Path(__file__).resolve().parent.parent, "modular_lora_guard"


def register() -> None:
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    register()
    sys.exit(importlib.import_module("modular_lora_guard.training.cli").main(sys.argv[1:]))
