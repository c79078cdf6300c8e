"""Tables of docs/figures/evidence_unpreserved.json and evidence_preserved.json: arms, comparisons, hits by concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modular_lora_guard.gate.statistics import Rate, newcombe, wilson

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


def _rate(found: Mapping[str, Any]) -> str:
    """The rate, the bootstrap's interval where it has a width, and Wilson's."""
    rate = _wilson(found)
    spans = [f"W [{rate.low:.1%}, {rate.high:.1%}]"]
    if found["low"] < found["high"] and found.get("interval") != "Wilson":
        spans.insert(0, f"[{found['low']:.1%}, {found['high']:.1%}]")
    return " ".join([f"{rate.rate:.1%}", *spans])


def _wilson(found: Mapping[str, Any]) -> Rate:
    return Rate(found["k"], found["n"], *wilson(found["k"], found["n"]))


def _arms(found: Mapping[str, Any]) -> list[list[str]]:
    kept_heads = ["kept concepts right", "vehicles there", "task fidelity", "KID"]
    rows = [["arm", "vehicles", "the one asked for", "of", *kept_heads]]
    for name, arm in found["arms"].items():
        right, rate = _rate(arm["kept"]["top1"]), _rate(arm)
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
            bootstrap, wilson = _spans(found["arms"], one)
            spans = [prefix + _points(span) for prefix, span in (("", bootstrap), ("N ", wilson)) if span]
            said = " ".join([f"{100 * one['difference']:+.1f}", *spans])
            rows.append([f"{one['metric']}: {one['arm']} − {one['against']}", said, one["verdict"]])
    return rows


def _spans(arms: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """The bootstrap's interval where it has a width, and Newcombe's, counted here where the figures are older."""
    if "newcombe" in one:
        return one["bootstrap"], one["newcombe"]
    bootstrap = (one["low"], one["high"]) if one["low"] < one["high"] else None
    counted = {"concept rate": lambda arm: arm, "top-1": lambda arm: arm["kept"]["top1"]}.get(one["metric"])
    pair = [_wilson(counted(arms[name])) for name in (one["arm"], one["against"])] if counted else []
    return bootstrap, newcombe(*pair) if pair else None


def _points(span: Sequence[float]) -> str:
    return f"[{100 * span[0]:+.1f}, {100 * span[1]:+.1f}]"


def _concepts(found: Mapping[str, Any]) -> list[list[str]]:
    arms = found["arms"]
    rows = [["concept", *arms]]
    for concept in next(iter(arms.values()))["per_concept"]:
        counts = (arm["per_concept"].get(concept, (0, 0)) for arm in arms.values())
        rows.append([concept, *(f"{k} of {n}" for k, n in counts)])
    return rows
