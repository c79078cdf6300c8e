"""What a clone has beside the pack: it can be left out of an installation, and its lines are counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from modular_lora_guard.tools import lines

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow  # another interpreter imports PyTorch
def test_the_command_lines_need_nothing_of_tools() -> None:
    code = (
        "import importlib, sys; sys.path.append(sys.argv[1]); sys.modules['modular_lora_guard.tools'] = None\n"
        "for name in ('training', 'audit', 'operators'): importlib.import_module(f'modular_lora_guard.{name}.cli')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "importable")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("", 0),
        ('"""Docstring."""\n\n# comment\nx = 1  # more\n', 1),
        ("x = (\n    1,\n\n    # comment\n    2,\n)\n", 4),
        ('def f():\n    """One\n\n    two."""\n    return """a\n\nb"""\n', 4),
        ('"""Docstring."""\n"another text"\n', 1),
        ("class A:\n    x = 1\n    'no docstring'\n", 3),
    ],
)
def test_lines_of_code_are_those_with_code(source: str, count: int) -> None:
    assert lines.count(source) == count


def test_lines_are_counted_by_folder_without_tests_and_hidden_folders(tmp_path: Path) -> None:
    for name in ("one.py", "a/two.py", "a/b/three.py", "tests/four.py", ".run/five.py", "a/.cache/six.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\ny = 2\n")
    assert lines.folders(tmp_path) == {".": 2, "a": 4}
