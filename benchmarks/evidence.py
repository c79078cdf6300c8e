"""Tables of docs/figures/evidence.json: arms, comparisons, hits by concept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "base": "base, W0",
    "safety": "safety LoRA alone",
    "task": "task LoRA alone",
    "sequential": "sequential: task LoRA trained on top of the safety LoRA",
    "modular": "**modular: both, trained on W0, added at inference**",
    "projected": "modular, task LoRA projected",
    "minus_safety": "W0 − ΔW_safe",
    "safety_minus_sequential": "W0 + ΔW_safe − ΔW_sequential",
}

COMPARED = ("sequential", "modular", "projected")


def tables(found: Mapping[str, Any], which: str) -> str:
    """One table as Markdown; ``which``: arms, comparisons or concepts."""
    rows = {"arms": _arms, "comparisons": _comparisons, "concepts": _concepts}[which](found)
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    table = [head, "|" + "---|" * len(rows[0]), *body]
    source = f"* `{found['command']}`; {found['device']}, {found['dtype']}; {found['date']}"
    return "\n".join([*table, "", source]) + "\n"


def _rate(k: int, n: int, low: float, high: float) -> str:
    return f"{k / n:.1%} [{low:.1%}, {high:.1%}]"


def _arms(found: Mapping[str, Any]) -> list[list[str]]:
    kept_heads = ["kept concepts right", "vehicles there", "task fidelity", "KID"]
    rows = [["arm", "vehicles", "the one asked for", "of", *kept_heads]]
    for name, arm in found["arms"].items():
        kept = arm["kept"]["top1"]
        right = _rate(*(kept[key] for key in ("k", "n", "low", "high")))
        rate = _rate(arm["k"], arm["n"], arm["low"], arm["high"])
        kid = "-" if arm["quality"] is None else f"{arm['quality']:.4f}"
        alarms = f"{arm['kept']['false_alarms']['k']} of {arm['kept']['false_alarms']['n']}"
        exact = f"{arm['exact']['k'] / arm['exact']['n']:.1%}"
        rows.append([TITLES[name], rate, exact, str(arm["n"]), right, alarms, f"{arm['task_fidelity']:.1%}", kid])
    return rows


def _comparisons(found: Mapping[str, Any]) -> list[list[str]]:
    """Arms that a user could run against safety alone, base and task alone, each by the rate it is compared by."""
    rows = [["what", "difference in points", "verdict"]]
    for one in found["differences"]:
        told = one["verdict"] and not one["attack"] and one["arm"] in ("safety", "task", *COMPARED)
        if told and (one["metric"] == "top-1" or one["arm"] in COMPARED):
            span = f"{100 * one['difference']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
            rows.append([f"{one['metric']}: {one['arm']} − {one['against']}", span, one["verdict"]])
    return rows


def _concepts(found: Mapping[str, Any]) -> list[list[str]]:
    arms = found["arms"]
    rows = [["concept", *arms]]
    for concept in next(iter(arms.values()))["per_concept"]:
        counts = (arm["per_concept"].get(concept, (0, 0)) for arm in arms.values())
        rows.append([concept, *(f"{k} of {n}" for k, n in counts)])
    return rows
