"""``python -m tools.demo``: what run.py starts with ComfyUI's interpreter, from the clone's folder."""

import sys

from modular_lora_guard.tools.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
