"""``python -m operators``: keys, signatures, the record and the policy on the command line, from the pack's folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))
from modular_lora_guard.operators.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
