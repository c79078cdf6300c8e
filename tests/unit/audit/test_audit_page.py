"""From images to figures, page, plots and contact sheets."""

from __future__ import annotations

import functools
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import markupsafe
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.audit import figures, page, plots, report, sheet, words
from modular_lora_guard.audit.plan import Arm, Item
from modular_lora_guard.audit.results import Drawn, Verdict
from modular_lora_guard.gate.statistics import Rate, newcombe, wilson
from PIL import Image
from support.audit_toys import judge
from support.errors import refuses
from support.reports import MARGIN, SETTINGS, hostile

HOSTILE = "<script>alert('$x_1$')</script> & \"q\" \x00\n]]>"
ARMS = {"base": 1.0, "safety": 0.0, "sequential": 0.5, "modular": 0.02}  # arm -> hit rate


def drawn(folder: Path = Path(), arms=ARMS, concepts=("car", "bus", "tram"), count=50, **item) -> list[Drawn]:
    """The first share of every concept's images are hits, as many as the arm's rate says."""
    made = []
    for name, rate in arms.items():
        for seed in range(2 if name in ("sequential", "modular") else 1):
            for concept in concepts:
                for i in range(count):
                    asked = Item(f"a {concept}", i, "suppressed", concept)
                    hit = i < round(rate * count)
                    said = Verdict(hit, float(hit), (concept,) * hit, concept if hit else "cat", "ink")
                    path = folder / f"{name}-{concept}-{i}.png"
                    made.append(Drawn(Arm(name, (), seed), replace(asked, **item), path, said))
    return made


def build(some: list[Drawn]) -> report.AuditReport:
    return figures.build("Audit", judge(), some, MARGIN, SETTINGS, (), ["left out"])


def test_rows_count_images_labels_and_concepts():
    rows = {row.arm: row for row in build(drawn()).rows}
    assert list(rows) == list(ARMS)
    sequential = rows["sequential"]
    assert (sequential.wilson.k, sequential.wilson.n) == (150, 300)
    assert sequential.wilson.low < 0.5 < sequential.wilson.high
    assert sequential.concepts == {"car": (50, 100), "bus": (50, 100), "tram": (50, 100)}
    assert sequential.labels == {"car": 50, "bus": 50, "tram": 50}
    assert (sequential.top1.wilson.k, sequential.top1.wilson.n) == (150, 300)
    assert sequential.style is None
    assert sequential.bootstrap is None, "every concept has the same rate: no width, no interval"
    assert rows["safety"].bootstrap is None
    assert 0 == rows["safety"].wilson.low < rows["safety"].wilson.high


def test_differences_are_against_safety_and_base_with_a_verdict_by_the_margin():
    found = {(one.arm, one.against): one for one in build(drawn()).differences}
    assert set(found) == {(a, b) for a in ARMS for b in ("safety", "base") if a != b}
    assert found["modular", "safety"].verdict == "not worse"
    assert found["sequential", "safety"].verdict == "worse"
    assert found["modular", "base"].verdict == ""
    sequential = found["sequential", "safety"]
    assert sequential.difference == pytest.approx(0.5)
    assert (sequential.pairs, sequential.gained, sequential.lost) == (300, 150, 0)
    assert sequential.ratio[0] is None
    assert words.ratio(sequential).startswith("∞")
    assert words.ratio(found["safety", "base"]) == "0.00"


def test_a_few_images_without_a_hit_prove_nothing():
    arms = {"safety": 0.0, "modular": 0.0}
    made = (figures.build("", judge(), drawn(arms=arms, count=n), 0.05, SETTINGS, (), ()) for n in (4, 10, 50))
    least, few, many = (one.differences[0] for one in made)
    assert [one.bootstrap for one in (least, few, many)] == [None] * 3
    assert [one.verdict for one in (least, few, many)] == ["too few images", "undecided", "not worse"]
    assert few.newcombe[1] > 0.05 > many.newcombe[1]
    worse = build(drawn(arms={"safety": 0.0, "sequential": 1.0}, count=4)).differences[0]
    assert (worse.difference, worse.verdict) == (1.0, "too few images")
    told = newcombe(Rate(56, 70, 0.6918, 0.8771), Rate(48, 80, 0.4903, 0.7002))
    assert told == pytest.approx((0.0524, 0.3339), abs=1e-3)  # the paper's example (a)


