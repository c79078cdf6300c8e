"""Prompts whose embeddings a node weights or mixes, beside a safety LoRA with a text-encoder half."""

from __future__ import annotations

import pytest
from support.drop_in import guarded, ordinary
from support.errors import refuses
from support.graphs import guarded_graph, node


@pytest.fixture
def graph() -> dict:
    made = guarded_graph("safety_te.safetensors", None, clip=True)
    made["plain"] = node("CLIPTextEncode", clip=["ckpt", 1], text="on a table")
    made["weighed"] = node("WeighWords", clip=["guard", 1], text="(gloss:1.3), a car")
    made["sample"]["inputs"]["positive"] = ["weighed", 0]
    return made


def test_weighted_words_of_the_guarded_clip_are_accepted_and_named(run_graph, loras, graph):
    report = run_graph(graph)["sample"][1]
    assert "\nguarded: " in report
    assert "embeddings weighted or mixed by WeighWords" in report
    graph["sample"]["inputs"]["positive"] = ["pos", 0]
    assert "weighted or mixed" not in run_graph(graph)["sample"][1]


def test_a_mix_of_guarded_prompts_is_accepted_and_named(run_graph, loras, graph):
    graph["mixed"] = node("MixPrompts", one=["weighed", 0], other=["pos", 0])
    graph["sample"]["inputs"]["positive"] = ["mixed", 0]
    assert "embeddings weighted or mixed by MixPrompts" in run_graph(graph)["sample"][1]


def test_what_ran_in_an_earlier_prompt_is_still_known(run_graph, loras, graph):
    run_graph(graph)
    graph["sample"]["inputs"]["seed"] = 5  # the encoder does not run again
    assert "embeddings weighted or mixed by WeighWords" in run_graph(graph)["sample"][1]


@pytest.mark.parametrize("way", ["second", "mix", "prompt", "file", "hidden"])
def test_what_another_clip_has_a_share_in_is_refused(way, comfy, run_graph, loras, graph, monkeypatch):
    if way == "second":
        graph["weighed"]["inputs"]["second"] = ["ckpt", 1]
    elif way == "mix":
        graph["weighed"]["inputs"]["mix"] = ["plain", 0]
    elif way == "prompt":
        graph["mixed"] = node("MixPrompts", one=["weighed", 0], other=["plain", 0])
        graph["sample"]["inputs"]["positive"] = ["mixed", 0]
    elif way == "file":
        graph["weighed"]["inputs"]["text"] = "prompts/car.safetensors"
    else:  # a text encoder that the node has loaded by itself
        own = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")[1]
        monkeypatch.setattr(comfy.nodes.NODE_CLASS_MAPPINGS["WeighWords"], "hidden_clip", own)
    with refuses("conditioning.not-guarded", "positive"):
        run_graph(graph)


def test_behind_guard_they_are_accepted_too_with_the_task_loras_of_the_text_encoder(run_graph, loras, graph):
    made = guarded(ordinary(("task_te.safetensors", 0.6)), safety="safety_te.safetensors")
    clip = made["pos"]["inputs"]["clip"]
    made["pos"] = node("WeighWords", clip=clip, text="(gloss:1.3), a car")
    made["decode"]["class_type"] = "ModularLoraDecode"
    made["show"] = node("PreviewAny", source=["decode", 1])
    report = run_graph(made)["decode"][1]
    assert "\nguarded: " in report
    assert "embeddings weighted or mixed by WeighWords" in report
    assert "task task_te.safetensors at 0.6 / 0.6" in report
    made["pos"]["inputs"]["clip"] = ["ckpt", 1]
    with refuses("conditioning.not-guarded", "positive"):
        run_graph(made)
