"""A second front end for the browser's tests: the newest that was tried, beside the one that ComfyUI brings along."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...modular_lora.util import atomic
from . import environment, paths
from .console import RunError, say

PACKAGE, VERSION = "comfyui-frontend-package", "1.58.1"
REMEDY = "The browser's tests run on ComfyUI's own front end alone; everything else runs."


def ensure(python: Path) -> dict[str, str]:
    """Put the front end into a folder of its own, where no ComfyUI looks for one by itself.

    Args:
        python: An interpreter with pip; nothing is installed into it.

    Returns:
        The variable that the browser's tests read; when it cannot be had, the reason instead.
    """
    folder = paths.FRONT_ENDS / VERSION
    stamp, wanted = folder / "front-end.stamp", f"{PACKAGE}=={VERSION}"
    if not environment.is_current(stamp, wanted):
        try:
            with environment.changing():
                shutil.rmtree(folder, ignore_errors=True)
                environment.pip(python, f"front end {VERSION}", ["--no-deps", "--target", folder, wanted])
                atomic.write(stamp, wanted, parents=True)
        except RunError as error:
            say(f"  front end {VERSION}: {error}")
            return {"MODULAR_LORA_NO_FRONT_END": f"front end {VERSION}: {str(error).splitlines()[0]} {REMEDY}"}
    return {"MODULAR_LORA_FRONT_END": str(folder / PACKAGE.replace("-", "_") / "static")}
