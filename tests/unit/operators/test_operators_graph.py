"""What a policy says of graphs before they run: kinds that are followed along links, whatever stands between."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.operators import graph as graphs
from modular_lora_guard.operators.graph import check
from modular_lora_guard.operators.policy import FILE, parse
from support.graphs import node
from support.policy_graphs import FACTS, SAFETY, TASK, Files, guarded, known, refused


def with_nodes(**nodes: dict) -> dict:
    return guarded() | nodes


def stock(model: list) -> dict:
    """The guarded graph, sampled by the stock KSampler from ``model``."""
    return with_nodes(sample=node("KSampler", model=model, positive=["pos", 0], latent_image=["latent", 0]))


@pytest.mark.parametrize("kind", ["ModularLoraDecode", "ModularLoraDecodeTiled"])
def test_the_guarded_graph_is_not_refused(kind: str) -> None:
    assert refused(with_nodes(decode=node(kind, samples=["sample", 0], vae=["ckpt", 2]))) == {}


def test_the_stock_sampler_is_refused_whatever_it_samples() -> None:
    assert refused(stock(["ckpt", 0])) == {"sample": {"nodes.sampling"}}
    assert refused(stock(["guard", 0])) == {"sample": {"nodes.sampling"}}


def test_a_named_sampler_may_run_on_a_guarded_model_and_on_no_other() -> None:
    named = '[nodes]\nsampling = ["KSampler"]\n[open]\nguarded_as_model = true'
    graph = stock(["as", 0]) | {"as": node("ModularLoraGuardedAsModel", guarded_model=["guard", 0])}
    assert refused(graph, named) == {}
    assert refused(stock(["ckpt", 0]), named) == {"sample": {"guard.required"}}
    assert refused(graph, '[nodes]\nsampling = ["KSampler"]') == {"as": {"open.guarded_as_model"}}


@pytest.mark.parametrize(
    "between",
    [
        {"x": node("Any", value=["ckpt", 0])},
        {"y": node("Any", value=["ckpt", 0]), "x": node("Switch", a=["y", 0], b=["pos", 0])},
        {"x": node("Matched", a=["ckpt", 0])},
        {"x": node("Source")},
        {"x": node("Switch", a=["x", 0], b=["ckpt", 0])},
        {"x": node("Any", undeclared=["ckpt", 0])},
    ],
)
def test_any_type_nodes_do_not_hide_a_model(between: dict) -> None:
    graph = stock(["x", 0]) | between
    assert "nodes.sampling" in refused(graph)["sample"]
    named = '[nodes]\nsampling = ["KSampler"]\npatching = ["Any", "Switch", "Matched"]'
    if between["x"]["class_type"] != "Source":  # what it brings shows when it runs
        assert refused(graph, named) == {"sample": {"guard.required"}}


def test_any_type_nodes_do_not_stop_a_guarded_model() -> None:
    graph = stock(["x", 0]) | {
        "as": node("ModularLoraGuardedAsModel", guarded_model=["guard", 0]),
        "x": node("Any", value=["as", 0]),
    }
    named = '[nodes]\nsampling = ["KSampler", "Any"]\n[open]\nguarded_as_model = true'
    assert refused(graph, named) == {}


@pytest.mark.parametrize("slot", [0, -3, False, 0.0])
def test_every_way_to_name_an_output_is_understood(slot: object) -> None:
    assert refused(stock(["ckpt", slot])) == {"sample": {"nodes.sampling"}}


@pytest.mark.parametrize("slot", [3, -4, 99])
def test_an_output_that_is_not_there_is_refused(slot: int) -> None:
    assert refused(stock(["ckpt", slot])) == {"sample": {"nodes"}}


def test_patches_stand_before_the_guard_only_where_they_are_named() -> None:
    graph = with_nodes(free=node("FreeU", model=["ckpt", 0]))
    graph["guard"]["inputs"]["model"] = ["free", 0]
    assert refused(graph) == {"free": {"nodes.sampling"}}
    assert refused(graph, '[nodes]\npatching = ["FreeU"]') == {}
    graph["sample"] = stock(["free", 0])["sample"]
    assert "sample" in refused(graph, '[nodes]\npatching = ["FreeU"]\nsampling = ["KSampler"]')


def test_an_unguarded_model_is_refused_at_our_own_sampler() -> None:
    graph = guarded()
    graph["sample"]["inputs"]["model"] = ["ckpt", 0]
    assert refused(graph) == {"sample": {"guard.required"}}


@pytest.mark.parametrize("kind", ["LoraLoader", "EfficientLoader"])
def test_other_loaders_of_loras_are_refused(kind: str) -> None:
    graph = with_nodes(other=node(kind, model=["ckpt", 0], clip=["ckpt", 1], lora_name="x"))
    graph["pos"]["inputs"]["clip"] = ["other", 1]
    assert refused(graph)["other"] == {"guard.required"}


def test_a_stacker_of_loras_may_feed_guard_model() -> None:
    graph = with_nodes(stack=node("LoraStacker", lora_name_1="x"))
    graph["task"]["inputs"]["lora_stack"] = ["stack", 0]
    assert refused(graph) == {}


@pytest.mark.parametrize(("kind", "source"), [("ModelSave", ["ckpt", 0]), ("CLIPSave", ["ckpt", 1])])
def test_weights_are_written_only_by_node_types_that_are_allowed_by_name(kind: str, source: list) -> None:
    graph = with_nodes(write=node(kind, model=source, clip=source))
    assert "nodes.allow" in refused(graph)["write"]
    rest = ", ".join(f'"{name}"' for name in FACTS)
    named = f'[nodes]\nallow = [{rest}]\npatching = ["ModelSave"]'
    assert refused(graph, named) == {}


def test_images_leave_only_where_a_guarded_run_made_them() -> None:
    show = lambda *source: with_nodes(show=node("SaveImage", images=list(source)))  # noqa: E731
    assert refused(show("decode", 0)) == {}
    graph = show("plain", 0) | {"plain": node("VAEDecode", samples=["sample", 0], vae=["ckpt", 2])}
    assert refused(graph) == {"show": {"open.unattested"}}
    graph = show("x", 0) | {"load": node("LoadImage", image="x"), "x": node("Any", value=["load", 0])}
    assert refused(graph) == {"show": {"open.unattested"}}
    assert refused(graph, "[open]\nunattested = true") == {}
    graph = with_nodes(video=node("CreateVideo", images=["load", 0]), load=node("LoadImage", image="x"))
    graph["show"] = node("SaveVideo", video=["video", 0])
    assert refused(graph) == {"show": {"open.unattested"}}
    graph = with_nodes(show=node("PreviewAny", source=["load", 0]), load=node("LoadImage", image="x"))
    assert refused(graph) == {"show": {"open.unattested"}}


def test_where_a_gate_is_required_only_what_it_judged_leaves_and_no_latent() -> None:
    gate = "[gate]\nrequired = true"
    assert refused(guarded(), gate) == {"save": {"gate.required"}}
    graph = with_nodes(gate=node("ModularLoraGate", images=["decode", 0]), save=node("SaveImage", images=["gate", 0]))
    assert refused(graph, gate) == {}
    assert refused(graph | {"out": node("SaveLatent", samples=["sample", 0])}, gate) == {"out": {"gate.required"}}
    graph["gate"]["inputs"]["images"] = ["load", 0]
    assert refused(graph | {"load": node("LoadImage", image="x")}, gate) == {"save": {"open.unattested"}}


def test_what_no_output_needs_is_not_refused() -> None:
    assert refused(guarded() | {"lone": node("KSampler", model=["ckpt", 0])}) == {}


def test_types_that_are_unknown_denied_or_not_allowed_are_refused() -> None:
    assert refused(with_nodes(new=node("Never"))) == {"new": {"nodes"}}
    assert refused(guarded(), '[nodes]\ndeny = ["ModularLoraDecode"]') == {"decode": {"nodes.deny"}}
    allowed = refused(guarded(), '[nodes]\nallow = ["CheckpointLoaderSimple", "EmptyLatentImage", "SaveImage"]')
    assert allowed == {"pos": {"nodes.allow"}}


@pytest.mark.parametrize(("kind", "key"), [("ModularLoraAudit", "audit"), ("ModularLoraTrainTask", "training")])
def test_what_is_not_opened_is_closed(kind: str, key: str) -> None:
    graph = with_nodes(own=node(kind, model=["ckpt", 0]))
    assert refused(graph) == {"own": {f"open.{key}"}}
    assert refused(graph, f"[open]\n{key} = true") == {}


def test_another_packs_node_under_our_name_is_not_ours() -> None:
    graph = stock(["ckpt", 0])
    graph["sample"]["class_type"] = "ModularLoraKSampler"
    graph["decode"]["class_type"] = "ModularLoraDecode"
    facts = FACTS | {name: known(*args) for name, args in {
        "ModularLoraKSampler": ("model MODEL; latent_image LATENT", "LATENT"),
        "ModularLoraDecode": ("samples LATENT; vae VAE", "IMAGE"),
    }.items()}  # fmt: skip
    policy = parse(f'[guard]\nrequired = [{{sha256 = "{SAFETY}"}}]'.encode(), Path(FILE))
    assert {one.node for one in check(graph, facts.get, policy, Files())} == {"sample", "save"}


def test_required_safety_loras_must_be_in_the_chain_strong_enough() -> None:
    both = f'{{sha256 = "{SAFETY}", min_net_strength = 0.9}}, {{sha256 = "{TASK}", min_net_strength = 0.5}}'
    assert refused(guarded(), required=both) == {"guard": {"guard.required"}}
    graph = with_nodes(second=node("ModularLoraLoadSafety", lora_name="task.safetensors", strength=0.5))
    graph["safety"]["inputs"]["safety_lora"] = ["second", 0]
    assert refused(graph, required=both) == {}
    for little in (0.4, 0, -1, float("nan")):
        graph["second"]["inputs"]["strength"] = {"__value__": little}
        assert refused(graph, required=both) == {"guard": {"guard.required"}}
    graph["second"]["inputs"]["strength"] = ["pos", 0]  # over a link: decided when it runs
    assert refused(graph, required=both) == {}


def test_a_signature_stands_for_a_file() -> None:
    by = '[keys]\nteam = "t.pub"\nother = "o.pub"'
    assert refused(guarded(), by, required='{signed_by = "team"}') == {}
    assert refused(guarded(), by, required='{signed_by = "other"}') == {"guard": {"guard.required"}}


def test_many_guards_on_one_chain_of_loaders_do_not_walk_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    literal = graphs._literal
    monkeypatch.setattr(graphs, "_literal", lambda node, name: asked.update([name]) or literal(node, name))
    task, many = {"lora_name": "task.safetensors", "strength": 0.5}, 500
    loaders = {
        f"load{i}": node("ModularLoraLoadSafety", **task, **({"safety_lora": [f"load{i - 1}", 0]} if i else {}))
        for i in range(many)
    }
    loaders["load250"]["inputs"] |= {"lora_name": "safety.safetensors", "strength": 1.0}
    loaders["load499"]["inputs"] |= {"lora_name": "safety.safetensors", "strength": 0.2}
    guards = {f"guard{i}": node("ModularLoraGuardModel", safety_lora=[f"load{i}", 0]) for i in range(many)}
    shown = {f"show{i}": node("PreviewAny", source=[f"guard{i}", 2]) for i in range(many)}
    found = refused(guarded() | loaders | guards | shown)
    assert set(found) == {f"guard{i}" for i in range(250)}, "behind the 251st loader all have the safety LoRA"
    assert asked["strength"] <= 2 * many + 2, "each loader is read for its guard and for the next loader"


def test_a_loop_of_loaders_ends_and_is_left_to_the_server() -> None:
    graph = guarded()
    graph["safety"]["inputs"]["safety_lora"] = ["safety", 0]
    assert refused(graph) == {}


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often it was asked what each node gives."""
    counted, given = Counter(), graphs._Graph._given

    def count(self, name: str):
        counted[name] += 1
        return given(self, name)

    monkeypatch.setattr(graphs._Graph, "_given", count)
    return counted


