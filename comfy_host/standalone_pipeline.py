"""A sampler for standalone processes: each worker of an audit opens one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..audit.plan import Pipeline
from ..modular_lora.errors import GuardError
from .standalone import start


@contextmanager
def open_pipeline(checkpoint: str, comfyui: str = "", cpu: bool = False, device_index: int = 0) -> Iterator[Pipeline]:
    """A ComfyPipeline on a checkpoint file in the precision that ComfyUI gives it (fp32 on the CPU); unloaded after.

    ``comfyui`` is ComfyUI's folder, "" where it is to be looked for; ``device_index`` counts the GPUs this process
    sees. ComfyUI reads both when it is first imported, so one process has one device. Raises GuardError.
    """
    start(Path(comfyui) if comfyui else None, cpu)
    if not cpu and torch.cuda.is_available():
        if device_index >= torch.cuda.device_count():
            raise GuardError(
                f"GPU {device_index} of {torch.cuda.device_count()}: there is no such device; count from 0."
            )
        torch.cuda.set_device(device_index)  # which comfy.model_management.get_torch_device asks for
    pipelines = importlib.import_module(".pipeline", __package__)
    if cpu and (device := pipelines.device()).type != "cpu":
        raise GuardError(
            f"ComfyUI runs on {device} in this process already: open a sampler for the CPU in a process of its own."
        )
    try:
        with torch.inference_mode():  # as ComfyUI's executor loads
            loaded = pipelines.load(Path(checkpoint))
        yield pipelines.ComfyPipeline(*loaded)
    finally:
        loaded = None
        pipelines.unload()
