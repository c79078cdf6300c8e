"""Where things lie in the clone."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "modular-lora-guard"
IMPORT_NAME = "modular_lora_guard"

RUN = ROOT / ".run"  # everything that run.py makes; safe to delete
VENV = RUN / "venv"
LOGS = RUN / "logs"
COMFYUI = RUN / "comfyui"
FROM_GIT = RUN / "from-git"  # ComfyUI as --comfyui-git names it, a folder a name
WORLD_ASSETS = ROOT / "tools" / "world" / "assets"  # not in the registry's archive (.comfyignore)
WORLD = RUN / "world"  # the demo checkpoint, expanded
BROWSER = RUN / "browser"
FRONT_ENDS = RUN / "front-ends"  # others than ComfyUI's own, a folder a version
TEST_PACKAGES = RUN / "test-packages"  # test tools beside an existing ComfyUI's interpreter
CHECK = RUN / "check"  # the environment of `run.py check`
BYTECODE = RUN / "bytecode"  # what Python compiles for tests, of the clone and of all packages
TYPES = RUN / "types"  # the clone as mypy sees it
SIGNATURE_PACKAGES = RUN / "signature-packages"  # what signs and verifies, likewise
DEMO_OUTPUT = ROOT / "demo_output"


def base_of(comfyui: Path) -> Path:
    """The base directory (models, input, output, user) that a ComfyUI is given instead of its own folder."""
    if comfyui == COMFYUI:
        return RUN / "base"
    return RUN / f"base-{hashlib.sha256(str(comfyui).encode()).hexdigest()[:8]}"