def chain(name: str, count: int, first: list) -> dict:
    """Any-type nodes one behind another, ``name``0 to ``name`` and count - 1."""
    return {f"{name}{i}": node("Any", value=[f"{name}{i - 1}", 0] if i else first) for i in range(count)}


NAMED = '[nodes]\nsampling = ["KSampler"]\npatching = ["Any", "Switch"]'
ORDERS = {"sources first": list, "sources last": lambda some: list(some)[::-1], "mixed": sorted}


@pytest.mark.parametrize("order", ORDERS)
def test_each_node_of_a_deep_chain_is_visited_once(order: str, visits: Counter) -> None:
    graph = chain("x", 4000, ["ckpt", 0]) | stock(["x3999", 0])
    assert refused({name: graph[name] for name in ORDERS[order](graph)}, NAMED) == {"sample": {"guard.required"}}
    assert visits == Counter(graph.keys())


@pytest.mark.parametrize("order", ORDERS)
def test_loops_and_what_is_behind_them_are_visited_a_few_times(order: str, visits: Counter) -> None:
    graph = chain("x", 1000, ["x999", 0]) | chain("y", 1000, ["x700", 0]) | stock(["y999", 0])
    graph["x500"] = node("Switch", a=["x499", 0], b=["ckpt", 0])
    assert refused({name: graph[name] for name in ORDERS[order](graph)}, NAMED) == {"sample": {"guard.required"}}
    assert visits.total() <= 4 * len(graph)


