"""Writes formats, families, templates and training_{families,width,presets}.json from tests that try each row.

    python -m tools.benchmarks.matrix [pytest arguments]

Needs what `python3 run.py test` sets up (MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD). A row is worked out by the
test that it names (fixture ``matrix`` in tests/conftest.py); nothing is written unless every test passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .figures import ROOT, write

TESTS = (
    "tests/comfy/files/test_formats.py",
    "tests/comfy/files/test_published_names.py",
    "tests/comfy/guard/test_families.py",
)
TESTS += ("tests/comfy/guard/test_text_encoders.py", "tests/comfy/files/test_precision.py")
TESTS += ("tests/comfy/training/test_training_every_family.py", "tests/comfy/training/test_training_presets_run.py")
TESTS += ("tests/comfy/training/test_training_real_width.py", "tests/comfy/training/test_training_clips.py")
TESTS += ("tests/comfy/guard/test_drop_in_templates.py",)
COMMAND = "python -m tools.benchmarks.matrix"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        tests = [test for test in TESTS if (ROOT / test).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "--all", *tests, *arguments]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"MODULAR_LORA_FIGURES": str(lines)}).returncode
        if code or not lines.exists():
            return code or 1
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    for file in sorted({row["file"] for row in rows}):
        write(file, _joined([row for row in rows if row["file"] == file]), COMMAND)
    return 0


def _joined(rows: list[dict]) -> list[dict]:
    """One row a name, in the order in which they came: the largest error of all its tests, where they measure one."""
    found: dict[str, dict] = {}
    for row in rows:
        same = found.setdefault(row["name"], {key: value for key, value in row.items() if key != "file"})
        if same["status"] != row["status"]:
            raise ValueError(f"{row['name']}: {same['status']} in {same['test']}, {row['status']} in {row['test']}")
        errors = [r["max_error"] for r in (same, row) if r["max_error"] is not None]
        same["max_error"] = max(errors, default=None)
    measured = any(row["max_error"] is not None for row in found.values())
    return [row if measured else {k: v for k, v in row.items() if k != "max_error"} for row in found.values()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
