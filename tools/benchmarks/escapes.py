"""Attempts to get an unguarded image out of ComfyUI under a policy: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability escapes --comfyui COMFYUI --world WORLD --record

Runs the catalogue of tests/support/escapes.py, one test an attempt, in the real ComfyUI. An attempt counts as an escape
unless its test passes: no image came out but attested ones, no evaluation of the network was unguarded, and what was
refused is in the record.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .bench import finish, parser
from .figures import ROOT

TESTS = ROOT / "tests" / "escapes" / "test_operators_escapes.py"
ATTEMPT = "test_no_unguarded_image_comes_out"
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
    made = parser(__doc__, "reliability.json", part="escapes")
    made.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    made.add_argument("--world", type=Path, required=True, help="folder of the expanded demo world")
    chosen = made.parse_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
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
    for name in escaped:
        _log.error("not held: %s", name)
    command = "python3 -m tools.benchmarks.reliability escapes"
    finish(rows, "reliability.json", command, chosen.record and bool(outcomes.tried))
    return int(bool(escaped) or not outcomes.tried)


if __name__ == "__main__":
    sys.exit(main())