@pytest.mark.parametrize("models", [["ckpt", "named"], ["named", "ckpt"]])
def test_a_switch_between_a_guarded_and_an_unguarded_model_is_refused(models: list[str]) -> None:
    switch = node("Switch", a=[models[0], 0], b=[models[1], 0])
    graph = stock(["switch", 0]) | {
        "switch": switch,
        "named": node("ModularLoraGuardedAsModel", guarded_model=["guard", 0]),
    }
    assert "guard.required" in refused(graph, NAMED)["sample"]


def test_literal_values_of_our_nodes_are_checked() -> None:
    graph = guarded()
    graph["guard"]["inputs"]["accept_merged"] = True
    assert refused(graph) == {"guard": {"guard.required"}}
    assert refused(guarded(), f'[tasks]\ndeny = ["{TASK}"]') == {"task": {"tasks.deny"}}
    assert refused(guarded(), f'[tasks]\nallow = ["{SAFETY}"]') == {"task": {"tasks.allow"}}
    graph = guarded()
    graph["task"]["inputs"]["lora_name"] = "../../etc/passwd"
    assert refused(graph) == {"task": {"nodes"}}
    graph = with_nodes(gate=node("ModularLoraGate", images=["decode", 0], gate=["set", 0]))
    graph |= {"set": node("ModularLoraGateSettings", threshold=0.5), "save": node("SaveImage", images=["gate", 0])}
    assert refused(graph, "[gate.thresholds]\nFACE = 0.45") == {"set": {"gate.thresholds"}}
    assert refused(graph, "[gate.thresholds]\nFACE = 0.5") == {}
    graph["set"]["inputs"]["activity"] = "review"
    assert refused(graph, '[gate]\nactivity = "block"') == {"set": {"gate.activity"}}
    assert refused(graph, '[gate]\nactivity = "review"') == {}


