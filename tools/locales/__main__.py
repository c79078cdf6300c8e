"""``python -m tools.locales``: what is missing in which language, from the clone's folder."""

import sys

from modular_lora_guard.tools.locales.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
