"""Attempts to get an unguarded picture out of ComfyUI under a policy: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability escapes --comfyui COMFYUI --world WORLD --record

Runs the catalogue of tests/support/escapes.py, one test an attempt, in the real ComfyUI. An attempt counts as an escape
unless its test passes: no picture came out but attested ones, no evaluation of the network was unguarded, and what was
refused is in the record.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .figures import record

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "test_operators_escapes.py"
ATTEMPT = "test_no_unguarded_picture_comes_out"
_log = logging.getLogger("modular_lora")


class Outcomes:
    """A plugin of pytest that notes what became of each attempt."""

    def __init__(self):
        self.tried: set[str] = set()
        self.passed: dict[str, str] = {}  # attempt -> refused, invalid or permitted

    def pytest_collection_modifyitems(self, items) -> None:
        self.tried = {item.nodeid for item in items if item.originalname == ATTEMPT}

    def pytest_runtest_logreport(self, report) -> None:
        if report.nodeid in self.tried and report.when == "call" and report.passed:
            self.passed[report.nodeid] = dict(report.user_properties)["outcome"]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no attempt was an escape, else 1."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.reliability escapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--world", type=Path, required=True, help="folder of the expanded demo world")
    parser.add_argument("--record", action="store_true", help="put the figures into docs/figures/reliability.json")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    _log.setLevel(logging.INFO)
    import pytest

    os.environ |= {"MODULAR_LORA_COMFYUI": str(chosen.comfyui), "MODULAR_LORA_WORLD": str(chosen.world)}
    outcomes = Outcomes()
    pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider", "-k", ATTEMPT, "--all"], plugins=[outcomes])
    escaped, how = sorted(outcomes.tried - outcomes.passed.keys()), Counter(outcomes.passed.values())
    rows = {
        "escape attempts": len(outcomes.tried),
        "escapes": len(escaped),
        "escape attempts: refused by the policy or the guard, and in the record": how["refused"],
        "escape attempts: refused by ComfyUI itself": how["invalid"],
        "escape attempts: permitted on purpose, every picture attested": how["permitted"],
    }
    for name, value in rows.items():
        _log.info("%s: %s", name, value)
    for name in escaped:
        _log.error("not held: %s", name)
    if chosen.record and outcomes.tried:
        record("reliability.json", rows, "python3 -m tools.benchmarks.reliability escapes")
    return int(bool(escaped) or not outcomes.tried)


if __name__ == "__main__":
    sys.exit(main())
