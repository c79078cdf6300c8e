"""g of an image: falls with the activity, a step where a calibration overlaps, the least of several safety LoRAs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.acted import Acted
from modular_lora_guard.modular_lora.guard import safety_first
from support.giving_way import calibration, expected_share

NUMBERS = st.floats(0, 2)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_g_falls_with_the_activity_from_1_to_0_also_where_the_two_distributions_overlap(kept, found, one, other):
    told = calibration("b" * 64, kept, found)
    low, high = told.bounds
    assert told.share(max(one, other)) <= told.share(min(one, other))
    assert told.share(high) == 0.0
    assert told.share(low) == (1.0 if low < high else 0.0)
    assert told.share(math.nextafter(low, -1)) == 1.0
    if kept >= found:
        assert low == high == (kept + found) / 2
        assert told.share(one) in (0.0, 1.0)
    else:
        assert told.share(one) == pytest.approx(min(1.0, max(0.0, (found - one) / (found - kept))), abs=1e-9)
    assert told.share(math.nan) == 0.0


def acted(*activity: float | None) -> Acted:
    return Acted((None,) * len(activity), 0.0, activity)


def test_the_strongest_conditioning_and_the_strictest_safety_lora_decide_and_what_is_not_known_gives_way():
    known = {"a": calibration("b" * 64, 0.1, 0.2), "b": calibration("b" * 64, 0.5, 0.5)}
    first = {("safety", "a"): acted(0.05, 0.05, 0.13, None), ("safety", "b"): acted(0.1, 0.6, 0.1, 0.1)}
    second = {("safety", "a"): acted(0.12, None, 0.11, None), ("safety", "b"): acted(0.1, 0.1, 0.1, 0.1)}
    found = safety_first.shares(known, [first, second], 4)
    assert found == (expected_share(0.12, 0.1, 0.2), 0.0, expected_share(0.13, 0.1, 0.2), 0.0)
    assert found[0] == 12 / 16
    assert safety_first.shares(known, [], 2) == (0.0, 0.0)
