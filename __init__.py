"""Modular LoRA Guard: a safety LoRA and task LoRAs, unmerged, whole or stopped (W* = W0 + dW_safe + dW_task)."""

import sys
from pathlib import Path

NAME = "modular_lora_guard"  # of the package, whatever its folder is called
WEB_DIRECTORY = "./web"

_first = sys.modules.setdefault(NAME, sys.modules[__name__])
if Path(_first.__path__[0]).resolve() != Path(__path__[0]).resolve():
    raise ImportError(
        f"Modular LoRA Guard is installed twice, in {_first.__path__[0]} and {__path__[0]}: remove one of them."
    )


async def comfy_entrypoint():
    """ComfyUI's V3 entry point; the nodes are imported here, so that the core can be used without ComfyUI."""
    from modular_lora_guard.nodes.extension import ModularLoraExtension

    return ModularLoraExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