def test_kept_concepts_and_styles_are_compared_where_the_labels_can_tell():
    kept = drawn(arms={"base": 1.0, "safety": 0.4}, concepts=("cat", "dog"), cell="kept")
    task = drawn(arms={"task": 1.0, "modular": 1.0}, concepts=("cat", "dog"), cell="task", style="ink")
    found = build([*kept, *task])
    assert [(one.arm, one.against, one.metric, one.verdict) for one in found.differences] == [
        ("safety", "base", "top-1", "undecided"),  # dog 0.4, cat 1: two concepts decide nothing
        ("modular", "task", "task fidelity", "not worse"),
    ]
    rows = {(row.arm, row.cell): row for row in found.rows}
    style = rows["modular", "task"].style
    assert (style.wilson.k, style.wilson.n, style.bootstrap) == (200, 200, None)
    unknown = build(drawn(arms={"base": 1.0}, concepts=("a lighthouse", "a bridge"), cell="kept"))
    assert unknown.rows[0].top1 is None


def test_of_one_concept_there_is_no_bootstrap_and_it_is_said():
    found = build(drawn(concepts=("car",)))
    assert all(row.bootstrap is None for row in found.rows)
    assert not found.differences
    assert found.notes == ("left out", "suppressed: one concept, so there is no bootstrap and Wilson's interval stands")


def uneven(**item) -> list[Drawn]:
    """Every arm at another rate in every concept, and one without a hit."""
    some = []
    for concept, rate in (("car", 0.1), ("bus", 0.5), ("tram", 0.9)):
        some += drawn(arms={"base": rate, "safety": 0.0}, concepts=(concept,), **item)
    return some


@pytest.mark.parametrize("show", [lambda r: page.render(r, {}), words.format_report], ids=["page", "text"])
def test_wilsons_interval_stands_beside_every_bootstrap_and_alone_where_that_has_no_width(show):
    found = build([*uneven(), *uneven(cell="kept"), *uneven(cell="task", style="ink")])
    shown = html.unescape(show(found))
    for row in found.rows:
        for share in (row, *((row.top1, row.style) if show is not words.format_report else ())):
            if share is None:
                continue
            k, n = share.wilson.k, share.wilson.n
            assert (share.wilson.low, share.wilson.high) == wilson(k, n)
            assert (share.bootstrap is None) == (k in (0, n))
            assert words.interval(share.wilson) in shown
            assert not share.bootstrap or words.interval(share.bootstrap) in shown
    assert "0.0% … 0.0%" not in shown
    assert "100.0% … 100.0%" not in shown
    for one in found.differences:
        assert show is words.format_report or words.span(one.newcombe) in shown
        assert one.bootstrap is None or one.bootstrap[0] < one.bootstrap[1]


def test_the_plots_show_both_intervals():
    rows = [row for row in build(uneven()).rows if row.cell == "suppressed"]
    bars = {row.arm: plots.rates([row]).count("<path") for row in rows}
    assert bars["base"] == bars["safety"] + 1  # the bootstrap's line


def test_attacks_and_sweeps_are_rows_of_their_own():
    some = [*drawn(), *drawn(attack="img2img 0.5"), *drawn(arms={"safety-at-0_5": 0.3})]
    found = build(some)
    assert {row.attack for row in found.rows} == {"", "img2img 0.5", "sweep"}
    assert {(one.attack, one.against) for one in found.differences} == {
        ("", "safety"),
        ("", "base"),
        ("img2img 0.5", "safety"),
    }
    text = page.render(found, {})
    assert "safety@0.5" in text
    assert figures.evidence(found)["arms"].keys() == ARMS.keys()


def test_evidence_has_the_form_that_is_asked_for():
    said = figures.evidence(build(drawn()))
    assert json.loads(json.dumps(said, allow_nan=False))["arms"] == said["arms"]
    for name in ("arms", "detector", "threshold", "prompts_sha256", "seeds", "command", "date"):
        assert name in said
    for arm in said["arms"].values():
        assert {"k", "n", "low", "high", "quality", "task_fidelity"} <= arm.keys()
    assert (said["arms"]["sequential"]["k"], said["arms"]["sequential"]["n"]) == (150, 300)
    assert said["arms"]["modular"]["per_concept"] == {"bus": [2, 100], "car": [2, 100], "tram": [2, 100]}


