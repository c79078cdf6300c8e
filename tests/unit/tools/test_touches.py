"""The table of what is touched of ComfyUI: its places are in our code, and no comment repeats it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from modular_lora_guard.comfy_host.versions import NEWER, OLDER, TOUCHES

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = ("comfy_host", "nodes", "modular_lora", "operators", "gate", "audit", "training")
BOTH = re.compile(rf"{re.escape(OLDER)}(,| and|)\s+{re.escape(NEWER)}")


def names(file: Path) -> set[str]:
    """What a file defines at its top level."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("place", sorted({touch.place for touch in TOUCHES}))
def test_every_place_of_a_touch_is_in_our_code(place: str) -> None:
    file, _, symbol = place.partition(":")
    assert symbol in names(ROOT / file)


def test_every_touch_is_listed_once_and_says_how_it_was_seen() -> None:
    listed = [(touch.name, touch.place) for touch in TOUCHES]
    assert len(listed) == len(set(listed))
    assert all(touch.seen and set(touch.seen) <= {OLDER, NEWER} for touch in TOUCHES)


def test_the_versions_of_a_touch_stand_in_the_table_alone() -> None:
    files = (file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py"))
    assert [file.relative_to(ROOT).as_posix() for file in files if BOTH.search(file.read_text(encoding="utf-8"))] == []
