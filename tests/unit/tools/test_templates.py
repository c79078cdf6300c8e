"""Templates: the layout gives every node room, and what is built from an API graph says the same as that graph."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.tools.templates import cards, layout
from modular_lora_guard.tools.templates.definitions import ABOUT, BLUEPRINTS, BUILT
from modular_lora_guard.tools.templates.graph import Blueprint, Column, blueprint, to_prompt, workflow
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCHEMAS = {
    "Load": {"input": {"required": {"name": (["a", "b"], {})}}, "output": ["MODEL"], "output_name": ["MODEL"]},
    "Sample": {
        "input": {
            "required": {"seed": ("INT", {"default": 0}), "model": ("MODEL", {})},
            "optional": {"steps": ("INT", {"default": 20})},
        },
        "output": ["IMAGE"],
        "output_name": ["image"],
    },
}
GRAPH = {
    "load": {"class_type": "Load", "inputs": {"name": "b"}},
    "sample": {"class_type": "Sample", "inputs": {"model": ["load", 0], "seed": 7}},
}
COLUMNS = (Column("1  Load", ("load",), 200), Column("2  Sample", ("sample",), 300))


def test_a_built_workflow_queues_the_graph_it_was_built_from() -> None:
    made = workflow(GRAPH, COLUMNS, "A note.", SCHEMAS)
    assert to_prompt(made) == {
        "1": {"class_type": "Load", "inputs": {"name": "b"}},
        "2": {"class_type": "Sample", "inputs": {"model": ["1", 0], "seed": 7, "steps": 20}},
    }
    assert made["links"] == [[1, 1, 0, 2, 0, "MODEL"]]
    assert made["nodes"][1]["widgets_values"] == [7, "fixed", 20]
    assert made == workflow(GRAPH, COLUMNS, "A note.", SCHEMAS), "the same each time"


def test_a_blueprint_shows_its_inputs_in_order_with_the_values_of_its_widgets() -> None:
    about = Blueprint(
        "Samples.", COLUMNS, (("which", "load", "name"), ("noise", "sample", "seed")), (("image", "sample", 0),)
    )
    made = blueprint("Both", GRAPH, about, SCHEMAS)
    (host,), (inner,) = made["nodes"], made["definitions"]["subgraphs"]
    assert host["type"] == inner["id"]
    assert [slot["name"] for slot in host["inputs"]] == ["which", "noise"]
    assert host["widgets_values"] == ["b", 7]
    ends = {link["id"]: link for link in inner["links"]}
    for slot, port in enumerate(inner["inputs"]):
        (number,) = port["linkIds"]
        assert (ends[number]["origin_id"], ends[number]["origin_slot"]) == (-10, slot)
        target = next(node for node in inner["nodes"] if node["id"] == ends[number]["target_id"])
        assert target["inputs"][ends[number]["target_slot"]]["link"] == number
    (number,) = inner["outputs"][0]["linkIds"]
    assert (ends[number]["target_id"], ends[number]["origin_id"]) == (-20, 2)


def test_the_layout_gives_every_node_the_room_that_it_was_drawn_with() -> None:
    saved = workflow(GRAPH, COLUMNS, "A note.", SCHEMAS)
    drawn = {1: (260, 500), 2: (300, 90), 3: (200, 300)}
    made = layout.arrange(saved, {number: (float(w), float(h)) for number, (w, h) in drawn.items()})
    boxes = {
        node["id"]: (node["pos"][0], node["pos"][1] - layout.TITLE, *_whole(drawn[node["id"]]))
        for node in made["nodes"]
    }
    for a, b in combinations(boxes.values(), 2):
        assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    for node in made["nodes"]:
        x, y, width, height = boxes[node["id"]]
        assert any(
            left <= x and x + width <= left + across and top <= y and y + height <= top + down
            for left, top, across, down in (group["bounding"] for group in made["groups"])
        )
    again = {node["id"]: (node["size"][0], max(node["size"][1], drawn[node["id"]][1])) for node in made["nodes"]}
    assert layout.arrange(made, again) == made, "the second time nothing moves"


def _whole(size: tuple[int, int]) -> tuple[int, int]:
    return size[0], size[1] + layout.TITLE


def test_sizes_of_nodes_2_are_brought_back_to_the_files_own_units() -> None:
    saved = {
        "nodes": [
            {"id": 1, "pos": [0, 0], "size": [100, 50], "flags": {}},
            {"id": 2, "pos": [200, 0], "size": [100, 50], "flags": {}},
        ]
    }
    nodes = [{"id": 1, "drawn": [0, 0, 120, 276], "box": None}, {"id": 2, "drawn": [240, 0, 180, 60], "box": None}]
    assert layout.room(saved, [{"nodes": nodes}]) == {1: (100.0, 200.0), 2: (150.0, 50.0)}


def test_a_folded_node_takes_the_room_of_its_title() -> None:
    saved = workflow(GRAPH, (Column("All", ("load", "sample"), 200),), "A note.", SCHEMAS)
    saved["nodes"][0] |= {"size": [200, 2000], "flags": {"collapsed": True}}
    made = layout.arrange(saved, layout.room(saved, []))
    folded, below = made["nodes"][:2]
    assert below["pos"][1] - folded["pos"][1] == layout.TITLE + layout.BETWEEN
    assert folded["size"] == [200, 2000], "it is as large as before once it is opened"


def test_a_node_outside_of_every_column_is_an_error() -> None:
    saved = workflow(GRAPH, COLUMNS, "A note.", SCHEMAS)
    saved["nodes"][0]["pos"] = [5000, 0]
    with pytest.raises(ValueError, match=r"nodes \[1\] lie in no group"):
        layout.arrange(saved, layout.room(saved, []))


def test_every_template_has_a_sentence_and_begins_its_note_with_it() -> None:
    assert {file.stem for file in WORKFLOWS} == set(ABOUT)
    for file in WORKFLOWS:
        nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
        (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
        assert note.startswith(f"## {file.stem.lstrip('0123456789 ')}\n\n{ABOUT[file.stem].sentence}\n\n")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_template_has_no_view_of_its_own_so_that_it_is_opened_whole(file) -> None:
    """Front end 1.32 fits the view to the nodes of a workflow without one, 1.49 and 1.58 to those of every template.

    Read in their JavaScript (loadGraphData). tests/browser looks at what is in view then.
    """
    assert "ds" not in json.loads(file.read_text(encoding="utf-8"))["extra"]


def test_the_ordinary_graph_comes_first_and_is_the_one_that_is_defined() -> None:
    assert next(iter(ABOUT)) == "1 Guard an ordinary graph"
    saved = json.loads((ROOT / "workflows" / "1 Guard an ordinary graph.json").read_text(encoding="utf-8"))
    queued = sorted(node["class_type"] for node in to_prompt(saved).values())
    assert queued == sorted(node["class_type"] for node in BUILT["1 Guard an ordinary graph"][0].values())
    assert [kind for kind in queued if kind.startswith("ModularLora")] == ["ModularLoraGuard"]


def test_blueprints_are_those_that_are_defined_and_are_plain_ascii() -> None:
    files = sorted((ROOT / "subgraphs").glob("*.json"))
    assert {file.stem for file in files} == set(BLUEPRINTS)
    for file in files:
        file.read_bytes().decode("ascii")  # ComfyUI 0.3.75 reads them in the system's encoding


def test_a_card_shows_every_image() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    made = cards.card("Title", "A sentence.", [Image.new("RGB", (8, 8), colour) for colour in colours])
    assert made.size == cards.SIZE
    seen = {colour for _, colour in made.getcolors(made.width * made.height) or []}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)} <= seen
