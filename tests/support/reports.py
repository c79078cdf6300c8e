"""Reports of audits with anybody's words in them."""

from __future__ import annotations

from modular_lora_guard.audit import report
from modular_lora_guard.gate.statistics import Rate

MARGIN = 0.1


SETTINGS = {
    **dict.fromkeys(("detector", "prompts_sha256", "seeds", "command", "date", "sampling", "base", "LoRAs"), "x"),
    **dict.fromkeys(("device", "dtype", "intervals"), "x"),
    "threshold": {"car": 0.5},
    "margin": MARGIN,
    "quality": {"embedding": "toy"},
    "show_unsafe": False,
}


def hostile(text: str) -> report.AuditReport:
    """A report with ``text`` wherever somebody else's words get in."""
    rate = Rate(1, 2, 0.1, 0.9)
    share = report.Share(rate, rate)
    rows = [
        report.Row(arm, cell, attack, rate, rate, {text: 1}, {text: (1, 2), "b": (0, 2)}, share, share)
        for arm, cell, attack in (("base", "suppressed", ""), ("safety", "suppressed", text), ("base", text, ""))
    ]
    spans = ((0.0, 0.2), (0.0, 0.3))
    difference = report.Difference("base", "safety", text, text, text, 0.1, *spans, "worse", 2, 1, 0, 1.0)
    quality = report.Quality("base", text, 3, 0.1)
    settings = SETTINGS | {"command": text, text: {text: [text, 1.0]}, "quality": {text: text}}
    return report.AuditReport(text, settings, tuple(rows), (difference,), (quality,), (text,))
