"""``python -m tools.templates``: build, lay out and run templates and blueprints, and make their images.

From the folder of the clone.
"""

import sys

from modular_lora_guard.tools.templates.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
