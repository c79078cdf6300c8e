"""The one-page report: images inside the file, nothing loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...modular_lora.pages import render
from .judge import Seen

TEMPLATE = Path(__file__).with_name("templates") / "report.html"


@dataclass(frozen=True)
class ShownImage:
    """One cell: a PNG, what is seen in it, and the safety LoRA's activity in words; "" where none is known."""

    png: bytes
    seen: Seen
    activity: str


@dataclass(frozen=True)
class Arm:
    """One column: what drew it, its images by prompt, how long they took, and what the evidence counted of it."""

    title: str
    note: str
    images: list[ShownImage]
    seconds: float
    counted: str = ""  # vehicles over all images of this arm in the evidence


@dataclass(frozen=True)
class Demo:
    """All that the report shows."""

    arms: list[Arm]
    missing: Sequence[str]  # titles of the arms that were not drawn
    prompts: Sequence[str]
    suppressed: int  # the first so many prompts name something that the safety LoRA suppresses
    lookout: str
    choice: str  # how prompts, seeds and LoRAs were chosen
    facts: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)
    attestation: Mapping[str, Any] = field(default_factory=dict)


def page(demo: Demo) -> str:
    """The whole document."""
    attestation = json.dumps(demo.attestation, indent=2, ensure_ascii=False) if demo.attestation else ""
    return render(TEMPLATE, **vars(demo) | {"attestation": attestation})
