"""``python -m tools.world.equal``: the paper's claim at equal quality (command.py), from the clone's folder."""

import sys

from modular_lora_guard.tools.world.equal.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
