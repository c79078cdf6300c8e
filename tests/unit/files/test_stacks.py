"""LORA_STACK: every shape in which packs send rows is read, everything else is one line with row and value."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files.stacks import Row, parse_stack
from support.errors import refuses


def values(stack) -> list[tuple]:
    return [(row.name, row.model, row.clip, row.blocks) for row in parse_stack(stack)]


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (None, []),
        ([], []),
        ((), []),
        ("", []),
        ([("None", 1.0, 1.0), ("", 1, 1), (None, 1, 1), None, "None", ["None"], {"name": None}], []),
        ([("a", 1.0, 0.5)], [("a", 1.0, 0.5, "")]),
        ([["a", 1, 2]], [("a", 1.0, 2.0, "")]),
        ([("a", 0.5)], [("a", 0.5, 0.5, "")]),
        ([("a", 0.5, None)], [("a", 0.5, 0.5, "")]),
        ([("a", 1.0, 0.5, "1,0.5")], [("a", 1.0, 0.5, "1,0.5")]),
        ([("a", 1.0, 0.5, None)], [("a", 1.0, 0.5, "")]),
        ([("a", "0.8", "-1e-1")], [("a", 0.8, -0.1, "")]),
        ([(Path("a"), 1.0)], [("a", 1.0, 1.0, "")]),
        (("a", 1.0, 0.5), [("a", 1.0, 0.5, "")]),
        ([{"name": "a", "strength": 1.0}], [("a", 1.0, 1.0, "")]),
        ([{"lora": "a", "on": True, "strength": 1, "strengthTwo": None}], [("a", 1.0, 1.0, "")]),
        ([{"lora": "a", "on": False, "strength": 1}], []),
        ([{"lora_name": "a", "model_strength": 1, "clip_strength": "2", "words": ["x"]}], [("a", 1.0, 2.0, "")]),
    ],
)
def test_what_packs_send_is_read(stack, expected):
    assert values(stack) == expected


@pytest.mark.parametrize(
    ("stack", "code", "named"),
    [
        ("<lora:a:1>", "stack.no-list", ("LORA_STACK", "str")),
        ({"loras": []}, "stack.no-list", ("LORA_STACK", "dict")),
        (5, "stack.no-list", ("LORA_STACK", "int")),
        ([("a", 1.0), ("b",)], "stack.row", ("row 2", "('b',)")),
        ([("a", 1.0, 1.0, "", 5)], "stack.row", ("row 1", "of 5")),
        ([()], "stack.row", ("row 1", "of 0")),
        ([5], "stack.row", ("row 1: 5", "int")),
        (["a"], "stack.row", ("row 1: ['a']", "list of 1")),
        ([(5, 1.0)], "stack.name", ("row 1", "5", "int")),
        ([("a", None)], "stack.strength", ("row 1: strength None",)),
        ([("a", "much")], "stack.strength", ("row 1: strength 'much'",)),
        ([("a", True)], "stack.strength", ("row 1: strength True",)),
        ([("a", math.nan)], "stack.strength", ("row 1: strength nan",)),
        ([("a", 10**400)], "stack.strength", ("row 1: strength 1000",)),
        ([("a", 1.0, "inf")], "stack.strength", ("row 1: clip strength 'inf'",)),
        ([("a", 1.0, 1.0, [1, 2])], "stack.blocks", ("row 1", "[1, 2]")),
        ([{"name": "a"}], "stack.strength", ("row 1: strength None",)),
        ([{"name": "a", "strength": 1.0, "te": 0.5}], "stack.unknown-key", ("row 1", "'te' 0.5")),
    ],
)
def test_what_is_no_row_is_named(stack, code, named):
    with refuses(code, *named) as error:
        parse_stack(stack)
    assert str(error.value).isprintable()


THINGS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
ANY = st.recursive(THINGS, lambda x: st.lists(x, max_size=5) | st.tuples(x, x) | st.dictionaries(THINGS, x, max_size=3))


@given(ANY)
def test_anything_is_rows_or_one_line(stack):
    rows, said = (), ""
    try:
        rows = parse_stack(stack)
    except GuardError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 1000
    assert all(isinstance(row, Row) and math.isfinite(row.model) and math.isfinite(row.clip) for row in rows)


@given(st.lists(st.tuples(st.text("abc/", min_size=1, max_size=5), st.floats(-10, 10), st.floats(-10, 10)), max_size=4))
def test_rows_come_through_as_they_are(rows):
    assert values(rows) == [(name, model, clip, "") for name, model, clip in rows]
