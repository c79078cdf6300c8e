"""The speed benchmark at toy size: its rows come out, all ways around the guard agree with it; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from modular_lora_guard.tools.benchmarks.speed_rounds import Contender, Limits, Timing, measure, ratio

ROOT = Path(__file__).resolve().parents[3]
COMFYUI = os.environ.get("MODULAR_LORA_COMFYUI")
SECTIONS = {"steps": 4, "swap": 2}  # rows; every section starts a ComfyUI of its own


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What the command says of every row and section."""
    if not COMFYUI:
        pytest.skip("MODULAR_LORA_COMFYUI is not set: run the tests with `python3 run.py test`")
    figures = ROOT / "docs" / "figures" / "speed.json"
    before = figures.read_bytes() if figures.exists() else None
    command = [sys.executable, "-m", "tools.benchmarks.speed", "--toy", "--only", *SECTIONS]
    environment = {k: v for k, v in os.environ.items() if k != "MODULAR_LORA_NEWER_COMFYUI"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == (figures.read_bytes() if figures.exists() else None)  # a toy's figures are not written
    return dict(line.strip().split(": ", 1) for line in done.stdout.splitlines())


def test_every_row_has_a_positive_ratio(printed):
    rows = {name: text for name, text in printed.items() if name not in SECTIONS}
    assert len(rows) == sum(SECTIONS.values())
    assert {"step guarded/peft", "swap core/guarded warm"} <= rows.keys()
    assert all(float(text.split()[0].rstrip(",")) > 0 for text in rows.values())


def test_all_contenders_give_the_same_image(printed):
    differences = json.loads(printed["steps"])["differences"]
    assert differences.pop("effect") > 0.05
    assert differences.keys() == {"measured", "merged", "peft"}
    assert differences["measured"] == 0  # to measure changes nothing
    assert max(differences.values()) < 1e-3


def test_a_ratio_is_the_median_of_the_rounds_inside_its_interval():
    noise = 1 + 0.05 * np.random.default_rng(1).standard_normal(50)
    found = ratio(Timing(tuple(2 * noise), tuple(noise)), Timing(tuple([1.0] * 50), tuple([1.0] * 50)))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2 * float(np.median(noise)))
    assert 0 < found.half_width < 0.1
    from contextlib import nullcontext

    order = []
    contenders = {name: Contender(nullcontext, lambda name=name: order.append(name)) for name in ("a", "b")}
    times = measure(contenders, [("a", "b")], Limits(wanted=0, least=1, rounds=2))
    assert order == ["a", "b", "b", "a"]
    assert len(times["a"].cpu) == 2