def test_without_required_loras_sampling_is_free_and_the_rest_holds() -> None:
    graph = stock(["ckpt", 0])
    assert refused(graph, required="") == {}
    assert refused(graph, '[nodes]\ndeny = ["KSampler"]', required="") == {"sample": {"nodes.deny"}}


@pytest.mark.parametrize("graph", [None, [], "x", {"a": None}, {"a": {"class_type": 3}}, {"a": {"class_type": "Any"}}])
def test_what_is_no_graph_is_refused(graph: object) -> None:
    assert refused(graph)


VALUE = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.sampled_from(["a", "b", "c"]))
LINK = st.tuples(st.sampled_from("abc"), st.integers(-4, 4)).map(list)
NODES = st.fixed_dictionaries({
    "class_type": st.sampled_from(sorted(FACTS)) | st.text(max_size=3),
    "inputs": st.dictionaries(
        st.sampled_from(["model", "images", "value", "safety_lora", "lora_name", "strength", "threshold"]),
        VALUE | LINK | st.lists(VALUE, max_size=3) | st.dictionaries(st.just("__value__"), VALUE),
    ),
})  # fmt: skip


@given(st.dictionaries(st.sampled_from("abc"), NODES | VALUE))
def test_any_graph_gets_an_answer_and_is_not_changed(graph: dict) -> None:
    before = copy.deepcopy(graph)
    refused(graph, "[gate]\nrequired = true\nthresholds = {FACE = 0.5}")
    assert graph == before


@given(st.lists(st.sampled_from(["Any", "Switch", "Matched", "FreeU", "ImageInvert"]), max_size=6), st.randoms())
def test_no_way_of_wiring_brings_an_unguarded_model_to_a_sampler(kinds: list[str], random) -> None:
    """Random wiring between the checkpoint and a sampler that may run on a guarded MODEL."""
    graph = guarded()
    sources = ["ckpt"]
    for i, kind in enumerate(kinds):
        inputs = {name: [random.choice(sources), 0] for name in FACTS[kind].inputs}
        graph[f"n{i}"] = node(kind, **inputs)
        sources.append(f"n{i}")
    graph["sample"] = stock([sources[-1], 0])["sample"]
    named = '[nodes]\nsampling = ["KSampler"]\npatching = ["Any", "Switch", "Matched", "FreeU"]'
    if "ImageInvert" not in kinds:
        assert refused(graph, named) == {"sample": {"guard.required"}}
    assert refused(graph)


def test_weights_that_a_request_can_have_written_are_refused_by_their_name_in_any_loader():
    graph = guarded()
    graph["ckpt"]["inputs"]["ckpt_name"] = "uploaded.safetensors"
    assert refused(graph) == refused(graph, "[open]\nunattested = true") == {"ckpt": {"weights"}}
    graph["ckpt"]["inputs"]["ckpt_name"] = {"__value__": "uploaded.safetensors"}
    assert refused(graph) == {"ckpt": {"weights"}}
    graph["ckpt"]["inputs"]["ckpt_name"] = "world.safetensors"
    assert refused(graph) == {}
