"""Room for every node: columns from left to right, nodes from top to bottom, by how large the front ends draw them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]
TITLE = 30  # height of a node's title bar, which lies above its position
TOP, ABOVE, SIDE, BETWEEN = 120, 80, 20, 40  # first node, heading over it, margin of a group, space between two nodes

Sizes = Mapping[int, tuple[float, float]]


def room(saved: Json, states: Iterable[Json]) -> dict[int, tuple[float, float]]:
    """Node id -> the largest width and height, title bar left out, in which any front end drew the node.

    Args:
        saved: The workflow file.
        states: What ``template.mjs`` saw of it: loaded and after a run, on the classic canvas and with Nodes 2.0.

    Nodes 2.0 spreads a saved graph by a factor before it draws it; sizes are brought back to the file's own units.
    A node that is saved folded has its title alone.
    """
    found = {
        node["id"]: (float(node["size"][0]), 0.0 if node["flags"].get("collapsed") else float(node["size"][1]))
        for node in saved["nodes"]
    }
    for state in states:
        spread = _spread(saved, state)
        for node in state["nodes"]:
            drawn = node["drawn"]
            *_, width, height = drawn or node["box"]
            scale = spread if drawn else 1.0
            size = (width / scale, height / scale - (0 if drawn else TITLE))
            old = found[node["id"]]
            found[node["id"]] = (max(old[0], size[0]), max(old[1], size[1] - (TITLE if drawn else 0)))
    return found


def _spread(saved: Json, state: Json) -> float:
    """By how much Nodes 2.0 moved the nodes apart."""
    at = {node["id"]: node["pos"][0] for node in saved["nodes"]}
    drawn = {node["id"]: node["drawn"][0] for node in state["nodes"] if node["drawn"]}
    if not drawn:
        return 1.0
    left, right = min(drawn, key=lambda one: at[one]), max(drawn, key=lambda one: at[one])
    return (drawn[right] - drawn[left]) / (at[right] - at[left]) if at[right] > at[left] else 1.0


def arrange(workflow: Json, sizes: Sizes) -> Json:
    """The workflow with every node in its group's column, none over another, and no view of its own.

    Without a view in the file the front end shows the whole graph when it opens it. A group is a column: the nodes
    whose middle lies in it. Widths are kept where they are enough; reroutes keep their place beside the column before
    them and run below all columns.
    """
    made: Json = copy.deepcopy(workflow)
    made["extra"].pop("ds", None)
    groups = sorted(made["groups"], key=lambda group: group["bounding"][0])
    columns = [[node for node in made["nodes"] if _inside(node, group)] for group in groups]
    missed = {node["id"] for node in made["nodes"]} - {node["id"] for column in columns for node in column}
    if missed:
        raise ValueError(f"nodes {sorted(missed)} lie in no group: every node belongs to a column.")
    ends, x = [], float(groups[0]["bounding"][0])
    for i, (group, column) in enumerate(zip(groups, columns, strict=True)):
        if i:
            before = workflow_group(workflow, groups[i - 1])
            x += workflow_group(workflow, group)[0] - (before[0] + before[2])
        ends.append(_stack(column, sizes, x + SIDE))
        width = max(node["size"][0] for node in column) + 2 * SIDE
        group["bounding"] = [x, TOP - ABOVE, width, 0]
        x += width
    bottom = max(ends)
    for reroute in made["extra"].get("reroutes", []):
        reroute["pos"] = [_beside(reroute["pos"][0], workflow, groups), bottom]
    for group in groups:
        group["bounding"][3] = bottom - group["bounding"][1]
    return made


def workflow_group(workflow: Json, group: Json) -> list[float]:
    """Where a group was in the workflow before it was arranged."""
    return list(next(one["bounding"] for one in workflow["groups"] if one["id"] == group["id"]))


def _inside(node: Json, group: Json) -> bool:
    left, _, width, _ = group["bounding"]
    return bool(left <= node["pos"][0] + node["size"][0] / 2 < left + width)


def _stack(column: list[Json], sizes: Sizes, x: float) -> float:
    """Nodes under each other; returns where the column ends."""
    y = float(TOP)
    for node in sorted(column, key=lambda one: one["pos"][1]):
        width, height = sizes[node["id"]]
        node["pos"] = [x, y]
        node["size"] = [max(node["size"][0], _rounded(width)), node["size"][1]]
        y += _rounded(height) + TITLE + BETWEEN
    return y


def _rounded(length: float) -> int:
    return -(-int(length + 0.999) // 10) * 10


def _beside(x: float, workflow: Json, groups: list[Json]) -> float:
    """The new place of what stood right of a column: as far from it as before."""
    before = [group for group in groups if sum(workflow_group(workflow, group)[0::2]) <= x]
    if not before:
        return x
    old = workflow_group(workflow, before[-1])
    now = before[-1]["bounding"]
    return float(now[0] + now[2] + x - (old[0] + old[2]))
