"""``python -m tools.world``: the paper's table on the demo world (evidence.py), from the pack's folder."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("modular_lora_guard.tools.world.evidence").main(sys.argv[1:]))
