"""What a gate decided stays with the pixels, and Save Image (Guarded) goes by it."""

from __future__ import annotations

import json

import pytest
from modular_lora_guard.modular_lora.provenance import marking
from PIL import Image
from support.errors import refuses
from support.gate_graphs import KEY, RED, files, gated_run, install_stub, part, save, settings, sha
from support.graphs import GraphError, decode, node, sampler


@pytest.fixture
def stub(comfy, monkeypatch):
    return install_stub(comfy, monkeypatch)


def test_unchanged_images_keep_their_attestation_and_changed_ones_carry_it(comfy, stub, run_graph, loras):
    graph = gated_run(action="blur", classes="thing 0.5")
    plain = run_graph(graph | {"save": node("PreviewAny", source=["decode", 1])})["decode"][0].numpy()
    stub.score = lambda image: float(sha(image) == sha(plain[1]))
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
    source = comfy.ledger.images.get(records[1]["gate"]["source_sha256"])
    assert source.base_sha256 == records[1]["base_sha256"]


@pytest.mark.parametrize(("action", "status"), [("replace", "replaced by the gate"), ("empty", "emptied by the gate")])
def test_what_the_gate_puts_in_an_images_place_is_not_called_guarded(action, status, comfy, stub, run_graph, loras):
    stub.score = lambda image: float(image.std() > 0.001)
    graph = gated_run(action=action)
    graph["settings"]["inputs"]["replacement"] = ["grey", 0]
    graph["grey"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x808080)
    graph["save"] = save(["gate", 0], filename_prefix=action)
    graph["beside"] = node(
        "ModularLoraSaveImage", images=["gate", 0], filename_prefix="t", unattested="save and say so"
    )
    run_graph(graph)
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, action)]
    assert [(r["status"], r["gate"]["changed"]) for r in records] == [(status, True)] * 3
    assert comfy.server.texts["beside"].startswith("0 of 3 images attested")


def test_save_attested_image_names_the_gate_too(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["save"] = node(
        "ModularLoraSaveImage", images=["gate", 0], filename_prefix="beside", unattested="save and say so"
    )
    run_graph(graph)
    records = [json.loads(Image.open(f).text[KEY]) for f in files(comfy, "beside")]
    assert [(r["status"], r["gate"]["detector"]) for r in records] == [("guarded", "stub 1")] * 3


def refused(comfy, run_graph, graph: dict, prefix: str, named: str) -> None:
    """The graph's save refuses with these counts, and skips to the same count when it is told to."""
    graph["save"]["inputs"] |= {"filename_prefix": prefix, "unfit": "refuse"}
    with refuses("save.refused", named):
        run_graph(graph)
    assert not files(comfy, prefix)


def test_an_image_that_no_gate_judged_is_not_saved(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["sample"]["inputs"]["seed"] = 40  # no image that an earlier test gated
    graph["save"]["inputs"]["images"] = ["decode", 0]
    refused(comfy, run_graph, graph, "ungated", "3 not gated of 3")


def test_an_image_of_the_unguarded_model_and_an_edited_one_are_not_saved(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["plain"] = sampler(["ckpt", 0])
    graph["decode"] = decode(["plain", 0])
    refused(comfy, run_graph, graph, "unguarded", "3 unattested of 3")
    graph = gated_run()
    graph["edit"] = node("ImageInvert", image=["gate", 0])
    graph["save"]["inputs"]["images"] = ["edit", 0]
    refused(comfy, run_graph, graph, "gate_edited", "3 unattested of 3")


def test_images_that_are_flagged_and_only_reported_need_an_explicit_yes(comfy, stub, run_graph, loras):
    stub.score = lambda image: 1.0
    graph = gated_run(action="report")
    refused(comfy, run_graph, graph, "flagged", "3 flagged and left as they are of 3")
    graph["save"]["inputs"]["save_flagged"] = True
    run_graph(graph)
    assert len(files(comfy, "flagged")) == 3


def test_a_stricter_gate_takes_back_what_a_gentler_one_passed(comfy, stub, run_graph, loras):
    graph = gated_run(threshold=0.9)
    stub.score = lambda image: 0.7
    graph["strict"] = settings(threshold=0.5, action="blur")
    graph["second"] = node("ModularLoraGate", images=["gate", 0], gate=["strict", 0])
    graph["both"] = node("ImageBatch", image1=["second", 0], image2=["gate", 0])
    graph["save"] = save(["both", 0], filename_prefix="back", unfit="skip and say so")
    run_graph(graph)
    assert len(files(comfy, "back")) == 3
    assert comfy.server.texts["save"].startswith("3 of 6 images saved")
    assert "left out: 3 flagged and left as they are" in comfy.server.texts["save"]


def test_the_others_are_saved_where_unfit_images_are_to_be_skipped(comfy, stub, run_graph, loras):
    graph = gated_run()
    graph["red"] = node("EmptyImage", width=64, height=64, batch_size=1, color=RED)
    graph["both"] = node("ImageBatch", image1=["gate", 0], image2=["red", 0])
    graph["save"] = save(["both", 0], filename_prefix="skip", unfit="skip and say so")
    run_graph(graph)
    assert len(files(comfy, "skip")) == 3
    assert comfy.server.texts["save"] == "3 of 4 images saved, attested and gated; left out: 1 unattested"
    graph["save"]["inputs"]["images"] = ["red", 0]
    run_graph(graph)
    assert comfy.server.texts["save"].startswith("0 of 1 images saved")


@pytest.mark.parametrize(("format", "ending"), [("jpeg", "jpg"), ("webp", "webp")])
def test_formats_without_text_carry_the_record_and_have_the_graph_beside_them(
    format, ending, comfy, stub, run_graph, loras
):
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": f"beside_{ending}", "format": format}
    run_graph(graph)
    written = files(comfy, f"beside_{ending}")
    assert [f.suffix for f in written] == [".jpg", ".json"] * 3 if ending == "jpg" else [".json", ".webp"] * 3
    for image in (f for f in written if f.suffix == f".{ending}"):
        beside = json.loads(image.with_suffix(".json").read_text(encoding="utf-8"))
        with Image.open(image) as opened:
            assert opened.size == (64, 64)
            packet = opened.info["xmp"]
        record = json.loads(marking.attestation_in(packet))
        assert (record["status"], record["gate"]["detector"]) == ("guarded", "stub 1")
        assert record[marking.SOURCE_TYPE] == marking.TRAINED
        assert marking.TRAINED.encode() in packet
        assert set(beside) == {"file", "prompt"}
        assert beside["prompt"]["save"]["class_type"] == "ModularLoraSaveGated"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_where_metadata_are_off_the_record_stays_and_the_graph_does_not(
    format, comfy, stub, run_graph, loras, monkeypatch
):
    monkeypatch.setattr(part(comfy, "comfy_host.saving").args, "disable_metadata", True)
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": f"bare_{format}", "format": format}
    run_graph(graph)
    written = files(comfy, f"bare_{format}")
    assert len(written) == 3
    for image in written:
        assert b"modular_lora_attestation" in image.read_bytes() or b"guard:attestation" in image.read_bytes()
        assert b"class_type" not in image.read_bytes()


def test_an_image_is_not_left_without_its_record(comfy, stub, run_graph, loras, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(part(comfy, "comfy_host.saving").plain_json, "dumps", full)
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": "half", "format": "jpeg"}
    with pytest.raises(GraphError, match="no space left"):
        run_graph(graph)
    assert not files(comfy, "half")
