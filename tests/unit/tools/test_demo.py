"""The demo's parts without a server: graphs, client errors, progress, images, report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from modular_lora_guard.tools.demo import graphs, images, judge, report, settings, show
from modular_lora_guard.tools.demo.client import Client, ClientError, Event, Rejected, Result
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
    says, attested = {"Says": "<script>"}, {"k": {"status": "x"}}
    shown = report.Demo([arm], ["Arm <2>"], ("a & b", "c"), 1, "Look.", "By rule.", {"Date": "today"}, says, attested)
    page = report.page(shown)
    assert "activity &lt;9&gt;" in page
    assert "By rule." in page
    assert "3 of 7" in page
    assert page.count("a vehicle</small>") == page.count("as asked</small>") == 1
    assert page.count("data:image/png;base64,") == 2
    assert "<script>" not in page
    assert "Arm &lt;1&gt;" in page
    assert "a &amp; b" in page
    assert "1 of 2 columns are drawn" in page
    assert "Missing: Arm &lt;2&gt;." in page


class StoppedClient:
    """Answers as a server does, up to the graph that is stopped; ``drawn`` counts the graphs that came to their end."""

    def __init__(self, most: int, stop: BaseException) -> None:
        self.most, self.stop, self.drawn = most, stop, 0

    def run(self, prompt: graphs.Graph, on_event: Callable[[Event], None]) -> Result:
        on_event(Event("sampler-0", 1, 20))
        if self.drawn == self.most:
            raise self.stop
        self.drawn += 1
        saves = {key: {"images": [{"filename": key}]} for key in prompt if key.startswith("save-")}
        return Result("id", saves | {"guard-report": {"text": ["The model is guarded."]}}, 1.0)

    def image(self, reference: dict[str, str]) -> bytes:
        return png()

    def get_json(self, path: str) -> Any:
        return {"system": {}, "devices": []}


def stopped_demo(monkeypatch: pytest.MonkeyPatch, folder: Path, drawn: int, stop: BaseException) -> None:
    """A run of the demo in which the graph after so many is stopped."""
    monkeypatch.setattr(show, "Client", lambda url: StoppedClient(drawn, stop))
    files = [Path(f"{name}.safetensors") for name in ("base", "safety", "task", "sequential", "of-words")]
    world = settings.DemoWorld(*files[:4], settings.Shown(*files[1:]))
    with pytest.raises(type(stop)):
        show.show(SimpleNamespace(url=""), world, steps=20, seed=1, output=folder)


PROMPTS = len(settings.SUPPRESSED + settings.KEPT)


@pytest.mark.parametrize("stop", [ClientError("too slow"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_demo_that_is_stopped_keeps_the_columns_that_were_drawn_and_counts_the_others(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_demo(monkeypatch, tmp_path, 2, stop)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * PROMPTS
    assert f"2 of {len(show.PLANS)} columns are drawn" in page
    assert f"Missing: {'; '.join(plan.title for plan in show.PLANS[2:])}." in page
    assert "the guarded column is not drawn" in page
    with Image.open(tmp_path / "comparison.png") as image:
        two = image.width
    assert len(list((tmp_path / "pictures").iterdir())) == 2 * PROMPTS
    said = capsys.readouterr().out
    assert f"2 of {len(show.PLANS)} columns were drawn" in said
    assert str(tmp_path / "report.html") in said

    stopped_demo(monkeypatch, tmp_path, 5, stop)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5 * PROMPTS
    assert "The model is guarded." in page, "the guarded column is among them"
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > two

    stopped_demo(monkeypatch, tmp_path, 1, stop)
    names = {file.stem.rpartition("-")[2] for file in (tmp_path / "pictures").iterdir()}
    assert names == {show.PLANS[0].key}, "nothing of the run before stands beside this one's"


def test_a_demo_that_is_stopped_in_its_first_column_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_demo(monkeypatch, tmp_path, 1, KeyboardInterrupt())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    stopped_demo(monkeypatch, tmp_path, 0, KeyboardInterrupt())
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert "nothing was written" in capsys.readouterr().out
