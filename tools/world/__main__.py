"""``python -m tools.world``: the paper's table on the demo world (evidence.py), from the clone's folder."""

import sys

from modular_lora_guard.tools.world.evidence import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
