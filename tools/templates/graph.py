"""API graphs as the front end saves them: nodes with slots and widgets, links, columns, and subgraph blueprints.

The layout of a workflow file is ComfyUI's version 0.4; a blueprint is a workflow of one node whose type is the id of a
subgraph under ``definitions``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
VIRTUAL = {"MarkdownNote", "Note"}  # drawn by the front end alone
SEEDS = {"seed", "noise_seed"}  # of samplers: "control after generate" follows, a widget with no input of its own
OPTIONAL = 7  # litegraph's shape of an optional slot
WIDTH, GAP, TOP, LEFT, TITLE = 340, 70, 120, 40, 30
INPUT_NODE, OUTPUT_NODE = -10, -20  # ids of a subgraph's own two ends


class Column(NamedTuple):
    """One step of a workflow: its heading and its nodes, from top to bottom."""

    title: str
    nodes: tuple[str, ...]
    width: int = WIDTH


class Blueprint(NamedTuple):
    """What a subgraph shows of itself."""

    description: str
    columns: tuple[Column, ...]
    inputs: tuple[tuple[str, str, str], ...]  # name outside, node, input: a socket or a widget
    outputs: tuple[tuple[str, str, int], ...]  # name outside, node, slot


def inputs_of(schema: Json) -> Iterable[tuple[str, Any, Json, bool]]:
    """Name, type, options and whether it may stay open, of every input of a node."""
    for kind in ("required", "optional"):
        for name, (type_, *rest) in schema["input"].get(kind, {}).items():
            yield name, "COMBO" if isinstance(type_, list) else type_, rest[0] if rest else {}, kind == "optional"


def node(number: int, key: str, given: Json, schema: Json, place: tuple[float, float, float]) -> Json:
    """One node with its slots and values; its links are put in by `connect`.

    Args:
        number: Its id in the file.
        key: Its name in the API graph.
        given: Its entry there: ``class_type``, ``inputs`` and, if wanted, ``_meta`` with a title.
        schema: What ``/object_info`` says of its type.
        place: x, y and width.
    """
    sockets, widgets, values = [], [], []
    for name, type_, options, optional in inputs_of(schema):
        slot = {"localized_name": name, "name": name, "type": type_, "link": None}
        slot |= {"shape": OPTIONAL} if optional else {}
        if type_ in WIDGETS and not options.get("forceInput"):
            widgets.append(slot | {"widget": {"name": name}})
            values.append(given["inputs"].get(name, _default(type_, options, schema, name)))
            values += ["fixed"] if _is_controlled(given["class_type"], name) else []
        else:
            sockets.append(slot)
    names = zip(schema["output"], schema["output_name"], strict=True)
    x, y, width = place
    made = {
        "id": number,
        "type": given["class_type"],
        "pos": [x, y],
        "size": [width, 26 + 20 * max(len(sockets), len(schema["output"])) + 24 * len(values)],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": sockets + widgets,
        "outputs": [{"localized_name": n, "name": n, "type": t, "links": []} for t, n in names],
        "properties": {"Node name for S&R": given["class_type"]},
        "widgets_values": values,
    }
    title = given.get("_meta", {}).get("title")
    return {**made, "title": title} if title else made


def refreshed(saved: Json, schemas: Json) -> Json:
    """A workflow whose nodes of known types have the inputs of their types: new ones, and none that is no more.

    Values stay with the names of their widgets, and links with those of their slots; a new widget has its default.
    """
    made = {one["id"]: _refreshed(one, schemas) for one in saved["nodes"]}
    before = {one["id"]: one for one in saved["nodes"]}
    links = []
    for number, source, out, target, slot, kind in saved["links"]:
        name = before[target]["inputs"][slot]["name"]
        place = next((i for i, one in enumerate(made[target]["inputs"]) if one["name"] == name), None)
        if place is None:
            raise ValueError(f"{before[target]['type']} has no input {name} any more, and link {number} ends there")
        links.append([number, source, out, target, place, kind])
    return saved | {"nodes": list(made.values()), "links": links}


def _refreshed(saved: Json, schemas: Json) -> Json:
    if saved["type"] not in schemas:
        return saved
    values, given = list(saved.get("widgets_values", [])), {}
    for slot in saved["inputs"]:
        if "widget" in slot and values:
            given[slot["name"]] = values.pop(0)
            del values[: _is_controlled(saved["type"], slot["name"])]
    entry = {"class_type": saved["type"], "inputs": given}
    fresh = node(saved["id"], "", entry, schemas[saved["type"]], (0, 0, 0))
    links = {slot["name"]: slot["link"] for slot in saved["inputs"]}
    inputs = [slot | {"link": links.get(slot["name"])} for slot in fresh["inputs"]]
    outputs = [*saved["outputs"], *fresh["outputs"][len(saved["outputs"]) :]]
    return saved | {"inputs": inputs, "outputs": outputs, "widgets_values": fresh["widgets_values"]}


def _default(type_: str, options: Json, schema: Json, name: str) -> Any:
    if "default" in options:
        return options["default"]
    choices = options.get("options") or next(
        (v[name][0] for v in schema["input"].values() if name in v and isinstance(v[name][0], list)), []
    )
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(type_, "")


def connect(graph: Json, nodes: Mapping[str, Json]) -> list[list[Any]]:
    """Every link of an API graph, entered at both ends: id, source, slot, target, slot, type."""
    links: list[list[Any]] = []
    for key, entry in graph.items():
        for name, value in entry["inputs"].items():
            if not (isinstance(value, list) and value and value[0] in nodes):
                continue
            source, out = nodes[value[0]], value[1]
            slot = next(i for i, one in enumerate(nodes[key]["inputs"]) if one["name"] == name)
            number = len(links) + 1
            nodes[key]["inputs"][slot]["link"] = number
            source["outputs"][out]["links"].append(number)
            links.append([number, source["id"], out, nodes[key]["id"], slot, source["outputs"][out]["type"]])
    return links


def placed(graph: Json, columns: Iterable[Column], schemas: Json) -> tuple[dict[str, Json], list[Json]]:
    """The nodes in their columns, with the columns' groups; `layout.arrange` gives them room."""
    nodes, groups, x = {}, [], float(LEFT)
    for column in columns:
        y = float(TOP)
        for key in column.nodes:
            schema = schemas[graph[key]["class_type"]]
            nodes[key] = node(len(nodes) + 1, key, graph[key], schema, (x, y, column.width))
            y += nodes[key]["size"][1] + GAP
        box = [x - 20, TOP - 80, column.width + 40, y - TOP + 80]
        look = {"color": "#3f5159", "font_size": 22, "flags": {}}
        groups.append({"id": len(groups) + 1, "title": column.title, "bounding": box, **look})
        x += column.width + 60
    return nodes, groups


