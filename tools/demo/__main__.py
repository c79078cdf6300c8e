"""Entry point that run.py starts with ComfyUI's interpreter.

The pack is imported under its own name and the clone stays off sys.path, as in ComfyUI, which has modules of the
same names.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_pack(name: str = "modular_lora_guard") -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT}: the pack's __init__.py is missing; clone it again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tools" / "demo")]
    load_pack()
    sys.exit(importlib.import_module("modular_lora_guard.tools.demo.cli").main())
