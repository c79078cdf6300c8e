"""``python -m tools.templates``: build, lay out, run and picture templates and blueprints, from the clone's folder."""

import sys

from modular_lora_guard.tools.templates.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
