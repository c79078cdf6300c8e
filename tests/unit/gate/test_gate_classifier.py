"""A user's own classifier: the labels file says what the network wants and what its outputs mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modular_lora_guard.gate import detectors, labels
from modular_lora_guard.modular_lora.errors import GuardError
from support.errors import refuses


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
    """A network whose outputs are known: means of the channels, of images as the labels file prepares them."""

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


def test_large_outputs_and_values_beyond_white_give_scores_all_the_same(toy) -> None:
    assert scores(toy(std=[1e-3] * 3)) == pytest.approx([0, 0, 1])
    judge = toy(activation="none")
    assert judge.detect(COLOUR * 3 - 0.7)[0].scores == judge.detect(np.clip(COLOUR * 3 - 0.7, 0, 1))[0].scores


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
    with refuses("gate.scores-range", "2 to 9"):
        judge.detect(COLOUR)
    with refuses("gate.scores-shape", "2 labels"):
        toy(labels=["a", "b"]).detect(COLOUR)
    with refuses("gate.output-not-finite"):
        toy(std=[1e-38, 1, 1], mean=[-100, 0, 0]).detect(COLOUR)
    with refuses("gate.no-output", "'z'"):
        toy(output="z")
    with refuses("gate.no-embedding"):
        toy().embed(COLOUR)


WRONG = "gate.wrong-value"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"label": ["a"]}, "gate.unknown-key", ("label", "labels?")),
        ({"labels": None}, "gate.missing-key", ("labels",)),
        ({"labels": []}, WRONG, ("labels", "[]")),
        ({"labels": ["a", "a"]}, WRONG, ("labels", "'a', 'a'")),
        ({"labels": ["a", 1]}, WRONG, ("labels[1]", "1")),
        ({"labels": "ab"}, WRONG, ("labels", "'ab'")),
        ({"labels": ["a", ""]}, WRONG, ("labels[1]", "''")),
        ({"groups": {"g": ["z"]}}, WRONG, ("groups.g", "'z'")),
        ({"groups": {"a": ["b"]}}, WRONG, ("labels", "groups", "twice")),
        ({"groups": ["a"]}, WRONG, ("groups", "['a']")),
        ({"block": {"z": 0.5}}, WRONG, ("block", "'z'")),
        ({"block": {"a": 0}}, WRONG, ("block.a", "0")),
        ({"report": {"a": "0.5"}}, WRONG, ("report.a", "'0.5'")),
        ({"size": [4]}, WRONG, ("size", "2", "[4]")),
        ({"size": [4, 4, 4]}, WRONG, ("size", "2", "4, 4, 4")),
        ({"size": [0, 4]}, WRONG, ("size[0]", "0")),
        ({"size": [4, 4.0]}, WRONG, ("size[1]", "4.0")),
        ({"activation": "relu"}, WRONG, ("activation", "'sigmoid' or 'none'", "'relu'")),
        ({"layout": "chw"}, WRONG, ("layout", "'nchw' or 'nhwc'", "'chw'")),
        ({"std": [1, 0, 1]}, WRONG, ("std", "0")),
        ({"mean": [0, 0, True]}, WRONG, ("mean[2]", "True")),
        ({"exclusive": True}, WRONG, ("exclusive", "activation")),
        ({"name": 3}, WRONG, ("name", "3")),
        ({"exclusive": 1}, WRONG, ("exclusive", "1")),
    ],
)
def test_a_wrong_labels_file_is_refused_by_key(
    tmp_path: Path, changes: dict, code: str, named: tuple[str, ...]
) -> None:
    with refuses(code, "labels.json", *named):
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
