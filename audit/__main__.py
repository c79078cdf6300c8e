"""``python -m audit``: the audit on the command line, from the pack's folder."""

import importlib
import sys

from training.__main__ import register

if __name__ == "__main__":
    register()
    sys.exit(importlib.import_module("modular_lora_guard.audit.cli").main(sys.argv[1:]))
