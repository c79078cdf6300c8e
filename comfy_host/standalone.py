"""Make ComfyUI importable in a standalone process, with its argument parsing off."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from ..modular_lora.command import find_comfyui


def has_accelerator() -> bool:
    """Whether torch sees a device that ComfyUI would use."""
    import torch

    if hasattr(torch, "accelerator"):
        return bool(torch.accelerator.is_available())
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def start(folder: Path | None, cpu: bool) -> None:
    """Make ``comfy`` importable; call it before anything of ComfyUI is imported. GuardError where it is not found.

    On the CPU where that is asked for, and where there is nothing else.
    """
    found = str(find_comfyui(folder))
    if found not in sys.path:
        sys.path.insert(0, found)
    importlib.import_module("comfy.options").enable_args_parsing(False)
    if cpu or not has_accelerator():  # read when comfy.model_management is first imported
        importlib.import_module("comfy.cli_args").args.cpu = True
