"""The graphs of the trial with other packs: with Guard they have one node more, and only links through it are moved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from modular_lora_guard.tools.benchmarks import pack_graphs, packs
from support.errors import refuses

CASES = {f"{case.pack}: {case.use}": case for case in pack_graphs.cases()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("change", [pack_graphs.guarded, pack_graphs.merged])
def test_one_node_more_and_no_widget_typed_again(case, change):
    made = change(case, "safety.safetensors")
    assert made.keys() - case.graph.keys() == {"safe"}
    moved = [
        (value, made[name]["inputs"][key])
        for name, one in case.graph.items()
        for key, value in one["inputs"].items()
        if made[name]["inputs"][key] != value
    ]
    assert moved
    assert all(before in case.links.values() and after[0] == "safe" for before, after in moved)
    assert {name: one["class_type"] for name, one in made.items() if name != "safe"} == {
        name: one["class_type"] for name, one in case.graph.items()
    }


def test_at_least_fifteen_packs_are_tried():
    assert len({case.pack for case in CASES.values()}) >= 15


def test_what_a_graph_leaves_out_is_the_servers_default_and_ids_are_numbers():
    declared = {"a": ["INT", {"default": 3}], "b": [["x", "y"]], "c": ["COMBO", {"options": ["z"]}], "d": ["MODEL"]}
    graph = {
        "one": {"class_type": "One", "inputs": {"a": 5}},
        "two": {"class_type": "Two", "inputs": {"d": ["one", 0], "e": {"of": "a pack"}}},
    }
    info = {"One": {"input": {"required": declared}}, "Two": {"input": {}}}
    first, second = packs.completed(graph, info).items()
    assert first[1]["inputs"] == {"a": 5, "b": "x", "c": "z"}
    assert second[1]["inputs"] == {"d": [first[0], 0], "e": {"of": "a pack"}}
    assert first[0].isdigit()


def test_a_line_that_the_server_does_not_heed_ends_the_trial():
    with refuses("command.no-answer", "put in"):
        packs._heeded(SimpleNamespace(get_json=lambda path: {}), in_force=True, patience=0)


def test_with_attach_the_graph_goes_as_it_is_and_the_line_is_there_while_it_runs_alone(tmp_path, monkeypatch):
    case, line = next(iter(CASES.values())), tmp_path / "of_the_pack" / "guard.txt"
    seen = []
    monkeypatch.setattr(packs, "run", lambda client, graph: seen.append((graph, line.exists() and line.read_text())))
    client = SimpleNamespace(get_json=lambda path: {"found": True} if line.exists() else {})
    packs.guarded(client, case, {}, "safety.safetensors", line)
    packs.guarded(None, case, {}, "safety.safetensors", None)
    as_it_is = packs.completed(case.graph, {}), packs.completed(pack_graphs.guarded(case, "safety.safetensors"), {})
    assert seen == [(as_it_is[0], "always: safety.safetensors\n"), (as_it_is[1], False)]
