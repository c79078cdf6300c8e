"""Texts in the record: those of the embeddings that a run used, whoever made them and whatever a request says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import new_executor
from hypothesis import given
from hypothesis import strategies as st
from support.gate_graphs import part
from support.graphs import node
from support.operator_graphs import guarded, required

TEXTS = "[record]\nprompts = true\n"


@pytest.fixture
def book(operator, sha256, comfy) -> SimpleNamespace:
    """``run``: the record's line of a graph's one run, by an executor that keeps its results over the test."""
    operator.write(required(sha256("safety.safetensors")) + TEXTS)
    executor = new_executor(comfy)

    def run(graph: dict) -> dict:
        known = len(lines(operator))
        operator.run_graph(copy.deepcopy(graph), executor)
        (line,) = lines(operator)[known:]
        return line

    return SimpleNamespace(run=run, operator=operator)


def lines(operator) -> list[dict]:
    return [line for line in operator.record() if line["kind"] == "run"]


def prompted(seed: int, positive: str, negative: str = "", **changes) -> dict:
    graph = guarded(seed, **changes)
    graph["pos"]["inputs"]["text"], graph["neg"]["inputs"]["text"] = positive, negative
    return graph


@pytest.mark.parametrize("clip", [False, True])
def test_texts_of_stock_and_guarded_encoders_are_recorded(clip, operator, sha256, comfy):
    safety = "safety_te.safetensors" if clip else "safety.safetensors"
    operator.write(required(sha256(safety)) + TEXTS)
    graph = prompted(1, f"a cat {clip}", "blurred", safety=safety, clip=clip)
    operator.run_graph(copy.deepcopy(graph), new_executor(comfy))
    (line,) = lines(operator)
    assert sorted(line["prompts"]) == [f"a cat {clip}", "blurred"]
    assert line["rows_without_known_text"] == 0


def test_texts_that_come_over_links_are_recorded(book):
    graph = prompted(2, "")
    graph["words"] = node("PrimitiveString", value="words over a link")
    graph["pos"]["inputs"]["text"] = ["words", 0]
    assert sorted(book.run(graph)["prompts"]) == ["", "words over a link"]


def test_what_a_request_said_before_under_the_same_id_counts_for_nothing(book):
    on_prompt = book.operator.enforce.on_prompt
    first, second = prompted(3, "cactus"), prompted(3, "gloss, cat")
    runs = []
    for graph in (first, second):  # both pass the queue, then the second runs
        said = on_prompt({"prompt": graph, "prompt_id": "test"})
        assert said["prompt"].keys() == graph.keys()
    on_prompt({"prompt": first, "prompt_id": "test"})
    for graph in (second, first, second):
        graph["sample"]["inputs"]["seed"] += 1
        runs.append(book.run(graph))
    said = [["gloss, cat", ""], ["cactus", ""], ["gloss, cat", ""]]
    assert [line["prompts"] for line in runs] == said
    assert {line["prompt_id"] for line in runs} == {"test"}
    assert len({line["execution"] for line in runs}) == 3


def test_a_cached_encoder_still_has_its_text(book):
    graph = prompted(5, "kept from before")
    before = book.run(graph)
    graph["sample"]["inputs"]["seed"] = 6
    after = book.run(graph)
    assert after["prompts"] == before["prompts"] == ["kept from before", ""]
    assert after["execution"] != before["execution"]


def test_concatenated_embeddings_have_both_texts_and_averaged_ones_none(book):
    graph = prompted(7, "gloss, cat")
    graph["other"] = node("CLIPTextEncode", clip=["ckpt", 1], text="cactus")
    graph["both"] = node("ConditioningConcat", conditioning_to=["pos", 0], conditioning_from=["other", 0])
    graph["sample"]["inputs"]["positive"] = ["both", 0]
    line = book.run(graph)
    assert line["prompts"] == ["gloss, cat", "cactus", ""]
    assert line["rows_without_known_text"] == 0
    links = {"conditioning_to": ["pos", 0], "conditioning_from": ["other", 0]}
    graph["both"] = node("ConditioningAverage", **links, conditioning_to_strength=0.5)
    line = book.run(graph)
    assert line["prompts"] == [""]
    assert line["rows_without_known_text"] >= 76  # the first row is the same in both
    graph["both"] = node("ConditioningZeroOut", conditioning=["pos", 0])
    line = book.run(graph)
    assert (line["prompts"], line["rows_without_known_text"]) == ([""], 0)


def test_two_texts_with_the_same_beginning_are_told_apart(book):
    line = book.run(prompted(8, "a cat", "a cat on a mat"))
    assert line["prompts"] == ["a cat", "a cat on a mat"]
    line = book.run(prompted(9, "a cat on a mat", "a cat"))
    assert line["prompts"] == ["a cat on a mat", "a cat"]


def test_a_text_of_several_sections_is_recorded_whole_or_cut_with_its_hash(book):
    long = "a cat on a mat " * 40
    assert book.run(prompted(10, long))["prompts"] == [long, ""]
    longer = "many words " * 2000
    (text, _) = book.run(prompted(11, longer))["prompts"]
    assert len(text) < 5000
    assert "22000 characters, SHA-256" in text


def test_embeddings_that_a_node_changes_or_makes_by_itself_have_no_known_text(book, comfy, monkeypatch):
    def run(conditioning):
        return ([[cond * 1.5, more] for cond, more in conditioning],)

    members = {"RETURN_TYPES": ("CONDITIONING",), "FUNCTION": "run", "CATEGORY": "test", "run": staticmethod(run)}
    kinds = {"required": {"conditioning": ("CONDITIONING",)}}
    made = type("Louder", (), members | {"INPUT_TYPES": classmethod(lambda cls: kinds)})
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Louder", made)
    graph = prompted(12, "words that were changed")
    graph["louder"] = node("Louder", conditioning=["pos", 0])
    graph["sample"]["inputs"]["positive"] = ["louder", 0]
    line = book.run(graph)
    assert line["rows_without_known_text"] == 77


def test_without_the_key_no_text_is_kept_or_written(enforced, comfy):
    module = part(comfy, "comfy_host.enforcement.texts")
    before = len(module._rows._values)
    enforced.run_graph(prompted(13, "told to nobody at all"))
    (line,) = lines(enforced)
    assert "told to nobody" not in json.dumps(line)
    assert "rows_without_known_text" not in line
    assert len(module._rows._values) == before


@given(data=st.data())
def test_texts_are_found_again_in_any_row_of_sequences(data, comfy):
    """The reference: pieces that were put in are known, others are counted."""
    sequences = part(comfy, "comfy_host.enforcement.texts").Sequences(1000)
    words = {f"text {i}": [f"begin {i % 2}", *(f"{i}.{j}" for j in range(i + 1))] for i in range(5)}
    for text, marks in words.items():
        sequences.put(marks, (text,), True)
    names = data.draw(st.lists(st.sampled_from([*words, "new", "empty"]), max_size=6))
    marks = [mark for name in names for mark in words.get(name, [name])]
    found = sequences.find(marks, [mark == "empty" for mark in marks])
    assert found.known == tuple(name for name in names if name in words)
    assert found.unknown == names.count("new")


def test_weights_do_not_matter_and_images_between_the_words_do(comfy):
    module = part(comfy, "comfy_host.enforcement.texts")
    sections: Callable = lambda tokens: list(module._sections(tokens))  # noqa: E731
    plain = {"l": [[(1, 1.0), (2, 1.0)]]}
    assert sections(plain) == sections({"l": [[(1, 0.5), (2, 3.0, 1)]]})
    assert sections(plain) != sections({"g": [[(1, 1.0), (2, 1.0)]]})
    images = [{"x": [[({"type": "image", "data": torch.full((2, 2), value)}, 1.0)]]} for value in (0.0, 1.0)]
    assert sections(images[0]) != sections(images[1])
