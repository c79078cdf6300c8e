"""Calibrations of safety activity: monotone, kept in a file, refused where they tell nothing apart; words."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.acted import Acted
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.modular_lora.provenance.attestation import Activity, Attestation, LoraRecord
from safetensors.torch import save_file
from support.errors import refuses

BASE = "b" * 64
VALUES = st.lists(st.floats(1e-4, 1.0), min_size=4, max_size=16)


def made(found, kept, noises: int = 2, **changes) -> activity.Calibration:
    known = {"base_sha256": BASE, "strength": 1.0, "latent": (4, 8, 8), "seed": 0} | changes
    sides = ([[value] * noises for value in values] for values in (found, kept))
    return activity.calibrate(*known.values(), *sides)


def clear() -> activity.Calibration:
    return made([0.16, 0.18, 0.2, 0.22], [0.05, 0.06, 0.07, 0.08])


def lora(path, **metadata):
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(2, 8), "lora_unet_a.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, path, {"ss_note": "x", **metadata})
    return path


@given(VALUES, VALUES, st.floats(0, 2), st.floats(0, 2))
def test_a_verdict_only_rises_with_the_activity_and_bad_ones_are_refused(found, kept, one, other):
    assume(all(a == b or abs(a - b) > 1e-5 for a in found for b in kept))  # a file keeps six digits
    wins = sum((a > b) + (a == b) / 2 for a in found for b in kept) / len(found) / len(kept)
    if wins < activity.LEAST_AUC:
        with refuses("activity.not-told-apart", f"{wins:.3f}"):
            made(found, kept)
        return
    calibration = made(found, kept)
    assert calibration.auc == pytest.approx(wins, abs=1e-6)
    low, high = calibration.bounds
    assert low <= high
    order = ["kept", "undecided", "concept"]
    assert order.index(calibration.says(min(one, other))) <= order.index(calibration.says(max(one, other)))
    if min(found) > max(kept):
        assert {calibration.says(value) for value in kept} <= {"kept", "undecided"}
        assert calibration.says(max(found)) == "concept"
        assert calibration.says(min(kept)) == "kept"


def test_the_bounds_are_the_quantiles_and_their_mean_where_the_two_overlap():
    found = [0.1 + 0.01 * i for i in range(21)]
    kept = [0.001 * i for i in range(101)]
    apart = made(found, kept[:64], noises=1)
    assert apart.bounds == pytest.approx((0.001 * 0.99 * 63, 0.1 + 0.01 * 0.05 * 20))
    assert apart.says(0.08) == "undecided"
    overlapping = made(found, [*kept[:63], 0.3], noises=1)
    low, high = overlapping.bounds
    assert low == high
    assert overlapping.preserved.at(0.99) > overlapping.concept.at(0.05)
    assert low == pytest.approx((overlapping.preserved.at(0.99) + overlapping.concept.at(0.05)) / 2)
    assert {overlapping.says(low), overlapping.says(low - 1e-9)} == {"concept", "kept"}


def test_too_little_too_much_and_what_is_not_finite_is_refused():
    with refuses("activity.prompts", "3", "concept"):
        made([0.2] * 3, [0.1] * 4)
    with refuses("activity.prompts", "65", "preserved"):
        made([0.2] * 4, [0.1] * 65)
    with refuses("activity.too-few", "4"):
        made([0.2] * 4, [0.1] * 4, noises=1)
    with refuses("activity.not-finite", "preserved"):
        made([0.2] * 4, [0.1] * 3 + [math.nan])


def test_a_copy_holds_it_and_its_tensors_are_the_same_bytes(tmp_path):
    source = read_lora(lora(tmp_path / "s.safetensors"))
    copy = activity.write_copy(source, tmp_path / "t.safetensors", clear())
    assert activity.read(copy) == clear()
    before, after = (path.read_bytes() for path in (source.path, copy.path))
    body = lambda data: data[8 + int.from_bytes(data[:8], "little") :]  # noqa: E731
    assert body(before) == body(after)
    assert copy.sha256 != source.sha256
    assert {**copy.metadata} == {"ss_note": "x", activity.KEY: activity.encode(clear())}
    assert copy.sha256 in activity.format_copy(copy, "t.safetensors")


GOOD = json.loads(activity.encode(clear()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 5000,
        json.dumps(GOOD | {"version": 2}),
        json.dumps(GOOD | {"auc": float("nan")}),
        json.dumps(GOOD | {"auc": 1.5}),
        json.dumps(GOOD | {"strength": True}),
        json.dumps(GOOD | {"latent": "488"}),
        json.dumps(GOOD | {"concept": GOOD["concept"] | {"measured": 1}}),
        json.dumps(GOOD | {"concept": GOOD["concept"] | {"quantiles": [1.0, 0.5]}}),
        json.dumps(GOOD | {"concept": GOOD["concept"] | {"quantiles": GOOD["concept"]["quantiles"][::-1]}}),
        json.dumps({key: value for key, value in GOOD.items() if key != "preserved"}),
        json.dumps(GOOD | {"note": "x" * 5000}),
    ],
)
def test_a_malformed_one_gives_no_verdict_and_stops_nothing(text, tmp_path):
    found = activity.read(read_lora(lora(tmp_path / "s.safetensors", **{activity.KEY: text})))
    assert isinstance(found, str)
    assert "malformed" in found


def test_one_whose_own_auc_is_too_low_gives_no_verdict(tmp_path):
    said = json.dumps(GOOD | {"auc": 0.9})
    assert "0.900" in activity.read(read_lora(lora(tmp_path / "s.safetensors", **{activity.KEY: said})))


def test_a_verdict_is_given_only_where_the_calibration_fits_the_run(tmp_path):
    file = read_lora(lora(tmp_path / "s.safetensors", **{activity.KEY: activity.encode(clear())}))
    acted = {("safety", file.sha256): Acted((1.0, 1.0, 1.0, None), 0.1, (0.2, 0.05, 0.12, None))}

    def judged(level=1.0, strength=1.0, **changes):
        record = (LoraRecord("safety", file.name, file.sha256, strength, strength),)
        known = {"base_sha256": BASE, "base_had_merged_loras": False} | changes
        run = Attestation("guarded", "p", "SD15", loras=record, net_strength={}, **known)
        return activity.of_run(run, [file], acted, level)[file.sha256]

    assert judged() == (Activity(0.2, "concept"), Activity(0.05, "kept"), Activity(0.12, "undecided"), None)
    for changes, why in (
        ({"level": 0.5}, "started later"),
        ({"level": None}, "started later"),
        ({"strength": 0.8}, "strength 1, not 0.8"),
        ({"base_sha256": "c" * 64}, "another base"),
        ({"base_had_merged_loras": True}, "another base"),
    ):
        assert all(one is None or (one.prompt == "" and why in one.why) for one in judged(**changes))
    assert activity.most({"s": judged()}) == {"s": Activity(0.2, "concept")}


def spoken(*each: Activity | None, **more) -> str:
    """What is read of a batch, each image with this activity of one safety LoRA; None: of no guarded run."""
    record = (LoraRecord("safety", "s.safetensors", "s", 1.0, 1.0),)
    run = Attestation("guarded", "p", "SD15", BASE, False, record, {}, **more)
    return activity.in_words([one and run.of(activity={"s": one}) for one in each])


def test_the_words_name_image_and_verdict():
    kept, found = Activity(0.05, "kept"), Activity(0.2, "concept")
    first, second = spoken(kept, found).splitlines()
    assert second == "the safety LoRA acted strongly on image 2: its prompt is about the concept (activity 0.2)"
    assert "image 1: its prompt is not about the concept" in first
    assert spoken(None, None) == activity.in_words([]) == ""
    assert "without a verdict: none" in spoken(Activity(0.1, "", "none"))
    assert "weakly on the image: its prompt" in spoken(kept)


def test_images_that_say_the_same_share_a_line_with_the_range_of_their_activity():
    kept, found = (lambda value: Activity(value, "kept")), Activity(0.2, "concept")
    (line,) = spoken(*map(kept, (0.05, 0.02, 0.03))).splitlines()
    assert line == (
        "the safety LoRA acted weakly on all 3 images: their prompts are not about the concept (activity 0.02 to 0.05)"
    )
    assert spoken(found, found).endswith("on all 2 images: their prompts are about the concept (activity 0.2)")
    weak, strong = spoken(kept(0.05), found, kept(0.05), kept(0.01)).splitlines()
    assert "weakly on images 1, 3 and 4: their prompts are not" in weak
    assert "strongly on image 2: its prompt is" in strong
    assert " on images 2 to 4 and 6: " in spoken(None, *[kept(0.1)] * 3, None, kept(0.1))
    assert " on images 1 and 2: " in spoken(kept(0.1), kept(0.1), None)
    undecided = spoken(Activity(0.11, "undecided"), Activity(0.12, "undecided"))
    assert undecided.endswith("weakly: nothing is said of their prompts (activity 0.11 to 0.12)")
    late, other = spoken(*[Activity(0.1, "", "late")] * 8, Activity(0.1, "", "other")).splitlines()
    assert late == "the safety LoRA acted on images 1 to 8, without a verdict: late (activity 0.1)"
    assert "image 9, without a verdict: other" in other


def test_several_safety_loras_have_a_line_each_and_are_named():
    record = tuple(LoraRecord("safety", name, name, 1.0, 1.0) for name in ("a", "b"))
    run = Attestation("guarded", "p", "SD15", BASE, False, record, {})
    run = run.of(activity={"a": Activity(0.2, "concept"), "b": Activity(0.1, "kept")})
    first, second = activity.in_words([run, run]).splitlines()
    assert first.startswith("the safety LoRA a acted strongly on all 2 images: ")
    assert second.startswith("the safety LoRA b acted weakly on all 2 images: ")


def test_where_the_task_loras_gave_way_is_said_once_for_the_images_in_part_and_once_altogether():
    run = Attestation("guarded", "p", "SD15", BASE, False, (), {})
    words = activity.in_words([run.of(task_share=share) for share in (0.5, 0.0, 0.25, 1.0, 0.0)])
    assert words.splitlines() == [
        "safety first: the task LoRAs act at a share of 0.25 to 0.5 on images 1 and 3",
        "safety first: the task LoRAs do not act on images 2 and 5",
    ]


def test_what_goes_into_files_tells_nothing_of_the_prompt_unless_it_is_asked_for():
    run = Attestation("guarded", "p", "SD15", BASE, False, (), {}, activity={"s": Activity(0.2, "concept")})
    run = run.of(acted_share={"s": 0.2}, others=(run,))
    public = json.dumps(json.loads(run.without_activity().to_json()))
    assert "concept" not in public
    assert "0.2" not in public
    assert json.loads(run.to_json())["activity"] == {"s": {"value": 0.2, "prompt": "concept", "why": ""}}


def image(*prompts: str, **more) -> Attestation:
    """The run of an image with a safety LoRA for each of these verdicts."""
    each = {str(i): Activity(0.1, said, "" if said else "none") for i, said in enumerate(prompts)}
    return Attestation("guarded", "x", "SD15", BASE, False, (), {}, activity=each, **more)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (None, ""),
        (image(), ""),
        (image(""), ""),
        (image("kept"), "kept"),
        (image("", "kept"), "kept"),
        (image("kept", "undecided"), "undecided"),
        (image("kept", "concept"), "concept"),
        (image("kept", others=(image("concept"),)), "concept"),
        (image("kept", others=(image(),)), ""),
        (image("", others=(image("concept"),)), "concept"),
        (image("kept", others=(image("kept"),)), "kept"),
    ],
)
def test_of_an_images_prompt_the_strictest_verdict_counts_and_of_each_run_there_must_be_one(run, said):
    assert activity.of_prompt(run) == said
