"""What the gate does about what a detector finds; the detector says what a test tells it to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modular_lora_guard.gate import detectors, nudenet
from modular_lora_guard.gate.class_lines import with_classes, with_threshold
from modular_lora_guard.gate.finding import Box, Finding
from modular_lora_guard.gate.gate import Second, run
from modular_lora_guard.gate.report import format_gate, to_json
from modular_lora_guard.gate.settings import ACTIONS, ACTIVITIES, GROWTH, Settings, defaults, load, save
from modular_lora_guard.modular_lora.errors import GuardError
from support.errors import refuses
from support.portraits import floats, portrait
from support.told_detector import Told

CHANGING = [action for action in ACTIONS if action not in ("report", "block")]
LOCAL = ["blur", "pixelate", "box", "ellipse"]


def boxed(*boxes: Box) -> Finding:
    return Finding({label: max((b.score for b in boxes if b.label == label), default=0.0) for label in "ab"}, boxes)


NOTHING = boxed()
FOUND = boxed(Box("a", 0.9, 10, 12, 20, 16), Box("b", 0.8, 50, 50, 8, 8))


def images(n: int = 3, height: int = 64, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).random((n, height, width, 3), np.float32)


def gate(action: str, *findings: Finding, growth: float = 1.0, shown: np.ndarray | None = None, **more):
    shown = images(len(findings)) if shown is None else shown
    replacement = np.full((8, 8, 3), 0.5, np.float32) if action == "replace" else None
    chosen = Settings({"a": 0.5}, {"b": 0.3}, {"a": growth}, action, **more)
    return shown, run(shown, Told(list(findings)), chosen, replacement)


@pytest.mark.parametrize("action", CHANGING)
def test_one_flagged_image_is_acted_on_and_the_others_stay_bit_for_bit(action: str) -> None:
    shown, outcome = gate(action, NOTHING, FOUND, NOTHING)
    before = shown.copy()
    assert outcome.flags == outcome.changed == (False, True, False)
    assert outcome.blocked == ((), ("a",), ())
    assert outcome.reported == ((), ("b",), ())
    assert outcome.images.dtype == np.float32
    assert np.array_equal(outcome.images[[0, 2]], shown[[0, 2]])
    assert not np.array_equal(outcome.images[1], shown[1])
    assert np.array_equal(shown, before), "the images that came in are not written to"
    assert not outcome.masks[[0, 2]].any()
    assert outcome.masks[1].any()


@pytest.mark.parametrize("action", LOCAL)
def test_local_actions_change_all_of_the_box_and_nothing_outside_the_mask(action: str) -> None:
    shown, outcome = gate(action, FOUND)
    differs = (outcome.images[0] != shown[0]).any(-1)
    assert differs[12:28, 10:30].mean() > 0.99
    assert not differs[outcome.masks[0] == 0].any()
    assert outcome.masks[0, 12:28, 10:30].all()
    assert not outcome.masks[0, 50:58, 50:58].any(), "what is reported alone is not masked"


@pytest.mark.parametrize("action", ["box", "ellipse"])
def test_solid_shapes_are_black(action: str) -> None:
    _, outcome = gate(action, FOUND)
    assert not outcome.images[0][outcome.masks[0] > 0].any()


def test_report_changes_nothing_and_still_flags_and_masks() -> None:
    shown, outcome = gate("report", FOUND, NOTHING)
    assert outcome.images is shown
    assert outcome.flags == (True, False)
    assert outcome.changed == (False, False)
    assert outcome.masks[0].any()


def test_block_raises_with_count_label_and_score_and_lets_clean_batches_through() -> None:
    with refuses("gate.blocked", "2 of 3", "told 1.0", "image 2: a 0.90 ≥ 0.5") as caught:
        gate("block", NOTHING, FOUND, FOUND)
    assert isinstance(caught.value, GuardError)
    shown, outcome = gate("block", NOTHING, NOTHING)
    assert outcome.images is shown


def test_empty_puts_a_black_image_in_its_place_so_that_the_order_stays() -> None:
    shown, outcome = gate("empty", NOTHING, FOUND, NOTHING)
    assert outcome.images.shape == shown.shape
    assert not outcome.images[1].any()


def test_replace_puts_the_whole_given_image_in_without_stretching_it() -> None:
    shown = images(1, 64, 128)
    given_image = np.zeros((32, 32, 3), np.float32)
    given_image[..., 0] = 1
    outcome = run(shown, Told([FOUND]), Settings({"a": 0.5}, action="replace"), given_image)
    assert np.array_equal(outcome.images[0, :, 32:96], np.broadcast_to([1, 0, 0], (64, 64, 3)))
    assert not outcome.images[0, :, :31].any()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (None, "gate.no-replacement"),
        (np.zeros((2, 8, 8, 3)), "gate.replacement"),
        (np.zeros((8, 8, 4)), "gate.replacement"),
        (np.full((8, 8, 3), np.nan), "gate.replacement"),
    ],
)
def test_replace_without_a_usable_image_is_refused_before_anything_is_judged(bad, code) -> None:
    with refuses(code):
        run(images(1), Told([NOTHING]), Settings({"a": 0.5}, action="replace"), bad)


@pytest.mark.parametrize("action", CHANGING)
def test_a_detector_without_boxes_acts_on_the_whole_image(action: str) -> None:
    shown = images(2)
    told = Told([Finding({"a": 0.7, "b": 0}), Finding({"a": 0.4, "b": 0})], has_boxes=False)
    outcome = run(shown, told, Settings({"a": 0.5}, action=action), np.full((4, 4, 3), 0.25, np.float32))
    assert outcome.masks[0].all()
    assert (outcome.images[0] != shown[0]).any(-1).mean() > 0.99
    assert np.array_equal(outcome.images[1], shown[1])


def test_a_blocked_label_that_no_box_shows_is_taken_to_be_everywhere() -> None:
    hidden = Finding({"a": 0.6, "b": 0.0}, (Box("a", 0.4, 5, 5, 4, 4),))
    outside = Finding({"a": 0.6, "b": 0.0}, (Box("a", 0.6, 200, 5, 4, 4),))
    for finding in (hidden, outside):
        _, outcome = gate("box", finding)
        assert outcome.masks[0].all()
        assert not outcome.images[0].any()


def test_a_score_that_is_not_a_number_is_no_pass() -> None:
    _, outcome = gate("box", Finding({"a": float("nan"), "b": 0.0}))
    assert outcome.flags == (True,)
    assert not outcome.images[0].any()


def test_boxes_grow_about_their_centre_and_are_clipped_to_the_image() -> None:
    _, outcome = gate("box", boxed(Box("a", 0.9, 30, 20, 20, 10)), growth=2)
    ys, xs = np.nonzero(outcome.masks[0])
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (20, 60, 15, 35)
    _, outcome = gate("box", boxed(Box("a", 0.9, 70, 0, 10, 10)), growth=3)
    ys, xs = np.nonzero(outcome.masks[0])
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (60, 80, 0, 20)


place = st.floats(-30, 110)


@settings(max_examples=80, deadline=None)
@given(
    boxes=st.lists(st.tuples(place, place, st.floats(1.5, 60), st.floats(1.5, 60)), min_size=1, max_size=4),
    growth=st.floats(1, 3),
    action=st.sampled_from(LOCAL),
)
def test_masks_cover_every_box_and_nothing_changes_outside(boxes: list, growth: float, action: str) -> None:
    shown, outcome = gate(action, boxed(*(Box("a", 0.9, *box) for box in boxes)), growth=growth)
    for x, y, width, height in boxes:
        x0, x1 = (max(0, min(80, int(v))) for v in (x, x + width))
        y0, y1 = (max(0, min(64, int(v))) for v in (y, y + height))
        assert outcome.masks[0, y0:y1, x0:x1].all()
    outside = outcome.masks[0] == 0
    assert np.array_equal(outcome.images[0][outside], shown[0][outside])


@pytest.mark.parametrize("action", ["blur", "pixelate"])
def test_what_is_finer_than_the_cells_is_gone_and_not_hidden(action: str) -> None:
    """Two images that differ inside the cells alone come out the same: nothing can tell them apart again."""
    smooth = np.full((1, 60, 60, 3), 128 / 255, np.float32)
    board = (np.indices((60, 60)).sum(0) % 2 * 2 - 1).astype(np.float32)
    checks = smooth + board[None, ..., None] * np.float32(100 / 255)
    everywhere = boxed(Box("a", 0.9, 0, 0, 60, 60))
    outputs = [gate(action, everywhere, shown=shown)[1].images for shown in (smooth, checks)]
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("action", ["blur", "pixelate"])
def test_strength_follows_the_size_of_the_box(action: str) -> None:
    """The larger the box, the coarser what is left: its fine detail has no energy, whatever its size in pixels."""
    for side in (16, 64, 256):
        shown = np.random.default_rng(side).random((1, side, side, 3), np.float32)
        _, outcome = gate(action, boxed(Box("a", 0.9, 0, 0, side, side)), shown=shown)
        fine = [np.abs(np.fft.fft2(p[0, ..., 0]))[8:-7, 8:-7] for p in (shown, outcome.images)]
        assert (fine[1] ** 2).mean() < 0.02 * (fine[0] ** 2).mean()


@pytest.mark.parametrize("side", [2, 3, 5, 9])
@pytest.mark.parametrize("action", ["blur", "pixelate"])
def test_small_boxes_lose_their_detail_too(action: str, side: int) -> None:
    shown, outcome = gate(action, boxed(Box("a", 0.9, 4, 4, side, side)))
    before, after = (p[0, 4 : 4 + side, 4 : 4 + side].std((0, 1)) for p in (shown, outcome.images))
    assert (after < 0.6 * before).all()


@pytest.mark.skipif(nudenet.weights() is None, reason="nudenet (AGPL-3.0) is not installed")
@pytest.mark.parametrize("action", CHANGING)
def test_after_the_action_the_detector_sees_nothing_there(action: str) -> None:
    judge = detectors.make("nudenet 320n", threads=1)
    shown = floats(portrait(3), portrait(8))
    chosen = Settings({"FACE_FEMALE": 0.45}, growth={"FACE_FEMALE": GROWTH}, action=action)
    outcome = run(shown, judge, chosen, np.zeros((8, 8, 3), np.float32))
    assert outcome.flags == (True, True)
    assert not any(run(outcome.images, judge, chosen, np.zeros((8, 8, 3), np.float32)).flags)
    assert max(f.scores["FACE_FEMALE"] for f in judge.detect(outcome.images)) < 0.3


def test_an_empty_batch_goes_through() -> None:
    shown, outcome = gate("blur", shown=images(0))
    assert outcome.images is shown
    assert outcome.masks.shape == (0, 64, 80)
    assert outcome.flags == ()


def test_a_detector_that_judges_too_few_is_refused() -> None:
    with refuses("gate.findings", "1 ", "3 "):
        run(images(3), Told([NOTHING]), Settings({"a": 0.5}))


@pytest.mark.parametrize(("block", "code"), [({}, "gate.nothing-blocked"), ({"z": 0.5}, "gate.unknown-label")])
def test_settings_that_do_not_fit_the_detector_are_refused(block: dict, code: str) -> None:
    with refuses(code):
        run(images(1), Told([NOTHING]), Settings(block))


def test_the_report_counts_and_names_detector_thresholds_and_what_is_not_covered() -> None:
    _, outcome = gate("pixelate", NOTHING, FOUND, FOUND)
    said = format_gate(outcome, Told([]), Settings({"a": 0.5}, {"b": 0.3}, action="pixelate"))
    for part in (
        "2 of 3 images flagged, pixelated; 1 passed",
        "blocked: a ≥ 0.5 in 2 images",
        "reported: b ≥ 0.3 in 2 images",
        "detector told 1.0, sha256 0000000000000000, none, on CPUExecutionProvider",
        "covers: a and b",
        "does not cover: c",
        "note: execution provider XExecutionProvider is unavailable",
    ):
        assert part in said
    assert "whole image" not in said
    _, clean = gate("blur", NOTHING)
    assert "0 of 1 images flagged; 1 passed" in format_gate(clean, Told([], False), Settings({"a": 0.5}))
    assert "whole image" in format_gate(clean, Told([], False), Settings({"a": 0.5}))


def test_the_json_holds_scores_and_boxes_of_every_image() -> None:
    chosen = Settings({"a": 0.5}, {"b": 0.3}, {"a": 1.5}, "box")
    outcome = run(images(2), Told([NOTHING, FOUND]), chosen)
    said = json.loads(to_json(outcome, Told([]), chosen))
    assert said["settings"] == {
        "block": {"a": 0.5},
        "report": {"b": 0.3},
        "growth": {"a": 1.5},
        "action": "box",
        "cells": 6,
        "review": {},
        "activity": "ignore",
    }
    assert said["detector"]["name"] == "told 1.0"
    assert [p["flagged"] for p in said["pictures"]] == [False, True]
    assert said["pictures"][1]["scores"] == {"a": 0.9, "b": 0.8}
    assert said["pictures"][1]["boxes"][0] == {
        "label": "a", "score": 0.9, "x": 10, "y": 12, "width": 20, "height": 16,
    }  # fmt: skip


def test_a_preset_comes_back_as_it_was_written(tmp_path: Path) -> None:
    chosen = Settings({"a": 0.45, "b": 0.6}, {"b": 0.2}, {"a": 1.3}, "ellipse", 4)
    save(chosen, tmp_path / "new" / "strict.json")
    assert load(tmp_path / "new" / "strict.json", Told([])) == chosen
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["strict.json"]


def test_a_preset_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Settings({"a": 0.4})
    save(old, tmp_path / "p.json")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with refuses("gate.not-written", "p.json", "No space left"):
        save(Settings({"a": 0.9}), tmp_path / "p.json")
    monkeypatch.undo()
    assert load(tmp_path / "p.json", Told([])) == old
    assert len(list(tmp_path.iterdir())) == 1


WRONG = "gate.wrong-value"


@pytest.mark.parametrize(
    ("said", "code", "named"),
    [
        ({"block": {"c": 0.5}}, "gate.unknown-label", ("block", "told 1.0", "'c'", "a, b")),
        ({"block": {"a": 0.5}, "growth": {"c": 2}}, "gate.unknown-label", ("growth", "told 1.0", "'c'")),
        ({"block": {"a": 0.5}, "action": "censor"}, WRONG, ("action", "'report', 'blur'", "'censor'")),
        ({"block": {"a": 0.5}, "actions": "blur"}, "gate.unknown-key", ("actions", "action?")),
        ({"report": {"a": 0.5}}, "gate.missing-key", ("block",)),
        ({"block": {}}, "gate.nothing-blocked", ("block", "told 1.0")),
        ({"block": ["a"]}, WRONG, ("block", "['a']")),
        ({"block": {"a": 0}}, WRONG, ("block.a", "0")),
        ({"block": {"a": 1.5}}, WRONG, ("block.a", "1.5")),
        ({"block": {"a": "0.5"}}, WRONG, ("block.a", "'0.5'")),
        ({"block": {"a": True}}, WRONG, ("block.a", "True")),
        ({"block": {"a": 0.5}, "growth": {"a": 0}}, WRONG, ("growth.a", "0")),
        ({"block": {"a": 0.5}, "cells": 0}, WRONG, ("cells", "0")),
        ({"block": {"a": 0.5}, "cells": 2.5}, WRONG, ("cells", "2.5")),
        ({"block": {"a": 0.5}, "cells": True}, WRONG, ("cells", "True")),
        ({"block": {"a": 0.5}, "self": 1}, "gate.unknown-key", ("self", "block, report, growth")),
        ({"block": {"a": 0.5}, "action": ["blur"]}, WRONG, ("action", "['blur']")),
        ([], "gate.unreadable", ("block",)),
        ("{", "gate.unreadable", ()),
        ('{"block": {"a": NaN}}', WRONG, ("block.a", "nan")),
        (f'{{"block": {{"a": 1{"0" * 400}}}}}', WRONG, ("block.a", "1000")),
    ],
)
def test_a_wrong_preset_is_refused_by_name(tmp_path: Path, said: object, code: str, named: tuple[str, ...]) -> None:
    path = tmp_path / "p.json"
    path.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    with refuses(code, "p.json", *named):
        load(path, Told([]))


def test_whole_numbers_stay_whole_so_that_the_hash_of_a_preset_stays(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"block": {"a": 1}, "growth": {"a": 2}}', encoding="utf-8")
    said = json.dumps(asdict(load(path, Told([]))))
    numbers = '"block": {"a": 1}, "report": {}, "growth": {"a": 2}, "action": "blur", "cells": 6'
    assert said == f'{{{numbers}, "review": {{}}, "activity": "ignore"}}'


texts = st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc") | texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["block", "report", "growth", "action", "cells"]), value=values)
def test_any_preset_is_loaded_or_refused_in_one_line(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"block": {"a": 0.5}, key: value}), encoding="utf-8")
    try:
        said = f"p.json: {load(path, Told([]))}"
    except GuardError as error:
        said = str(error)
    assert said.startswith("p.json: ")
    assert len(said.splitlines()) == 1


def test_defaults_are_the_detectors_sets_and_boxes_grow_a_fifth() -> None:
    assert defaults(Told([])) == Settings({"a": 0.5}, {"b": 0.3}, {"a": GROWTH})
    assert defaults(Told([], has_boxes=False)).growth == {}
    judge = detectors.make("open-nsfw", threads=1)
    assert defaults(judge, "empty") == Settings({"nsfw": 0.5}, {"nsfw": 0.2}, action="empty")


@pytest.mark.skipif(nudenet.weights() is None, reason="nudenet (AGPL-3.0) is not installed")
def test_nudenets_defaults_block_the_five_exposed_parts_and_report_the_rest() -> None:
    chosen = defaults(detectors.make("nudenet 320n", threads=1))
    assert set(chosen.block) == {
        "FEMALE_BREAST_EXPOSED",
        "BUTTOCKS_EXPOSED",
        "ANUS_EXPOSED",
        "FEMALE_GENITALIA_EXPOSED",
        "MALE_GENITALIA_EXPOSED",
    }
    assert set(chosen.block.values()) == {0.45}
    assert set(chosen.report) == set(nudenet.LABELS) - set(chosen.block)


def scored(a: float, b: float = 0.0) -> Finding:
    return Finding({"a": a, "b": b})


REVIEWED = Settings({"a": 0.8}, {}, {}, "blur", review={"a": 0.2, "b": 0.6})


@given(st.floats(0, 1), st.floats(0, 1))
def test_an_image_is_blocked_or_for_a_person_or_passes(a: float, b: float) -> None:
    shown = images(1)
    outcome = run(shown, Told([scored(a, b)], has_boxes=False), REVIEWED)
    wanted = "block" if a >= 0.8 else "review" if a >= 0.2 or b >= 0.6 else "pass"
    assert outcome.answers == (wanted,)
    assert outcome.flags == outcome.changed == (wanted != "pass",)
    acted = (*(["a"] if a >= 0.2 else []), *(["b"] if b >= 0.6 else []))
    assert sorted(outcome.blocked[0]) == sorted(acted)


@given(st.lists(st.tuples(*(st.sampled_from([0.1, 0.5, 0.9]),) * 2), min_size=1, max_size=5))
def test_the_milder_of_two_detectors_holds_and_the_second_sees_only_what_the_first_flags(
    scores: list[tuple[float, float]],
) -> None:
    shown = images(len(scores))
    asked: list[np.ndarray] = []

    class Asked(Told):
        def detect(self, images: np.ndarray) -> list[Finding]:
            asked.append(images)
            return self.findings

    order = {0.1: "pass", 0.5: "review", 0.9: "block"}
    hits = [i for i, (first, _) in enumerate(scores) if first > 0.1]
    second = Second(Asked([scored(scores[i][1]) for i in hits], has_boxes=False), REVIEWED)
    outcome = run(shown, Told([scored(first) for first, _ in scores], has_boxes=False), REVIEWED, second=second)
    assert outcome.answers == tuple(order[min(pair)] for pair in scores)
    assert outcome.flags == tuple(min(pair) > 0.1 for pair in scores)
    assert outcome.overruled == tuple(("a",) * (first > 0.1 and other == 0.1) for first, other in scores)
    for i, flag in enumerate(outcome.flags):
        assert np.array_equal(outcome.images[i], shown[i]) is not flag
    assert [len(some) for some in asked] == [len(hits)] * bool(hits)
    for some in asked:
        assert np.array_equal(some, shown[hits])


def test_the_report_says_what_a_second_detector_did_not_confirm_and_what_a_person_decides() -> None:
    first, second = Told([scored(0.9), scored(0.5), scored(0.9)]), Told([scored(0.1), scored(0.9), scored(0.9)])
    confirming = Second(second, REVIEWED)
    outcome = run(images(3), first, REVIEWED, second=confirming)
    assert outcome.answers == ("pass", "review", "block")
    said = format_gate(outcome, first, REVIEWED, confirming)
    assert said.splitlines()[0] == (
        "2 of 3 images flagged, blurred; 1 passed; 1 of those flagged for a person to decide; "
        "1 passed as the second detector did not confirm the first"
    )
    assert "must be confirmed by" in said
    answers = [
        (one["answer"], one["not_confirmed"]) for one in json.loads(to_json(outcome, first, REVIEWED))["pictures"]
    ]
    assert answers == [("pass", ["a"]), ("review", []), ("block", [])]


def test_a_label_for_a_person_is_written_as_a_line_and_must_lie_below_its_block() -> None:
    detector = Told([])
    chosen = with_classes(Settings({"a": 0.8}), detector, "a review 0.2\nb review 0.6")
    assert (chosen.block, chosen.review) == ({"a": 0.8}, {"a": 0.2, "b": 0.6})
    chosen.check(detector)
    assert with_threshold(chosen, 0.4).review == {}
    with refuses("gate.review-threshold", "a", "0.8"):
        Settings({"a": 0.8}, review={"a": 0.8}).check(detector)
    with refuses("gate.class-line", "a review"):
        with_classes(chosen, detector, "a review")


SAYS = ("concept", "kept", "undecided", "")


@given(st.sampled_from(SAYS), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(ACTIVITIES))
def test_a_prompt_about_the_concept_raises_the_answer_and_nothing_else_does(
    said: str, score: float, activity: str
) -> None:
    shown, box = images(1), Box("a", score, 10, 12, 20, 16)
    chosen = dataclasses.replace(REVIEWED, activity=activity, action="box")
    outcome = run(shown, Told([Finding({"a": score, "b": 0.0}, (box,))]), chosen, prompts=[said])
    alone = {0.1: "pass", 0.5: "review", 0.9: "block"}[score]
    least = activity if said == "concept" and activity != "ignore" else "pass"
    assert outcome.answers == (max(alone, least, key=("pass", "review", "block").index),)
    assert outcome.flags == outcome.changed == (outcome.answers[0] != "pass",)
    share = 1.0 if least != "pass" else 20 * 16 / (64 * 80) if score > 0.1 else 0.0
    assert outcome.masks[0].mean() == pytest.approx(share)
    black = (outcome.images[0] == 0).all(-1)
    assert np.array_equal(black, outcome.masks[0] == 1)


def test_a_second_detector_has_no_say_about_a_prompt() -> None:
    chosen, second = dataclasses.replace(REVIEWED, activity="review"), Second(Told([scored(0.1)]), REVIEWED)
    outcome = run(images(2), Told([scored(0.9), scored(0.1)]), chosen, second=second, prompts=["concept", "kept"])
    assert outcome.answers == ("review", "pass")
    assert outcome.overruled == (("a",), ())


def test_the_report_and_the_json_count_prompts_and_those_of_which_nothing_is_known() -> None:
    told, chosen = Told([scored(0.1), scored(0.1), scored(0.9)]), dataclasses.replace(REVIEWED, activity="block")
    outcome = run(images(3), told, chosen, prompts=["concept", "", "concept"])
    said = format_gate(outcome, told, chosen)
    assert "2 of 3 images flagged" in said
    assert "about the safety LoRA's concept in 2 images" in said
    assert "no verdict of the safety LoRA on 1 images" in said
    assert [one["prompt"] for one in json.loads(to_json(outcome, told, chosen))["pictures"]] == [
        "concept",
        "",
        "concept",
    ]
    with refuses("gate.blocked", "2 of 3", "image 1", "its prompt"):
        run(images(3), told, dataclasses.replace(chosen, action="block"), prompts=["concept", "", "concept"])
    quiet = run(images(3), told, REVIEWED, prompts=["concept", "", "concept"])
    assert quiet.answers == ("pass", "pass", "block")
    assert "prompt" not in format_gate(quiet, told, REVIEWED) + to_json(quiet, told, REVIEWED)
