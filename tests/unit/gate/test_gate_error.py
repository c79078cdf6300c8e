"""The gate's own error on two folders of images that a person has sorted."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.gate import detectors, labelled
from modular_lora_guard.gate.finding import Finding
from modular_lora_guard.gate.settings import Settings
from modular_lora_guard.gate.statistics import wilson
from PIL import Image
from scipy.stats import binomtest
from support.brightness import Brightness
from support.errors import refuses

ASSETS = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets"


def plain(path: Path, red: int, green: int = 0, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, green, 0)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four that should be flagged, one of them dark; five that should pass, two of them light; sizes differ."""
    bad, good = tmp_path / "flagged", tmp_path / "clean"
    for i, red in enumerate((255, 204, 153, 51)):
        plain(bad / f"{i}.png", red, size=(8 + i, 6))
    for i, red in enumerate((0, 26, 102, 153, 255)):
        plain(good / "sub" / f"{i}.png", red)
    return bad, good


def test_both_rates_and_their_intervals_are_counted(folders) -> None:
    error = labelled.measure(*folders, Brightness(), Settings({"red": 0.5}))
    assert (error.missed.k, error.missed.n) == (1, 4)
    assert (error.false_alarms.k, error.false_alarms.n) == (2, 5)
    assert (error.missed.low, error.missed.high) == wilson(1, 4)
    assert error.unreadable == ()


def test_the_curve_runs_from_flagging_all_to_flagging_none_and_meets_the_settings(folders) -> None:
    error = labelled.measure(*folders, Brightness(), Settings({"red": 0.5}))
    first, *_, last = error.curve
    assert (first.threshold, first.missed.k, first.false_alarms.k) == (0, 0, 5)
    assert (last.threshold, last.missed.k, last.false_alarms.k) == (1, 3, 1)
    for one, other in zip(error.curve, error.curve[1:], strict=False):
        assert one.threshold < other.threshold
        assert one.missed.k <= other.missed.k
        assert one.false_alarms.k >= other.false_alarms.k
    at = next(point for point in error.curve if point.threshold == 0.5)
    assert (at.missed, at.false_alarms) == (error.missed, error.false_alarms)


def test_thresholds_of_several_labels_each_count(folders) -> None:
    bad, good = folders
    plain(bad / "green.png", 0, 128)
    error = labelled.measure(bad, good, Brightness(), Settings({"red": 0.5, "green": 0.4}))
    assert (error.missed.k, error.missed.n) == (1, 5)
    strict = labelled.measure(bad, good, Brightness(), Settings({"red": 0.5, "green": 0.6}))
    assert (strict.missed.k, strict.missed.n) == (2, 5)


def test_files_that_cannot_be_read_are_named_and_count_nowhere(folders) -> None:
    bad, good = folders
    (bad / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    Image.effect_noise((64, 64), 50).save(good / "sub" / "cut.png")
    (good / "sub" / "cut.png").write_bytes((good / "sub" / "cut.png").read_bytes()[:500])
    (bad / "notes.txt").write_text("no image")
    error = labelled.measure(bad, good, Brightness(), Settings({"red": 0.5}))
    assert error.unreadable == ("flagged/broken.png", "clean/sub/cut.png")
    assert (error.missed.n, error.false_alarms.n) == (4, 5)
    assert error.others == ("flagged/notes.txt",)
    said = labelled.format_error(error)
    assert "2 files cannot be read and count nowhere: flagged/broken.png; clean/sub/cut.png" in said
    assert re.search(r"1 files are not .png, .* count nowhere: .*: flagged/notes.txt", said)


def test_images_are_seen_the_way_up_that_their_file_says(tmp_path: Path) -> None:
    seen = []

    class Watching(Brightness):
        def detect(self, images: np.ndarray) -> list[Finding]:
            seen.append(images.shape[1:3])
            return super().detect(images)

    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: rotate by 90 degrees
    for name in ("flagged", "clean"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / name / "x.jpg", exif=turned)
    labelled.measure(tmp_path / "flagged", tmp_path / "clean", Watching(), Settings({"red": 0.5}))
    assert seen == [(8, 6), (8, 6)]


def test_missing_empty_and_equal_folders_are_refused(folders, tmp_path: Path) -> None:
    bad, good = folders
    (tmp_path / "empty").mkdir()
    for pair, code, named in (
        ((bad, tmp_path / "nowhere"), "gate.no-folder", "nowhere"),
        ((tmp_path / "empty", good), "gate.no-images", "empty"),
        ((bad, bad / "." / ""), "gate.same-folder", "flagged"),
    ):
        with refuses(code, named):
            labelled.measure(*pair, Brightness(), Settings({"red": 0.5}))
    with refuses("gate.unknown-label", "brightness", "'blue'"):
        labelled.measure(bad, good, Brightness(), Settings({"blue": 0.5}))


def test_report_and_json_name_detector_thresholds_and_counts(folders, tmp_path: Path) -> None:
    error = labelled.measure(*folders, Brightness(), Settings({"red": 0.5}))
    said = labelled.format_error(error)
    assert "missed 25.0% [4.6%, 69.9%] (1 of 4) of the images that should be flagged" in said
    assert "false alarms 40.0%" in said
    assert "at red ≥ 0.5" in said
    assert "detector brightness, sha256 1111111111111111" in said
    labelled.save(error, tmp_path / "out" / "error.json")
    read = json.loads((tmp_path / "out" / "error.json").read_text(encoding="utf-8"))
    assert read["missed"] == {"k": 1, "n": 4, "low": error.missed.low, "high": error.missed.high}
    assert read["detector"]["sha256"] == "1" * 64
    assert read["block"] == {"red": 0.5}
    assert len(read["curve"]) == 101
    assert read["curve"][50]["false_alarms"]["k"] == 2


def test_the_demo_worlds_detector_is_measured_on_real_files(tmp_path: Path) -> None:
    gloss = sorted((ASSETS / "gloss").rglob("*.png"))
    cats, rest = tmp_path / "cats", tmp_path / "rest"
    for folder, files in ((cats, [f for f in gloss if f.stem == "cat-face"]), (rest, gloss[:6])):
        folder.mkdir()
        for file in files:
            if folder is cats or file.stem != "cat-face":
                (folder / file.name).write_bytes(file.read_bytes())
    files = {"weights": ASSETS / "demo_detector.onnx", "labels": ASSETS / "demo_concepts.json"}
    judge = detectors.make("classifier", threads=1, **files)
    error = labelled.measure(cats, rest, judge, Settings({"cat-face": 0.5}))
    assert (error.missed.k, error.false_alarms.k) == (0, 0)
    assert error.missed.n == 1


counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=100, deadline=None)
@given(counts)
def test_wilsons_interval_is_scipys(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= k / n <= high <= 1


def test_wilsons_interval_of_nothing_is_everything_and_impossible_counts_are_refused() -> None:
    assert wilson(0, 0) == (0, 1)
    for k, n in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(k, n)
    assert not math.isnan(wilson(0, 1)[1])
