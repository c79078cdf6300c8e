"""``python -m world``: the paper's table on the demo world (evidence.py), from the pack's folder."""

import importlib
import sys

from training.__main__ import NAME, register

if __name__ == "__main__":
    register()
    sys.exit(importlib.import_module(f"{NAME}.world.evidence").main(sys.argv[1:]))
