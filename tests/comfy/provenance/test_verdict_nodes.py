"""Verdicts of batches in which images differ, in ComfyUI itself; tests/server/test_verdict.py reads them over HTTP."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from modular_lora_guard.tools.bootstrap.paths import ROOT
from support.gate_graphs import GREEN, RED, gated_colours, install_stub
from support.graphs import node

SCHEMA = json.loads((ROOT / "docs" / "verdict.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def stub(comfy, monkeypatch):
    return install_stub(comfy, monkeypatch)


def answers(comfy) -> dict:
    return {
        data["node"]: data["output"] for event, data in comfy.server.messages if event == "executed" and data["output"]
    }


def test_a_gate_withholds_flagged_images_alone_and_says_why(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED, GREEN, action="withhold")
    results = run_graph(graph)
    images, flagged, masks, findings, *_ = results["gate"]
    assert flagged is True
    assert (len(images), len(masks)) == (2, 2)
    assert torch.equal(images[:, 0, 0], torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert not masks.any()
    assert len(json.loads(findings)["pictures"]) == 3
    said = answers(comfy)["gate"]["modular_lora"]
    for one in said:
        jsonschema.validate(one, SCHEMA)
    assert [one["withheld"] for one in said] == [False, True, False]
    assert said[1]["refusal"]["reason"] == "blocked by stub 1: thing 1.00 ≥ 0.5"
    assert said[1]["gate"]["findings"] == [{"label": "thing", "score": 1.0, "threshold": 0.5, "blocked": True}]
    assert comfy.server.texts["gate"].startswith("1 of 3 images flagged, withheld; 2 passed\n")


def test_a_batch_of_withheld_images_ends_the_job_well_and_nothing_is_written(comfy, stub, run_graph):
    graph = gated_colours(RED, RED, action="withhold")
    graph["disk"] = node("SaveImage", images=["gate", 0], filename_prefix="withheld")
    before = set(comfy.output.rglob("*"))
    run_graph(graph)  # an error would be raised
    assert "disk" not in answers(comfy)
    assert set(comfy.output.rglob("*")) == before
    assert [one["withheld"] for one in answers(comfy)["gate"]["modular_lora"]] == [True, True]


def test_what_was_withheld_is_not_let_out_by_the_input_of_the_gate(comfy, stub, run_graph):
    """The record of a withheld image says flagged and unchanged: Save Image (Guarded) and a policy refuse it."""
    image = run_graph(gated_colours(RED, action="withhold"))["batch"][0]
    known = comfy.ledger.known(image[0])
    assert known.gate.flagged
    assert not known.gate.changed


def test_an_image_that_the_gate_changed_is_said_to_be_edited_by_it(comfy, stub, run_graph):
    run_graph(gated_colours(GREEN, RED, action="blur"))
    plain, blurred = answers(comfy)["gate"]["modular_lora"]
    jsonschema.validate(blurred, SCHEMA)
    assert plain["edited_by"] == []
    assert blurred["edited_by"] == [{"type": "gate", "action": "blur"}]
    assert (blurred["gate"]["flagged"], blurred["gate"]["changed"], blurred["withheld"]) == (True, True, False)