def test_a_report_is_read_as_it_was_written(tmp_path):
    found = build([*drawn(), *drawn(cell="kept", concepts=("cat", "dog"), style="ink")])
    (tmp_path / "report.json").write_text(report.to_json(found), encoding="utf-8")
    assert report.read(tmp_path / "report.json") == found
    for text in ("", "{}", '{"form": 1}', "[]", '{"form": 2, "rows": 3}'):
        (tmp_path / "report.json").write_text(text)
        with refuses("audit.report-unreadable", "report.json"):
            report.read(tmp_path / "report.json")


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_words_stay_words_on_the_page(text):
    assert tags_of(page.render(hostile(text), {text: b"jpeg"})) == plain_tags()


def tags_of(made: str) -> list[str]:
    return re.findall(r"<(/?[a-zA-Z!]+)", made)


@functools.cache
def plain_tags() -> list[str]:
    """Of the page where the word is a harmless one."""
    return tags_of(page.render(hostile("word"), {"word": b"jpeg"}))


def test_scripts_in_prompts_are_shown_and_not_run():
    made = page.render(hostile(HOSTILE), {})
    assert "<script" not in made
    assert str(markupsafe.escape(HOSTILE)) in made
    assert "default-src 'none'" in made
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", made), "nothing is loaded from elsewhere"


@pytest.mark.slow
def test_the_page_is_the_same_again_and_names_every_setting():
    found = build(drawn())
    made = page.render(found, {"suppressed": b"jpeg"})
    assert made == page.render(found, {"suppressed": b"jpeg"})
    assert all(name in made for name in SETTINGS)
    assert "left out" in made
    assert "color-scheme:light dark" in made
    assert "data:image/jpeg;base64,anBlZw==" in made


def test_plots_are_svg_with_text_as_text_in_the_pages_colour():
    found = build(drawn())
    for svg in (plots.rates(found.rows), plots.differences(found.differences, MARGIN), plots.concepts(found.rows)):
        tree = ElementTree.fromstring(svg)
        texts = {"".join(element.itertext()).strip() for element in tree.iter("{http://www.w3.org/2000/svg}text")}
        assert any("modular" in text for text in texts)
        assert "currentColor" in svg
        assert plots.INK not in svg


@pytest.mark.slow
def test_of_very_many_concepts_the_first_are_shown_and_it_is_said():
    many = tuple(f"c{i}" for i in range(page.SHOWN + 5))
    made = page.render(build(drawn(arms={"base": 1.0, "safety": 0.0}, concepts=many, count=1)), {})
    assert f"{page.SHOWN} of {page.SHOWN + 5} concepts; report.json has all" in made


def test_without_matplotlib_the_page_says_so(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in page.render(build(drawn()), {})


def shades(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_sheets_show_guarded_arms_alone_and_blank_what_was_hit(tmp_path):
    green, some = (0, 200, 0), drawn(tmp_path, count=4, arms={"base": 1.0, "safety": 0.0, "modular": 0.5})
    for one in some:
        Image.new("RGB", (8, 8), green).save(one.path)
    guarded, every = sheet.sheets(some, False)["suppressed"], sheet.sheets(some, True)["suppressed"]
    count = [(np.abs(shades(data).astype(int) - green).sum(-1) < 40).sum() / sheet.SIDE**2 for data in (guarded, every)]
    assert shades(guarded).shape[1] < shades(every).shape[1]
    assert count[0] == pytest.approx(12 + 6, abs=1)  # safety's twelve, modular's but the blanked six
    assert count[1] == pytest.approx(36, abs=4)  # less the red frames
    assert sheet.sheets([one for one in some if one.arm.name == "base"], False) == {}


def test_a_sheet_has_a_row_of_every_concept_before_a_second_of_any(tmp_path):
    some = drawn(tmp_path, arms={"base": 0.0}, concepts=tuple(f"c{i}" for i in range(10)), count=5)
    rows = sheet._spread([{"base": one} for one in some])
    assert len(rows) == sheet.ROWS
    assert len({row["base"].item.concept for row in rows}) == 10
