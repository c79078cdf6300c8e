"""Refusals on their way into the record: in order, bounded, counted, and never lost without a word."""

from __future__ import annotations

import json
import threading
import time

import pytest
from modular_lora_guard.modular_lora.provenance.record import verify
from modular_lora_guard.modular_lora.util import bounds
from support.graphs import GraphError
from support.operator_graphs import guarded, required

MEBIBYTE = 2**20


def refused(operator) -> list[dict]:
    return [line for line in operator.record() if line["kind"] == "refused"]


def test_every_refusal_is_counted_past_those_that_are_told(enforced):
    graph = {f"{i}": {"class_type": f"Unknown{i % 3}", "inputs": {}} for i in range(120)}
    said = enforced.queue(graph)
    assert len(said) == 50
    assert "and 70 more refusals" in said["49"]
    told = refused(enforced)
    assert [line.get("node") for line in told[:50]] == [f"{i}" for i in range(50)]
    assert told[50]["more"] == {"nodes": 70}
    assert len(told) == 51
    assert len({line["execution"] for line in told}) == 1


def test_a_refusal_as_it_runs_is_a_bounded_line_too(enforced, comfy):
    policies = enforced.policies
    long = "n" * MEBIBYTE
    policies.record(policies.current(), "refused", rule="guard", reason=long, node=long, type=long, prompt_id=long)
    line = refused(enforced)[-1]
    assert len(json.dumps(line)) < 32_000
    for key in ("reason", "node", "type", "prompt_id"):
        assert f"{MEBIBYTE} characters, SHA-256" in line[key]


@pytest.mark.parametrize("chosen", ["x" * MEBIBYTE, {"a": [1]}, 7, None, "\ud800"])
def test_any_prompt_id_gives_a_line(chosen, enforced):
    said = enforced.enforce.on_prompt({"prompt": {"1": {"class_type": "Unknown", "inputs": {}}}, "prompt_id": chosen})
    assert next(iter(said["prompt"].values()))["class_type"] == "ModularLoraRefused"
    assert refused(enforced)[-1]["rule"] == "nodes"


def test_lines_are_in_order_with_those_of_runs(enforced):
    enforced.queue({"1": {"class_type": "Unknown", "inputs": {}}})
    enforced.run_graph(guarded(200))
    enforced.queue({"2": {"class_type": "Unknown", "inputs": {}}})
    kinds = [(line["kind"], line.get("node")) for line in enforced.record() if line["kind"] != "policy"]
    assert kinds == [("refused", "1"), ("run", "sample"), ("refused", "2")]
    assert verify(enforced.path.parent / "record").whole


def test_the_server_does_not_wait_for_the_disc(enforced, monkeypatch):
    """The record is locked for as long as the prompt is refused."""
    enforced.enforce.watch()
    policies, free, taken = enforced.policies, threading.Event(), threading.Event()
    real = policies.Record.append

    def slow(self, *args, **kwargs):
        taken.set()
        free.wait(30)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(policies.Record, "append", slow)
    try:
        assert set(enforced.queue({"1": {"class_type": "Unknown", "inputs": {}}})) == {"1"}
        assert taken.wait(30)
        assert set(enforced.queue({"2": {"class_type": "Unknown", "inputs": {}}})) == {
            "2"
        }  # while the first is written
        enforced.enforce.watch()
    finally:
        free.set()
    assert [line["node"] for line in refused(enforced)] == ["1", "2"]


def test_refusals_that_cannot_be_written_stop_runs_until_they_are(operator, sha256, monkeypatch, caplog):
    operator.write(required(sha256("safety.safetensors")))
    policies = operator.policies
    real = policies.Record.append

    def full(self, *args, **kwargs):
        raise policies.GuardError("no space left")

    monkeypatch.setattr(policies.Record, "append", full)
    operator.queue({"1": {"class_type": "Unknown", "inputs": {}}})
    with pytest.raises(GraphError, match="no space left"):
        operator.run_graph(guarded(201))
    deadline = time.monotonic() + 30
    while not any("not in the record yet" in message for message in caplog.messages):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(policies.Record, "append", real)
    operator.enforce.watch()
    assert next(line["node"] for line in refused(operator)) == "1"
    operator.run_graph(guarded(202))


def test_lines_for_which_there_is_no_room_are_counted(enforced, monkeypatch):
    policies = enforced.policies
    monkeypatch.setattr(policies, "MOST_WAITING", 0)
    enforced.queue({"1": {"class_type": "Unknown", "inputs": {}}, "2": {"class_type": "Unknown", "inputs": {}}})
    assert sum(sum(line["more"].values()) for line in refused(enforced)) == 2


def test_a_cut_text_says_what_it_was_and_is_not_cut_again():
    text = "é" * 5000
    made = bounds.cut(text)
    assert made.startswith("é" * 4096)
    assert bounds.cut(made) == made == bounds.bounded([made])[0]
    assert "5000 characters, SHA-256 " in made
    assert bounds.cut("short") == "short"
    many = bounds.texts([f"{i} " + "y" * 3000 for i in range(2000)])
    assert sum(map(len, many)) < 40_000
    assert "more texts" in many[-1]
