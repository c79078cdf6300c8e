"""Guarded Sample and Gate in the real ComfyUI: flagged images are drawn again, and they alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from support.errors import refuses
from support.gate_graphs import KEY, Stub, files, install_stub, part, redness, sampled_and_gated, save, sha
from support.graphs import GraphError, decode, node, sampler
from support.operator_graphs import required, stopped


@pytest.fixture
def stub(comfy, monkeypatch):
    return install_stub(comfy, monkeypatch)


def test_a_batch_without_flags_is_the_guarded_ksamplers_bit_for_bit(comfy, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries=3)
    graph["disk"] = save(["gate", 0], filename_prefix="clean")
    results = run_graph(graph)
    assert torch.equal(results["gate"][0], results["decode"][0])
    assert results["gate"][1] is False
    assert results["gate"][4].startswith("0 of 3 images flagged; 3 passed\n")
    assert "\n3 tries for 3 images\n" in results["gate"][4]
    assert "\nguarded: " in results["gate"][4]
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "clean")]
    assert [r["status"] for r in records] == ["guarded"] * 3


def test_flagged_images_alone_are_drawn_again(comfy, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries=4)
    first = run_graph(graph)["decode"][0]
    bad = {sha(first[1].numpy())}
    stub.score = lambda image: float(sha(image) in bad)
    stub.seen.clear()
    graph["settings"]["inputs"]["classes"] = "thing 0.6"
    graph["alone"] = sampler(["guard", 0], "ModularLoraKSampler", seed=1 + 1 * 3 + 1, latent_image=["single", 0])
    graph["single"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    graph["alonepic"] = decode(["alone", 0])
    graph["showalone"] = node("PreviewAny", source=["alonepic", 1])
    graph["disk"] = save(["gate", 0], filename_prefix="again")
    results = run_graph(graph)
    images, flagged, _, _, report, _ = results["gate"]
    assert torch.equal(images[0], first[0])
    assert torch.equal(images[2], first[2])
    assert torch.equal(images[1], results["alonepic"][0][0]), "seed + retry × batch size + index"
    assert flagged is False
    assert stub.seen == [3, 1, 3]
    assert "4 tries for 3 images\n  image 2 passed at try 2" in report
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "again")]
    assert [r["status"] for r in records] == ["guarded"] * 3


@pytest.mark.parametrize("max_tries", [1, 3])
def test_what_is_flagged_at_the_last_try_is_acted_on_and_spares_the_others(max_tries, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries, action="block")
    first = run_graph(graph)["decode"][0]
    good = {sha(p.numpy()) for p in (first[0], first[2])}
    stub.score = lambda image: float(sha(image) not in good)
    graph["settings"]["inputs"]["classes"] = "thing 0.6"
    stub.seen.clear()
    images, flagged, _, findings, report, _ = run_graph(graph)["gate"]
    assert stub.seen == [3, *[1] * (max_tries - 1), 3]
    assert flagged is True
    assert torch.equal(images[0], first[0])
    assert torch.equal(images[2], first[2])
    assert torch.count_nonzero(images[1]) == 0, "blocked: nothing of it is seen"
    assert [p["flagged"] for p in json.loads(findings)["pictures"]] == [False, True, False]
    assert f"{2 + max_tries} tries for 3 images" in report
    assert ("image 2 still flagged at try 3" in report) == (max_tries == 3)


def test_under_a_policy_that_allows_block_alone_the_gate_is_judged_as_it_was_set(comfy, stub, operator, sha256, loras):
    """What is flagged is left black, may leave, and its record names the settings that the policy accepted."""
    actions = '[gate]\nrequired = true\nactions = ["block"]\n'
    operator.write(required(sha256("safety.safetensors")) + actions)
    graph = sampled_and_gated(1, action="block") | {"disk": save(["gate", 0], filename_prefix="blocked")}
    del graph["decode"], graph["sample"], graph["save"]
    whole = operator.run(graph)["gate"]
    assert (whole[1], "left empty" in whole[4]) == (False, False)
    stub.score = lambda image: float(sha(image) == sha(whole[0][1].numpy()))
    graph["settings"]["inputs"]["classes"] = "thing 0.6"
    images = operator.run(graph)["gate"][0]
    assert [bool(image.any()) for image in images] == [True, False, True]
    records = [json.loads(Image.open(file).text[KEY])["gate"] for file in files(comfy, "blocked")]
    assert [one["action"] for one in records] == ["block"] * 3 + ["empty"] * 3
    assert [(one["flagged"], one["changed"]) for one in records[3:]] == [(False, False), (True, True), (False, False)]
    assert len({one["settings_sha256"] for one in records[3:]}) == 1
    operator.write(required(sha256("safety.safetensors")) + actions.replace("block", "empty"))
    stub.seen.clear()
    stopped(operator, graph, "refused.gate.actions", "block", "empty")
    assert stub.seen == [], "before anything is sampled"


def test_a_batch_of_which_nothing_is_left_is_blocked(stub, run_graph, loras):
    stub.score = lambda image: 1.0
    with refuses("gate.blocked", "3 of 3"):
        run_graph(sampled_and_gated(2, action="block"))


def test_a_decode_that_fails_while_drawing_again_is_an_error(comfy, stub, loaded, run_graph, loras, monkeypatch):
    stub.score = lambda image: 1.0
    gated, calls = part(comfy, "comfy_host.retries"), []
    whole = gated.decode

    def fail_later(vae, samples):
        calls.append(len(samples))
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return whole(vae, samples)

    monkeypatch.setattr(gated, "decode", fail_later)
    with pytest.raises(GraphError, match="out of memory"):
        run_graph(sampled_and_gated(3))
    assert calls == [3, 1]


def test_an_unguarded_model_is_refused(stub, run_graph, loras):
    graph = sampled_and_gated(1)
    graph["gate"]["inputs"]["model"] = ["ckpt", 0]
    with refuses("model.not-guarded"):
        run_graph(graph)


def test_a_retry_takes_its_own_row_of_latent_mask_and_prompt(comfy):
    gated = part(comfy, "comfy_host.retries")
    rows = lambda *shape: torch.arange(3.0).reshape(3, *(1,) * len(shape)).expand(3, *shape)  # noqa: E731
    prompt = [[rows(77, 8), {"pooled_output": rows(8), "strength": 1.0, "area": (1, 2, 3, 4)}]]
    shared = [[torch.ones(1, 77, 8), {"pooled_output": torch.ones(1, 8)}]]
    latent = {"samples": rows(4, 8, 8), "noise_mask": rows(1, 8, 8)[:1], "batch_index": [5, 6, 7]}
    job = gated.Job(None, None, (), prompt, shared, latent, 1.0).of(2)
    assert job.latent["samples"].unique().tolist() == job.positive[0][0].unique().tolist() == [2.0]
    assert job.positive[0][1]["pooled_output"].shape == (1, 8)
    assert job.positive[0][1]["area"] == (1, 2, 3, 4)
    assert job.negative[0][0].shape == (1, 77, 8)
    assert job.latent["noise_mask"].shape == (1, 1, 8, 8)
    assert "batch_index" not in job.latent


def test_a_video_is_drawn_again_where_one_of_its_frames_is_flagged(comfy):
    gated, gate = part(comfy, "comfy_host.retries"), part(comfy, "comfy_host.gating")
    stub = Stub(redness)
    shots = list(torch.zeros(3, 2, 8, 8, 3))
    shots[1][1, ..., 0] = 1.0
    chosen = gate.Gate(stub, part(comfy, "gate.settings").defaults(stub))
    assert gated._flagged(shots, range(3), chosen) == [1]
    assert gated._flagged(shots, [0, 2], chosen) == gated._flagged(shots, [], chosen) == []
    assert stub.seen == [6, 4]


def test_hints_of_their_own_for_each_image_are_refused_where_images_are_drawn_again(comfy):
    from comfy.controlnet import ControlBase

    gated = part(comfy, "comfy_host.retries")
    control = ControlBase()
    control.previous_controlnet = ControlBase()
    control.previous_controlnet.cond_hint_original = torch.zeros(3, 3, 64, 64)
    cond = [[torch.zeros(1, 77, 8), {"control": control}]]
    job = gated.Job(None, None, (), cond, [], {"samples": torch.zeros(3, 4, 8, 8)}, 1.0)
    with refuses("retries.hints", "3 "):
        job.check_hints()
    control.previous_controlnet.cond_hint_original = torch.zeros(1, 3, 64, 64)
    job.check_hints()


def test_no_image_leaves_the_node_before_the_gate(comfy, stub, run_graph, loras, monkeypatch):
    import latent_preview

    drawn = []
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: _Recorder(drawn))
    stub.score = lambda image: 1.0
    graph = sampled_and_gated(3, action="empty")
    for name in ("sample", "decode", "save"):
        del graph[name]
    images = run_graph(graph)["gate"][0]
    assert torch.count_nonzero(images) == 0
    assert not drawn
    kinds = {event for event, _ in comfy.server.messages}
    assert not {k for k in kinds if "preview" in str(k).lower() or not isinstance(k, str)}, kinds
    assert not [d for e, d in comfy.server.messages if e == "executed" and "images" in (d.get("output") or {})]


@dataclass
class _Recorder:
    drawn: list

    def decode_latent_to_preview_image(self, _, x0):
        self.drawn.append(x0)
