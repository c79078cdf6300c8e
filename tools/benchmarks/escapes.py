"""Attempts to get an unguarded image out of ComfyUI, and mutated graphs: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability escapes --comfyui COMFYUI --world WORLD [--guard nodes] [--record]
    python3 -m tools.benchmarks.reliability mutations --comfyui COMFYUI --world WORLD [--guard node attach] [--record]

``escapes`` runs the catalogue of tests/support/escapes.py under a policy, ``mutations`` the 200 graphs of
tests/support/mutations.py, whole and in the real ComfyUI. ``--guard`` says what guards: "nodes", this pack's own in the
graph; "node", the node *Guard* alone and stock nodes behind it; "attach", no node at all and a policy that guards every
model. An attempt counts as an escape unless its test passes: no image came out but attested ones, no evaluation of the
network was unguarded, and what was refused is in the record. A mutated graph's test passes where each image that is
reported guarded is that of the merge. Rows of mutated graphs are said only where every test passed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .bench import finish, parser
from .figures import ROOT

FILE = "reliability.json"
GUARDS = {"nodes": "", "node": " with Guard alone", "attach": " without a node"}  # how the names of rows go on
_log = logging.getLogger("modular_lora")


class Trial(NamedTuple):
    """What is run whole.

    Attributes:
        file: Of its tests.
        tests: Of each guard.
        what: A row's name.
        failures: A row's name for tests that did not pass; "" where rows are said only if all did.
        said: What came of it, in a row's words.
    """

    file: Path
    tests: dict[str, str]
    what: str
    failures: str
    said: dict[str, str]


ESCAPES = Trial(
    ROOT / "tests" / "escapes" / "test_operators_escapes.py",
    {
        "nodes": "test_no_unguarded_image_comes_out",
        "node": "test_nor_does_one_where_the_drop_in_node_is_the_guard",
        "attach": "test_nor_does_one_where_every_model_is_guarded_without_a_node",
    },
    "escape attempts",
    "escapes",
    {
        "refused": "refused by the policy or the guard, and in the record",
        "invalid": "refused by ComfyUI itself",
        "permitted": "permitted on purpose, every picture attested",
        "attested": "every picture attested",
        "refused and attested": "some of it refused, every picture attested",
        "nothing": "no picture came out",
        "ended": "ended early, as what they ask of an answer holds for this pack's own nodes",
    },
)
MUTATIONS = Trial(
    ROOT / "tests" / "comfy" / "guard" / "test_mutations.py",
    {
        "nodes": "test_no_image_is_unguarded_and_reported_guarded",
        "node": "test_nor_is_one_where_the_drop_in_node_is_the_guard",
        "attach": "test_nor_is_one_where_every_model_is_guarded_without_a_node",
    },
    "mutated graphs",
    "",
    {
        "attested": "attested, every attested picture that of the merge",
        "unattested": "no picture attested",
        "refused by the guard": "refused by the guard",
        "refused by ComfyUI": "refused by ComfyUI itself",
        "not translated": "no graph with Guard corresponds to it",
    },
)


class Outcomes:
    """A plugin of pytest that notes what became of each attempt of one test."""

    def __init__(self, test: str):
        self.test = test
        self.tried: set[str] = set()
        self.passed: dict[str, dict[str, int]] = {}  # test -> what came, how often

    def pytest_collection_modifyitems(self, items) -> None:
        self.tried = {item.nodeid for item in items if item.originalname == self.test}

    def pytest_runtest_logreport(self, report) -> None:
        if report.nodeid in self.tried and report.when == "call" and report.passed:
            self.passed[report.nodeid] = dict(report.user_properties)["outcomes"]

    def failed(self) -> list[str]:
        return sorted(self.tried - self.passed.keys())

    def rows(self, trial: Trial, guard: str) -> dict[str, object]:
        """Name of a row -> figure."""
        what = trial.what + GUARDS[guard]
        came = sum(map(Counter, self.passed.values()), Counter())
        rows: dict[str, object] = {what: len(self.tried) if trial.failures else came.total()}
        if trial.failures:
            rows[trial.failures + GUARDS[guard]] = len(self.failed())
        return rows | {f"{what}: {trial.said[name]}": n for name, n in sorted(came.items())}


def run(trial: Trial, arguments: Sequence[str] | None, part: str) -> int:
    """0 where every test passed, else 1."""
    made = parser(__doc__, FILE, part=part)
    made.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    made.add_argument("--world", type=Path, required=True, help="folder of the expanded demo world")
    made.add_argument("--guard", nargs="+", choices=tuple(GUARDS), default=list(GUARDS), help="what guards (all)")
    chosen = made.parse_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    import pytest

    os.environ |= {"MODULAR_LORA_COMFYUI": str(chosen.comfyui), "MODULAR_LORA_WORLD": str(chosen.world)}
    outcomes = {guard: Outcomes(trial.tests[guard]) for guard in chosen.guard}
    tests = " or ".join(one.test for one in outcomes.values())
    pytest.main([str(trial.file), "-q", "-p", "no:cacheprovider", "-k", tests, "--all"], plugins=[*outcomes.values()])
    failed = [name for one in outcomes.values() for name in one.failed()]
    for name in failed:
        _log.error("not held: %s", name)
    tried = all(one.tried for one in outcomes.values())
    for guard, one in outcomes.items():
        command = f"python3 -m tools.benchmarks.reliability {part} --guard {guard}"
        if trial.failures or not one.failed():
            finish(one.rows(trial, guard), FILE, command, chosen.record and tried)
    return int(bool(failed) or not tried)


def main(arguments: Sequence[str] | None = None) -> int:
    """The catalogue of attempts."""
    return run(ESCAPES, arguments, "escapes")


def mutations(arguments: Sequence[str] | None = None) -> int:
    """The mutated graphs."""
    return run(MUTATIONS, arguments, "mutations")


if __name__ == "__main__":
    sys.exit(main())
