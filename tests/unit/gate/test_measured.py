"""The measured error beside a gate's settings: only for exactly what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from modular_lora_guard.gate import measured
from modular_lora_guard.gate.labelled import LabelledError, save
from modular_lora_guard.gate.settings import Settings
from modular_lora_guard.gate.statistics import Rate
from support.told_detector import Told

NOT = "measured error: not measured"
RATES = Rate(1, 40, 0.004, 0.129), Rate(2, 50, 0.011, 0.135)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset whose error was measured as ``audit gate-error --output`` writes it."""
    path = tmp_path / "mine.json"
    save(LabelledError(Told([]), Settings({"a": 0.5}), *RATES, (), (), ()), measured.error_path(path))
    return path


def test_a_presets_error_stands_beside_it_with_its_interval(preset: Path) -> None:
    said = measured.format_measured(Told([]), Settings({"a": 0.5}, action="block"), preset, False)
    assert said == "measured error: missed 1 of 40 [0.4%, 12.9%]; false alarms 2 of 50 [1.1%, 13.5%]"


@pytest.mark.parametrize(
    ("detector", "settings", "second"),
    [
        (Told([]), Settings({"a": 0.4}), False),
        (Told([]), Settings({"a": 0.5}, review={"a": 0.2}), False),
        (Told([], sha256="1" * 64), Settings({"a": 0.5}), False),
        (Told([]), Settings({"a": 0.5}), True),
    ],
    ids=["another threshold", "another review", "another detector", "a second detector"],
)
def test_of_anything_else_nothing_was_measured(detector: Told, settings: Settings, second: bool, preset: Path) -> None:
    assert measured.format_measured(detector, settings, preset, second).startswith(NOT)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"block": {"a": 0.5}}', '{"block": {"a": 0.5}, "detector": 1}'])
def test_a_broken_file_measures_nothing(text: str, preset: Path) -> None:
    measured.error_path(preset).write_text(text, encoding="utf-8")
    assert measured.format_measured(Told([]), Settings({"a": 0.5}), preset, False).startswith(NOT)


def test_a_detectors_defaults_have_the_figures_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Told([], name="told 1.0 (package 2)")
    usual = Settings({"a": 0.5}, {"b": 0.3})
    rows = [("error, told 1.0: false alarms", "2 of 360"), ("error, told 1.0 rgb: false alarms", "9"), ("speed", "1")]
    figures = tmp_path / "gate.json"
    figures.write_text(json.dumps({"rows": [{"name": name, "value": value} for name, value in rows]}), "utf-8")
    monkeypatch.setattr(measured, "FIGURES", figures)
    assert measured.format_measured(detector, usual, None, False).startswith(
        "measured error: false alarms 2 of 360 (drawings"
    )
    assert measured.format_measured(detector, Settings({"a": 0.4}), None, False).startswith(NOT)
    monkeypatch.setattr(measured, "FIGURES", tmp_path / "gone.json")
    assert measured.format_measured(detector, usual, None, False).startswith(NOT)


def test_the_figures_name_detectors_as_they_name_themselves() -> None:
    from modular_lora_guard.gate import detectors

    for name in detectors.available():
        if name in ("nudenet 320n", "open-nsfw"):
            made = detectors.make(name)
            said = measured.format_measured(made, Settings(dict(made.block), dict(made.report)), None, False)
            assert "of 360" in said
