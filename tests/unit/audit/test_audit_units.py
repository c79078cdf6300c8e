"""An audit's work units, its folder and its judge: finished work is found again, and only where it is the same work."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.audit.engines import Local
from modular_lora_guard.audit.judge import Judge
from modular_lora_guard.audit.plan import Arm, Item, Origin, Part, Sampling, units
from modular_lora_guard.audit.run import Audit, run_audit
from modular_lora_guard.audit.store import ABANDONED, Store, StoreError
from modular_lora_guard.gate.finding import Finding
from PIL import Image
from support.errors import refuses
from support.fake_pipeline import FakePipeline

ORIGIN = Origin("0" * 64, "cuda NVIDIA H100", "float16")
PART = Part("safety", "loras/safety.safetensors", "1" * 64)
SAFETY, CAT = Arm("safety", (PART,)), Item("a cat", 1, "kept")
SAMPLING = Sampling(width=16, height=8)


class Channels:
    """Red and green, which exclude each other, and blue, which does not."""

    sha256, labels, exclusive = "2" * 64, ("red", "green", "blue"), ("red", "green")

    def __init__(self, name: str = "channels"):
        self.name, self.asked = name, 0

    def detect(self, images):
        self.asked += len(images)
        return [Finding(dict(zip(self.labels, image.mean((0, 1)), strict=True))) for image in images]


class Watch:
    def __init__(self):
        self.stages = []

    def check(self):
        pass

    def stage(self, *said):
        self.stages.append(said)


def key(arm: Arm = SAFETY, item: Item = CAT, sampling: Sampling = SAMPLING, origin: Origin = ORIGIN) -> str:
    (unit,) = units([arm], [item], sampling, origin, 1)
    return unit.key


def audit_of(*prompts: str, **other) -> Audit:
    items = tuple(Item(prompt, seed, "suppressed", prompt) for seed, prompt in enumerate(prompts))
    return Audit(
        (Arm("base"), Arm("task", (replace(PART, role="task"),), 1)), items, SAMPLING, **{"unit_size": 2} | other
    )


@pytest.fixture
def run(tmp_path):
    """Runs an audit in this process in one folder: what came of it, and how many units were drawn for it."""
    log = tmp_path / "log"
    log.touch()

    def run(audit: Audit, judge: Judge | None = None):
        before = len(log.read_text().splitlines())
        judge = judge or Judge(Channels(), {"red": 0.5}, {"blue": 0.5})
        ran = run_audit(audit, Local(FakePipeline(str(log))), judge, tmp_path / "audit", Watch())
        return ran, len(log.read_text().splitlines()) - before

    return run


def png(path: Path, shade: int) -> str:
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return str(path)


def test_a_key_changes_with_all_that_decides_pixels(tmp_path):
    start, mask = png(tmp_path / "start.png", 1), png(tmp_path / "mask.png", 2)
    item = Item("a cat", 1, "kept", start=start, mask=mask)
    changed = [
        key(Arm("safety", (replace(PART, sha256="3" * 64),))),
        key(Arm("safety", (replace(PART, strength=0.5),))),
        key(Arm("safety", (replace(PART, role="task"),))),
        key(Arm("safety", (PART, PART))),
        key(Arm("safety", (PART,), combine="safety first")),
        key(Arm("safety", (PART, replace(PART, strength=2.0)))),
        key(Arm("safety", (replace(PART, strength=2.0), PART))),
        *(key(item=replace(CAT, **{name: value})) for name, value in
          {"prompt": "a dog", "negative": "a dog", "seed": 2, "denoise": 0.5, "start": start}.items()),
        key(item=item),
        *(key(sampling=replace(SAMPLING, **{name: value})) for name, value in
          {"steps": 3, "cfg": 2.0, "sampler": "heun", "scheduler": "karras", "width": 8, "height": 16}.items()),
        *(key(origin=replace(ORIGIN, **{name: "other"})) for name in ("base_sha256", "device", "dtype")),
    ]  # fmt: skip
    assert len({key(), *changed}) == 1 + len(changed)
    before = key(item=item)
    png(tmp_path / "mask.png", 3)
    os.utime(tmp_path / "mask.png", (1, 1))
    assert key(item=item) != before
    whole = [u.key for u in units([Arm("base")], [Item("a", i, "kept") for i in range(4)], SAMPLING, ORIGIN, 2)]
    halved = [u.key for u in units([Arm("base")], [Item("a", i, "kept") for i in range(4)], SAMPLING, ORIGIN, 1)]
    assert not set(whole) & set(halved)


def test_a_key_stays_where_only_names_and_places_change(tmp_path):
    here, there = png(tmp_path / "here.png", 1), png(tmp_path / "there.png", 1)
    assert key(Arm("modular", (replace(PART, path="elsewhere.safetensors", strength=1),), 3)) == key()
    assert key(item=Item("a cat", 1, "suppressed", "cat", "ink", attack="synonym", denoise=1)) == key()
    assert key(sampling=replace(SAMPLING, cfg=7)) == key()
    items = [Item("a", 1, "kept", start=path) for path in (here, there)]
    assert key(item=items[0]) == key(item=items[1])
    with refuses("audit.no-start-image", "gone.png"):
        key(item=Item("a", 1, "kept", start=str(tmp_path / "gone.png")))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 12))
def test_units_cover_the_plan_once_and_in_order(arms, items, size):
    made = [Arm(f"arm{i}") for i in range(arms)]
    asked = [Item("a", i, "kept") for i in range(items)]
    planned = list(units(made, asked, SAMPLING, ORIGIN, size))
    assert [(unit.arm, item) for unit in planned for item in unit.items] == [(a, i) for a in made for i in asked]
    assert max(len(unit.items) for unit in planned) <= size


def test_a_finished_audit_draws_nothing_and_another_threshold_only_judges(run):
    detector = Channels()
    ran, drawn = run(audit_of("a", "b", "c"), Judge(detector, {"red": 0.5}, {}))
    assert (drawn, ran.reused, detector.asked) == (4, 0, 6)
    again, drawn = run(audit_of("a", "b", "c"), Judge(detector, {"red": 0.5}, {}))
    assert (drawn, again.reused, detector.asked) == (0, 4, 6)
    assert list(again) == list(ran)
    strict, drawn = run(audit_of("a", "b", "c"), Judge(detector, {"red": 0.1}, {}))
    assert (drawn, detector.asked) == (0, 12)
    assert all(one.verdict.hit for one in strict)
    assert "units finished before this run: 4 of 4" in strict.lines()


def test_another_audit_in_the_same_folder_reuses_only_the_same_units(run, caplog):
    run(audit_of("a", "b"))
    with caplog.at_level("INFO"):
        ran, drawn = run(audit_of("a", "b", "c"))
    assert (ran.units, ran.reused, drawn) == (4, 2, 2)
    assert "was for another audit, 2 of 4 units fit" in caplog.text
    assert run(audit_of("a", "b", unit_size=1))[1] == 4


def test_other_labels_of_the_same_images_draw_nothing_anew(run):
    run(audit_of("a", "b"))
    audit = audit_of("a", "b")
    audit = replace(audit, items=tuple(replace(item, cell="kept", concept="cat") for item in audit.items))
    ran, drawn = run(audit)
    assert drawn == 0
    assert {one.item.concept for one in ran} == {"cat"}


def test_an_item_that_is_asked_for_twice_is_drawn_once(run):
    item = Item("a", 1, "kept")
    ran, drawn = run(Audit((Arm("base"),), (item, item), SAMPLING, unit_size=1))
    assert (len(ran), drawn) == (2, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_images_are_for_their_owner_alone(run, tmp_path):
    (tmp_path / "audit").mkdir(mode=0o755)  # there before, and not ours to close
    ran, _ = run(audit_of("a"))
    for one in ran:
        assert stat.S_IMODE(one.path.parent.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(Store(tmp_path / "new").folder.stat().st_mode) == 0o700


def test_what_a_killed_process_left_half_written_is_no_unit_and_is_cleared(run, tmp_path):
    folder = tmp_path / "audit" / ".part-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "0000.png").write_bytes(b"half")
    assert run(audit_of("a", "b"))[1] == 2
    assert folder.exists()  # of a process that may be alive
    long_ago = time.time() - 2 * ABANDONED
    os.utime(folder, (long_ago, long_ago))
    run(audit_of("a", "b"))
    assert not folder.exists()
    assert not list((tmp_path / "audit").rglob(".part-*"))


def _overwrite(path: Path):
    Image.new("RGB", (16, 8)).save(path)


@pytest.mark.parametrize(
    ("harm", "code", "named"),
    [
        (lambda path: path.unlink(), "store.damaged", "0001.png"),
        (_overwrite, "store.other-pixels", "0001.png"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "store.damaged", "0001.png"),
        (lambda path: path.with_name("unit.json").unlink(), "store.damaged", "unit.json"),
        (
            lambda path: path.with_name("unit.json").write_text('{"pixels_sha256": []}'),
            "store.other-count",
            "0 images of 2",
        ),
        (lambda path: path.with_name("unit.json").write_text("[]"), "store.damaged", "unit.json"),
    ],
)
def test_a_finished_unit_that_was_changed_is_an_error_that_says_what_to_delete(run, harm, code, named):
    ran, _ = run(audit_of("a", "b"))
    path = ran[1].path
    harm(path)
    with refuses(code, named) as error:
        run(audit_of("a", "b"))
    assert f"delete the folder {path.parent}" in str(error.value)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    again, drawn = run(audit_of("a", "b"))
    assert drawn == 1
    assert list(again) == list(ran)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.builds(lambda j: json.dumps(j).encode(), st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["judge", "verdicts", "found", "hit"]), inner, max_size=3)))))  # fmt: skip
def test_verdicts_that_are_none_are_an_error_or_asked_for_again(tmp_path_factory, raw):
    store = Store(tmp_path_factory.mktemp("audit"))
    (unit,) = units([Arm("base")], [Item("a", 1, "kept")], SAMPLING, ORIGIN, 1)
    store.put(unit, np.zeros((1, 8, 16, 3), np.uint8))
    (store.place(unit) / f"verdicts-{'4' * 12}.json").write_bytes(raw)
    try:
        said = store.verdicts(unit, "4" * 64)
    except StoreError as error:
        said = None if "judged again" in str(error) else error
    assert said is None


def test_of_two_processes_that_finish_a_unit_the_first_keeps_its_images(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    (unit,) = units([Arm("base")], [Item("a", 1, "kept")], SAMPLING, ORIGIN, 1)
    first.put(unit, np.full((1, 8, 16, 3), 1, np.uint8))
    second.put(unit, np.full((1, 8, 16, 3), 2, np.uint8))
    assert (first.twice, second.twice) == (0, 1)
    assert (second.images(unit) == 1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["base-0"]


@pytest.mark.parametrize("shape", [(1, 8, 16), (2, 8, 16, 3), (1, 8, 16, 4)])
def test_a_pipeline_that_gives_something_else_is_refused(tmp_path, shape):
    (unit,) = units([Arm("base")], [Item("a", 1, "kept")], SAMPLING, ORIGIN, 1)
    with refuses("audit.sampler-output"):
        Store(tmp_path).put(unit, np.zeros(shape, np.uint8))
    with refuses("audit.sampler-output"):
        Store(tmp_path).put(unit, np.zeros((1, 8, 16, 3), np.float32))


def test_an_arm_cannot_be_named_out_of_the_folder(run, tmp_path):
    with refuses("audit.arm-name"):
        run(Audit((Arm("../base"),), (Item("a", 1, "kept"),), SAMPLING))


def test_audits_that_make_no_sense_are_refused():
    item = Item("a", 1, "kept")
    with refuses("audit.empty", "1 arms", "0 items"):
        Audit((Arm("base"),), (), SAMPLING)
    with refuses("audit.unit-size", "unit_size"):
        Audit((Arm("base"),), (item,), SAMPLING, 0)
    with refuses("audit.arm-twice", "base-0"):
        Audit((Arm("base"), Arm("base", (PART,))), (item,), SAMPLING)


def test_a_verdict_names_hits_reported_labels_and_the_likeliest_of_those_that_exclude_each_other():
    judge = Judge(Channels(), {"red": 0.4, "green": 0.9}, {"blue": 1.0, "red": 0.4}, Channels("style"))
    image = np.zeros((2, 4, 4, 3), np.uint8)
    image[0] = [102, 204, 255]
    shown, dark = judge.judge(image)
    assert shown.hit
    assert (shown.score, shown.found, shown.top, shown.style) == (
        pytest.approx(0.8), ("red", "blue"), "green", "green")  # fmt: skip
    assert (dark.hit, dark.score, dark.found, dark.top) == (False, 0.0, (), "red")


def test_a_judge_is_known_by_detectors_and_thresholds():
    judge = Judge(Channels(), {"red": 0.5, "green": 1}, {})
    assert Judge(Channels(), {"green": 1.0, "red": 0.5}, {}).identity == judge.identity
    others = [
        Judge(Channels("other"), {"red": 0.5, "green": 1}, {}),
        Judge(Channels(), {"red": 0.5}, {"green": 1}),
        Judge(Channels(), {"red": 0.6, "green": 1}, {}),
        Judge(Channels(), {"red": 0.5, "green": 1}, {}, Channels()),
    ]
    assert len({judge.identity, *(other.identity for other in others)}) == 5


def test_a_judge_without_a_known_label_is_refused():
    with refuses("audit.nothing-blocked"):
        Judge(Channels(), {}, {"red": 0.5})
    with refuses("audit.unknown-label", "knife", "red, green, blue"):
        Judge(Channels(), {"red": 0.5}, {"knife": 0.5})
