"""The pack under its one name, ``modular_lora_guard``, for every process that ComfyUI did not start.

The pack's folder may be called anything, so a process puts this file's folder on its path instead:

    sys.path.append("PACK/importable")
    from modular_lora_guard.modular_lora.files import read_lora

``pip install -e .`` gives the same name, and inside ComfyUI the pack gives it to itself (``__init__.py``).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
__path__ = [str(ROOT)]  # which makes a package of this module

# A command that runs in the pack's folder has that folder on its path, where our nodes/ would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
