"""What the pack adds to ComfyUI's start: processor seconds of loading it as a custom node, in fresh processes.

python -m tools.benchmarks.speed_import COMFYUI
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .speed_rounds import Timing  # nothing of the pack, whose import is measured

ROOT = Path(__file__).resolve().parents[2]


def measure(comfyui: Path, rounds: int) -> Timing:
    """Seconds of every start but the first, which compiles; RuntimeError with the last lines of one that fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for _ in range(rounds + 1):
        command = [sys.executable, "-m", "tools.benchmarks.speed_import", str(comfyui)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"loading the pack failed:\n{done.stderr[-4000:]}")
        found.append(tuple(map(float, done.stdout.split()[-2:])))
    return Timing(*zip(*found[1:], strict=True))


def main(comfyui: str) -> None:
    """ComfyUI first, all that it imports by itself, then the pack by ComfyUI's own loader."""
    sys.path[:] = [comfyui, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    importlib.import_module("comfy.options").enable_args_parsing(False)
    args = importlib.import_module("comfy.cli_args").args
    with tempfile.TemporaryDirectory() as folder:
        args.cpu, args.base_directory = True, folder
        for name in ("utils.install_util", "execution", "nodes", "server", "comfy_api.latest"):
            importlib.import_module(name)
        loop = asyncio.new_event_loop()
        sys.modules["server"].PromptServer(loop)  # as main.py makes it before it loads custom nodes
        nodes = sys.modules["nodes"]
        loop.run_until_complete(nodes.init_builtin_extra_nodes())
        importlib.import_module("comfy_config.config_parser")  # by the first custom node, whichever it is
        wall, cpu = time.perf_counter(), time.process_time()
        loaded = loop.run_until_complete(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if not loaded:
        raise RuntimeError("ComfyUI could not load the pack; its log says why")
    sys.stdout.write(f"{cpu:.6f} {wall:.6f}\n")


if __name__ == "__main__":
    main(sys.argv[1])
