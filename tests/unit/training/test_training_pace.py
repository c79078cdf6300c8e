"""What a training says of its pace and of the course of its loss."""

from __future__ import annotations

import pytest
from modular_lora_guard.training.pace import Pace, curve, spoken


def test_a_step_and_the_rest_are_counted_from_the_steps_seen() -> None:
    times = iter([100.0, 104.0, 130.0])
    pace = Pace(lambda: next(times))
    assert pace(11, 20) == ""  # gone on from step 10
    assert pace(12, 20) == "4.00 s a step, 32 s left"
    assert pace(14, 20) == "10 s a step, 1 min 00 s left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.123, "0.12 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7845, "2 h 10 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert spoken(seconds) == said


def test_the_curve_is_high_where_the_loss_is() -> None:
    assert curve([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert curve([1.0] * 5) == "▁" * 5
    assert curve(list(range(100)), 4) == "▁▃▆█"
    assert curve([2.0]) == "▁"
