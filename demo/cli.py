"""The commands that run with ComfyUI's interpreter: demo, comfy, world."""

from __future__ import annotations


def main() -> int:
    return 0