def workflow(graph: Json, columns: Iterable[Column], note: str, schemas: Json) -> Json:
    """A workflow file of an API graph, with a note under the first column that says what it shows."""
    columns = tuple(columns)
    nodes, groups = placed(graph, columns, schemas)
    links = connect(graph, nodes)
    last = nodes[columns[0].nodes[-1]]
    place = [last["pos"][0], last["pos"][1] + last["size"][1] + GAP]
    text = {"id": len(nodes) + 1, "type": "MarkdownNote", "pos": place, "size": [columns[0].width, 200], "flags": {}}
    text |= {"order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "title": "What this shows", "properties": {}}
    made = [*nodes.values(), {**text, "widgets_values": [note], "color": "#432", "bgcolor": "#653"}]
    return {
        "id": _identity(note),
        "revision": 0,
        "last_node_id": len(made),
        "last_link_id": len(links),
        "nodes": made,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _identity(text: str) -> str:
    """A UUID that is the same each time it is made of the same text."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def blueprint(name: str, graph: Json, about: Blueprint, schemas: Json) -> Json:
    """A blueprint file: a workflow of one node that is the subgraph, with its inputs, widgets and outputs."""
    nodes, _ = placed(graph, about.columns, schemas)
    links = connect(graph, nodes)
    identity = _identity(f"modular-lora-guard/{name}")
    ends = [_link(*link) for link in links]
    inside, outside, values = [], [], []
    for i, (shown, key, wanted) in enumerate(about.inputs):
        target = nodes[key]
        slot = next(i for i, one in enumerate(target["inputs"]) if one["name"] == wanted)
        end = target["inputs"][slot]
        number = len(ends) + 1
        end["link"] = number
        ends.append(_link(number, INPUT_NODE, i, target["id"], slot, end["type"]))
        inside.append(_port(identity, shown, end["type"], number))
        widget = {"widget": {"name": shown}} if "widget" in end else {}
        outside.append({"name": shown, "type": end["type"], **widget, "link": None})
        values += [_value(target, wanted)] if widget else []
    out, shown_out = [], []
    for i, (shown, key, slot) in enumerate(about.outputs):
        source = nodes[key]
        number, type_ = len(ends) + 1, source["outputs"][slot]["type"]
        source["outputs"][slot]["links"].append(number)
        ends.append(_link(number, source["id"], slot, OUTPUT_NODE, i, type_))
        out.append(_port(identity, shown, type_, number))
        shown_out.append({"name": shown, "type": type_, "links": []})
    right = max(one["pos"][0] + one["size"][0] for one in nodes.values())
    subgraph = {
        "id": identity,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(ends), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": INPUT_NODE, "bounding": [LEFT - 240, TOP, 160, 40 + 20 * len(inside)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 100, TOP, 120, 40 + 20 * len(out)]},
        "inputs": inside,
        "outputs": out,
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": [],
        "links": ends,
        "extra": {"BlueprintDescription": about.description},
        "category": "modular lora",
        "description": about.description,
    }
    size = [400, 40 + 20 * max(len(outside) - len(values), len(out)) + 26 * len(values)]
    host = {
        "id": len(nodes) + 1,
        "type": identity,
        "pos": [LEFT, TOP],
        "size": size,
        "flags": {},
        "order": 0,
        "mode": 0,
    }
    host |= {"inputs": outside, "outputs": shown_out, "title": name, "properties": {}, "widgets_values": values}
    return {
        "id": _identity(f"modular-lora-guard/blueprint/{name}"),
        "revision": 0,
        "last_node_id": host["id"],
        "last_link_id": len(ends),
        "nodes": [host],
        "links": [],
        "groups": [],
        "config": {},
        "extra": {"BlueprintDescription": about.description},
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }


def _link(number: int, origin: int, out: int, target: int, slot: int, type_: str) -> Json:
    ends = {"origin_id": origin, "origin_slot": out, "target_id": target, "target_slot": slot}
    return {"id": number, **ends, "type": type_}


def _port(identity: str, name: str, type_: str, link: int) -> Json:
    return {"id": _identity(f"{identity}/{name}"), "name": name, "type": type_, "linkIds": [link]}


def _value(target: Json, name: str) -> Any:
    names: list[str] = []
    for slot in target["inputs"]:
        if "widget" in slot:
            names += [slot["name"]]
            names += ["control"] if _is_controlled(target["type"], slot["name"]) else []
    return target["widgets_values"][names.index(name)]


def to_prompt(workflow: Json) -> Json:
    """A workflow file as the API graph that the front end would queue."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {str(one["id"]): _entry(one, links) for one in workflow["nodes"] if one["type"] not in VIRTUAL}


def _is_controlled(kind: str, name: str) -> bool:
    """Whether the widget "control after generate" follows; trainings and calibrations keep their seed."""
    return name in SEEDS and not any(own in kind for own in ("Train", "Calibrate"))


def _entry(one: Json, links: dict[int, list[Any]]) -> Json:
    values = iter(one.get("widgets_values", []))
    given: Json = {}
    for slot in one.get("inputs", []):
        if "widget" in slot:
            given[slot["name"]] = next(values)
            if _is_controlled(one["type"], slot["name"]):
                next(values)
        elif slot["link"] is not None:
            given[slot["name"]] = links[slot["link"]]
    return {"class_type": one["type"], "inputs": given}
