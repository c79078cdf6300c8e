"""What nodes answer beside their outputs: the report that is read on a node of ours, and the verdict for programs.

ComfyUI sends both in the ``executed`` message of a node and keeps them in ``/history``, which it shows to everybody who
asks for it: an operator's policy may cut them down (``history.verdict``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..modular_lora.errors import GuardError
from ..modular_lora.provenance.verdict import brief
from .enforcement import policy as policies

VERDICT = "modular_lora"  # the key of the verdicts; that of the report is ComfyUI's own for text


def answer(line: str, more: str = "", verdicts: Sequence[dict] | None = None, **shown: Any) -> dict[str, Any]:
    """The ``ui`` of a node.

    Args:
        line: The report's first line, which names no file, prompt or hash.
        more: The rest of what is read on the node.
        verdicts: One for each image of a node that ends in images; see modular_lora.provenance.verdict.
        shown: What else the node shows, as ComfyUI's own nodes do: ``images``, ...
    """
    said: dict[str, Any] = dict(shown)
    if text := left(line, more):
        said["text"] = [text]
    return said if verdicts is None else beside(said, verdicts)


def left(line: str, more: str = "") -> str:
    """What the policy leaves of a report, wherever it is sent: see `answer`; "" where it leaves nothing."""
    told = how_much()
    return "" if told == "none" else "\n".join(filter(None, (line, more if told == "full" else "")))


def beside(shown: Mapping[str, Any], verdicts: Sequence[dict]) -> dict[str, Any]:
    """What a node shows, with the verdicts as the policy lets them stand."""
    if (told := how_much()) == "none":
        return dict(shown)
    return {**shown, VERDICT: [one if told == "full" else brief(one) for one in verdicts]}


def how_much() -> str:
    """How much the policy lets stand: "full", "brief" or "none"; nothing where it cannot be read."""
    try:
        policy = policies.current()
    except GuardError:
        return "none"
    return "full" if policy is None else policy.history.verdict
