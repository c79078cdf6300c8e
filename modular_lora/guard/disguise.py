"""A safety LoRA that comes once more as a task LoRA: in another file, by another loader, in part, at other strength.

It is known by the direction of its change: the cosine of both changes, <ΔW_t, ΔW_s> / ‖ΔW_t‖‖ΔW_s‖, over the weights
that both change. Neither strength nor scale nor the file's form play a part, and a part of the safety LoRA has the
whole one's direction where it has anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GuardError
from .apply import Applied
from .interference import Interference

LIKE = 0.5  # of task LoRAs 0.06 was the highest that was measured: tests/unit/guard/test_disguise.py


def check_disguise(safety: Applied, others: Sequence[Applied], result: Interference) -> None:
    """Hold every task LoRA that another loader brought against one safety LoRA.

    Load Task LoRA names its file and strength on the node, and net strength judges it.

    Args:
        safety: The safety LoRA.
        others: The LoRAs that ``result`` compares it with, in that order.
        result: See `interference.interference`.

    Raises:
        GuardError: For a task LoRA whose change is the safety LoRA's own, with either sign.
    """
    for other, cosine in zip(others, result.likeness, strict=True):
        if other.lora.lifted and abs(cosine) >= LIKE:
            raise GuardError(
                f"{other.lora.name} is the safety LoRA {safety.lora.name} in another file or of another strength: the "
                f"cosine of what both change is {cosine:.2f}, and task LoRAs of other origin stay below {LIKE:g}; so "
                "one can cancel the other: leave it out, and set the strength at the safety LoRA itself.",
                code="lora.both-roles",
            )
