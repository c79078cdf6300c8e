"""``python -m operators``: keys, signatures, the record and the policy on the command line, from the pack's folder."""

import importlib
import sys

from training.__main__ import register

if __name__ == "__main__":
    register()
    sys.exit(importlib.import_module("modular_lora_guard.operators.cli").main(sys.argv[1:]))
