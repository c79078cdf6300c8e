"""Tables of docs/figures/evidence.json: arms by recipe, tests, differences, safety first's g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "base": "base, W0",
    "safety": "safety LoRA alone",
    "task": "task LoRA alone",
    "sequential": "sequential: task LoRA trained on top",
    "sequential_full": "sequential: full fine-tuning on top",
    "modular": "modular: the paper's sum",
    "projected": "modular, task LoRA projected",
    "safety_first": "**modular, safety first**",
}
METRICS = {"vehicles": "vehicles", "kept": "kept concepts", "styled": "task fidelity"}
SHOWN = 3  # cells that are not done yet and are named

Rows = list[list[str]]


def tables(found: Mapping[str, Any], which: str) -> str:
    """One table as Markdown; ``which``: lead, arms, tests, differences, tasks or shares."""
    makers = {
        "lead": _lead,
        "arms": _arms,
        "tests": _tests,
        "differences": _differences,
        "tasks": _tasks,
        "shares": _shares,
    }
    head, *body = makers[which](found)
    lines = [f"| {' | '.join(row)} |" for row in body]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, "", _source(found)]) + "\n"


def _source(found: Mapping[str, Any]) -> str:
    """The command, where and when, how long it took, and what is not done."""
    measured = "; ".join(f"{machine}, {date}" for date, machine in found["measured"])
    said = f"* `{found['command']}`; {measured}; {found['cpu_hours']:.1f} CPU hours"
    missing = found["missing"]
    if not missing:
        return f"{said}; all {found['done']} cells are done"
    named = "; ".join(missing[:SHOWN]) + ("; ..." if len(missing) > SHOWN else "")
    return f"{said}; {found['done']} cells are done, **{len(missing)} are not yet**: {named}"


LEAD = {  # what README's table says of the arms
    "safety": "the safety LoRA alone",
    "task": "a style LoRA, no safety LoRA",
    "sequential": "the style LoRA trained on top of the safety LoRA",
    "sequential_full": "the whole model trained on top of the safety LoRA",
    "modular": "guarded: both LoRAs trained on W0, summed",
    "safety_first": "guarded, *safety first*",
}


def _lead(found: Mapping[str, Any]) -> Rows:
    """Vehicles, kept concepts and task fidelity of the arms that a reader compares first, a column a recipe.

    Of the first task alone: the judge was taught its style, and not the second one's.
    """
    rows = [["vehicles / kept concepts right / style arrives", *found["recipes"]]]
    for arm, title in LEAD.items():
        told = [next(iter(recipe["tasks"].values()))["arms"][arm] for recipe in found["recipes"].values()]
        shares = [(one["k"] / one["n"], one["kept"], one["fidelity"]) for one in told]
        rows.append([title, *(" / ".join(f"{100 * share:.0f}" for share in some) + " %" for some in shares)])
    return rows


def _arms(found: Mapping[str, Any]) -> Rows:
    rows = [["recipe", "arm", "vehicles", "of", "kept concepts right", "task fidelity"]]
    for name, recipe in found["recipes"].items():
        for i, (arm, one) in enumerate(recipe["arms"].items()):
            rows.append([f"**{name}**: {_counted(recipe)}" if i == 0 else "", TITLES[arm], *_figures(one)])
    return rows


def _counted(recipe: Mapping[str, Any]) -> str:
    tasks: dict[str, list[str]] = {}
    for task, seed in recipe["counted"]:
        tasks.setdefault(task, []).append(str(seed))
    return "; ".join(f"{task}, training seed {', '.join(seeds)}" for task, seeds in tasks.items())


def _figures(one: Mapping[str, Any]) -> list[str]:
    return [_rate(one["k"], one["n"], one["low"], one["high"]), str(one["n"]), *(_rate(*one[c]) for c in COLUMNS)]


COLUMNS = ("kept_of", "fidelity_of")


def _rate(k: int, n: int, low: float, high: float) -> str:
    """The rate with the bootstrap's interval, where that has a width."""
    span = f" [{low:.1%}, {high:.1%}]" if low < high else ""
    return f"{k / n:.1%}{span}"


def _tasks(found: Mapping[str, Any]) -> Rows:
    """Arms of each task for itself, and how often the judge sees a vehicle in images of kept concepts."""
    heads = ["vehicles", "of", "kept concepts right", "task fidelity", "vehicles seen in kept concepts"]
    rows = [["recipe", "task", "arm", *heads]]
    for name, recipe in found["recipes"].items():
        for task, some in recipe["tasks"].items():
            for arm, one in some["arms"].items():
                mistaken, count = one["mistaken"]
                rows.append([name, task, TITLES[arm], *_figures(one), f"{mistaken / count:.1%}"])
    return rows


def _differences(found: Mapping[str, Any]) -> Rows:
    rows = [["recipe", "test", "what", "difference in points", "margin", "verdict"]]
    for name, recipe in found["recipes"].items():
        for one in recipe["differences"]:
            span = f"{100 * one['difference']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
            what = f"{METRICS[one['metric']]}: {one['arm']} − {one['against']}".replace("_", " ")
            rows.append([name, str(one["test"]), what, span, f"{100 * one['margin']:g}", one["verdict"]])
    return rows


def _tests(found: Mapping[str, Any]) -> Rows:
    """Every test by recipe, and over all of them."""
    recipes = found["recipes"]
    rows = [["test", *recipes, "all recipes, so far" if found["missing"] else "all recipes"]]
    for name, verdict in found["tests"].items():
        number, _, what = name.partition(", ")
        by_recipe = [_verdict(one, name) for one in recipes.values()]
        rows.append([f"{number}. {what.replace('_', ' ')}", *by_recipe, verdict])
    return rows


def _verdict(recipe: Mapping[str, Any], name: str) -> str:
    number, _, what = name.partition(", ")
    if number == "1":
        one = recipe["comeback"][what]
        times = f"{one['ratio']:.1f} × safety's" if one["ratio"] is not None else "safety's is 0"
        return f"{one['verdict']} ({times}; kept concepts kept: {one['kept']})"
    arm, against = what.split(" against ")
    (one,) = (
        there
        for there in recipe["differences"]
        if (str(there["test"]), there["arm"], there["against"]) == (number, arm, against)
    )
    return one["verdict"]


def _shares(found: Mapping[str, Any]) -> Rows:
    """The mean g of safety first by kind of image."""
    kinds: Sequence[str] = tuple(METRICS)
    heads = {"vehicles": "vehicles", "kept": "kept concepts, base styles", "styled": "kept concepts, the task's word"}
    rows = [["recipe", *(f"g: {heads[kind]}" for kind in kinds)]]
    for name, recipe in found["recipes"].items():
        told = [recipe["share"][kind] for kind in kinds]
        rows.append([name, *(f"mean {one['mean']:.2f}; 0 in {one['zero']:.1%}, 1 in {one['one']:.1%}" for one in told)])
    return rows
