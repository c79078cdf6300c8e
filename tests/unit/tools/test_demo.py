"""The demo's parts without a server: graphs, client errors, progress, images, report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from modular_lora_guard.tools.demo import graphs, images, judge, report, settings, show
from modular_lora_guard.tools.demo.client import Client, Event, Rejected
from modular_lora_guard.tools.demo.progress import Progress
from modular_lora_guard.tools.demo.server import free_port
from modular_lora_guard.tools.world import ASSETS, DATA_SET, data
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.errors import refuses

SETTING = graphs.Setting(
    *(f"{name}.safetensors" for name in ("base", "safety", "task", "seq", "words")), prompts=("a", "b")
)


def png(colour: str = "red", **text: str) -> bytes:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def classes(graph: graphs.Graph) -> set[str]:
    return {node["class_type"] for node in graph.values()}


@pytest.mark.parametrize("plan", show.PLANS, ids=lambda plan: plan.key)
def test_every_arm_draws_every_prompt_with_the_same_seeds(plan: show.Plan) -> None:
    graph = plan.graph(SETTING)
    seeds = {key: node["inputs"]["seed"] for key, node in graph.items() if key.startswith("sampler-")}
    assert seeds == {"sampler-0": 1, "sampler-1": 2}
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert all(source in graph for source, _ in links)


def test_only_the_stock_arms_merge() -> None:
    arms = {plan.key: classes(plan.graph(SETTING)) for plan in show.PLANS}
    assert [key for key, found in arms.items() if "LoraLoader" in found] == ["dropped", "unguarded"]
    guarded = ["safety", "guarded", "first", "words"]
    assert [key for key, found in arms.items() if "ModularLoraGuardModel" in found] == guarded
    combined = {plan.key: plan.graph(SETTING).get("guard", {}).get("inputs", {}).get("combine") for plan in show.PLANS}
    assert [key for key, how in combined.items() if how] == ["first"]


def test_the_demo_shows_enough_of_both_kinds() -> None:
    assert (len(settings.SUPPRESSED), len(settings.KEPT)) == (12, 2)
    assert settings.SUPPRESSED[:2] == ("twemoji, car", "twemoji, bus")
    assert settings.KEPT[0] == "gloss, cat face"


def test_the_activity_stands_in_words_and_is_nothing_where_no_guard_ran() -> None:
    lora = {"activity": {"value": 0.187, "prompt": "concept", "why": ""}}
    answered = {"modular_lora": [{"run": {"safety_loras": [lora], "task_share": None}}]}
    assert judge.activity(answered) == "activity 0.19, about vehicles"
    answered["modular_lora"][0]["run"]["task_share"] = 0.25
    assert judge.activity(answered).endswith("; task LoRA at 0.25")
    unmeasured = {"modular_lora": [{"run": {"safety_loras": [{"activity": None}], "task_share": None}}]}
    assert [judge.activity(one) for one in ({}, {"modular_lora": [{"run": None}]}, unmeasured)] == ["", "", ""]


def test_the_detector_says_of_each_image_whether_it_shows_what_was_asked_for() -> None:
    drawn = [(ASSETS / DATA_SET / "10_gloss" / f"{name}.png").read_bytes() for name in ("cat-face", "pizza")]
    cat, pizza = (data.WORDS.index(word) for word in ("cat face", "pizza"))
    assert judge.seen(drawn, (cat, pizza)) == [judge.Seen(False, True)] * 2
    assert judge.seen(drawn, (pizza, 0)) == [judge.Seen(False, False)] * 2


def test_a_world_with_missing_files_names_them(tmp_path: Path) -> None:
    with refuses("command.no-world"):
        settings.DemoWorld.at(tmp_path)


def test_a_server_that_is_gone_is_one_clear_error() -> None:
    with refuses("client.no-answer"):
        Client(f"http://127.0.0.1:{free_port()}").get("/system_stats", timeout=5)


def test_a_refusal_quotes_the_errors_of_the_nodes() -> None:
    error = {"type": "return_type_mismatch", "message": "Return type mismatch", "details": "model"}
    refusal = Rejected(400, {"error": {"message": "general"}, "node_errors": {"7": {"errors": [error]}}})
    assert str(refusal) == "graph refused (HTTP 400): node 7: Return type mismatch: model"
    assert refusal.types() == {"return_type_mismatch"}
    assert "general" in str(Rejected(400, {"error": {"message": "general"}}))


def test_progress_counts_sampler_steps_and_ends_at_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("arm", samplers=2, steps=4)
    for event in (Event("guard"), Event("sampler-0", 4, 4), Event("sampler-1", 2, 4)):
        progress(event)
    assert progress.fraction == 0.75
    progress.done()
    assert capsys.readouterr().out.count("\n") == 1, "a log file gets one line an arm"


def test_an_attestation_is_read_from_an_image() -> None:
    record = {"status": "guarded"}
    assert images.attestation(png(modular_lora_attestation=json.dumps(record), prompt="{}")) == {
        "modular_lora_attestation": record
    }
    assert images.attestation(png()) == {}
    assert images.attestation(png(modular_lora_attestation="no JSON")) == {}


def test_images_are_put_side_by_side(tmp_path: Path) -> None:
    place = tmp_path / "comparison.png"
    images.comparison([("a", True), ("b", False)], {"one": [png("red")] * 2, "two": [png("blue")] * 2}, place)
    with Image.open(place) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert list(tmp_path.iterdir()) == [place]


def test_the_report_holds_its_images_and_escapes_what_it_quotes() -> None:
    cells = [
        report.ShownImage(png(), judge.Seen(True, True), "activity <9>"),
        report.ShownImage(png(), judge.Seen(0, 1), ""),
    ]
    arm = report.Arm("Arm <1>", "note", cells, 1.0, "3 of 7")
    shown = report.Demo(
        [arm], ("a & b", "c"), 1, "Look.", "By rule.", {"Date": "today"}, {"Says": "<script>"}, {"k": {"status": "x"}}
    )
    page = report.page(shown)
    assert "activity &lt;9&gt;" in page
    assert "By rule." in page
    assert "3 of 7" in page
    assert page.count("a vehicle</small>") == page.count("as asked</small>") == 1
    assert page.count("data:image/png;base64,") == 2
    assert "<script>" not in page
    assert "Arm &lt;1&gt;" in page
    assert "a &amp; b" in page
