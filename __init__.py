"""Modular LoRA Guard: a safety LoRA and task LoRAs, unmerged, whole or stopped (W* = W0 + dW_safe + dW_task)."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's V3 entry point; the nodes are imported here, so that the core can be used without ComfyUI."""
    from .nodes.extension import ModularLoraExtension

    return ModularLoraExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
