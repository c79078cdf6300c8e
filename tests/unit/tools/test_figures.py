"""The tables of formats, families, trainings and speed: what they say can be traced to a test or a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "docs" / "figures"
SPEED = (
    "step guarded/merged cpu sd15 r4+r16",
    "step guarded/bypass",
    "step guarded/peft",
    "swap core/guarded cold",
    "swap core/guarded warm",
    "import seconds",
)


def rows(file: str) -> list[dict]:
    return json.loads((FIGURES / file).read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("formats.json", 20),
        ("families.json", 20),
        ("training_families.json", 20),
        ("training_presets.json", 12),
        ("training_width.json", 2),
    ],
)
def test_every_row_names_a_test_that_is_there(file, least):
    found = rows(file)
    assert len(found) >= least
    assert len({row["name"] for row in found}) == len(found)
    for row in found:
        path, _, name = row["test"].partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row
        assert row["status"] in ("works", "refused", "untested"), row
        assert row["command"], row
        assert row["date"], row
        assert row["machine"], row


@pytest.mark.parametrize("file", ["formats.json", "families.json"])
def test_every_row_has_an_error_where_it_works(file):
    for row in rows(file):
        assert (row["max_error"] is not None) == (row["status"] == "works"), row


@pytest.mark.parametrize("file", ["formats.json", "families.json"])
def test_what_works_is_right_within_rounding(file):
    assert max(row["max_error"] for row in rows(file) if row["status"] == "works") < 0.02


def test_the_table_of_speed_has_its_rows_and_their_sources():
    found = {row["name"]: row for row in rows("speed.json")}
    assert set(SPEED) <= set(found)
    assert all(row["ratio"] > 0 and row["command"] and row["date"] and row["machine"] for row in found.values())
