"""Anybody's words (file names, metadata, prompts, captions, labels) in the real browser: read as words, never run.

The same words go into every page that the pack writes itself.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.audit import page as audit_page
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo import report as demo_report
from modular_lora_guard.tools.demo.client import Client
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.judge import Seen
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.world import ASSETS, DETECTOR_CONCEPTS, DETECTOR_ONNX
from PIL import Image
from safetensors.torch import load_file, save_file
from support.browsers import COMFYUI, WORLD, need_browser, visit
from support.reports import hostile

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]
LINK = "[[read this|https://elsewhere.example]] __LNK7__"

Json = dict[str, Any]


def words(place: str) -> str:
    """Words that mark the page and leave a note in it if it takes them for HTML; a file may be called so."""
    return f'<img src=x onerror="window.modularLoraRan=1" alt="{place}">&lt;{place}'


NAMES = {role: f"{words(role)}.safetensors" for role in ("checkpoint", "safety", "task", "wrong")}
FOLDER = "pictures"  # no drop-down offers a name with "<", and newer servers take no other


def lay_out(folder: Path, world: DemoWorld) -> None:
    """The demo world under hostile names."""
    base.prepare(folder, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    models = folder / "models"
    shutil.copyfile(world.checkpoint, models / "checkpoints" / NAMES["checkpoint"])
    shutil.copyfile(world.safety, models / "safety_loras" / NAMES["safety"])
    told = {"modular_lora.trained_on": f"{words('trained_on')} {LINK}", "ss_output_name": words("metadata")}
    save_file(load_file(world.task), models / "loras" / NAMES["task"], told)
    strange = {f"lora_unet_{words('key').replace('.', '')}.{end}": t for end, t in _pair().items()}
    save_file(strange, models / "loras" / NAMES["wrong"], told)
    labels = json.loads((ASSETS / DETECTOR_CONCEPTS).read_text(encoding="utf-8"))
    (models / "modular_lora_detectors" / "words.json").write_text(
        json.dumps(labels).replace('"racing-car"', json.dumps(words("label"))), encoding="utf-8"
    )
    (folder / "input" / words("folder") / "1_token").mkdir(parents=True)
    images = folder / "input" / FOLDER / f"1_{words('token')}"
    images.mkdir(parents=True)
    for i in range(2):
        name = f"{i}{words('picture')}"
        Image.new("RGB", (64, 64), "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"{words('caption')}, {LINK}", encoding="utf-8")
    (images / f"{words('broken')}.png").write_text("no picture")


def _pair() -> dict:
    import torch

    return {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4), "alpha": torch.tensor(2.0)}


def drawn(client: Client, world: DemoWorld) -> Graph:
    """A guarded image, and every node whose report names files, captions or labels."""
    setting = world.setting(steps=2, seed=1, prompts=(f"{words('prompt')}, {LINK}",))
    graph = graphs.guarded(setting)
    graph["checkpoint"]["inputs"]["ckpt_name"] = NAMES["checkpoint"]
    graph["safety"]["inputs"]["lora_name"] = NAMES["safety"]
    graph["task"]["inputs"]["lora_name"] = NAMES["task"]
    parts = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    both = {"safety_lora": ["safety", 0], "task_lora": ["task", 0]}
    graph["interference"] = node("ModularLoraInterference", model=["checkpoint", 0], **both)
    graph["table"] = node("PreviewAny", source=["interference", 0])
    graph["project"] = whole(client, "ModularLoraProjectTask", **parts, **both)
    graph["projected"] = node("PreviewAny", source=["project", 1])
    graph["pictures"] = whole(client, "ModularLoraDatasetReport", data_set=FOLDER)
    graph["said"] = node("PreviewAny", source=["pictures", 0])
    graph["settings"] = whole(
        client, "ModularLoraGateSettings", detector="classifier", classifier=DETECTOR_ONNX, labels="words.json"
    )
    graph["gate"] = whole(client, "ModularLoraGate", images=["decode-0", 0], gate=["settings", 0])
    graph["findings"] = node("PreviewAny", source=["gate", 3])
    return graph


def refused(client: Client, world: DemoWorld) -> Graph:
    """A graph that stops with an error that names a file and what is in it."""
    graph = drawn(client, world)
    kept = {key: graph[key] for key in ("checkpoint", "safety", "task", "guard", "guard-report")}
    kept["safety"]["inputs"]["lora_name"] = NAMES["wrong"]
    return kept


def whole(client: Client, kind: str, **inputs: Any) -> Json:
    """A node with its defaults, where it has them, and these inputs."""
    entry = client.get_json(f"/object_info/{kind}")[kind]["input"]
    found = entry.get("required", {}) | entry.get("optional", {})
    defaults = {name: spec[1]["default"] for name, spec in found.items() if len(spec) > 1 and "default" in spec[1]}
    return node(kind, **defaults | inputs)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json]:
    need_browser()
    folder, world = tmp_path_factory.mktemp("words"), DemoWorld.at(Path(WORLD or ""))
    lay_out(folder / "base", world)
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=folder / "log", cpu=True) as server:
        client = Client(server.url)
        made = {"drawn": drawn(client, world), "refused": refused(client, world)}
        (folder / "graphs.json").write_text(json.dumps(made), encoding="utf-8")
        yield visit("words.mjs", server.url, folder / "graphs.json", timeout=900)


def test_reports_on_the_nodes_show_the_words_and_nothing_of_them_runs(seen: Json) -> None:
    found = seen["seen"]["drawn"]
    assert found["message"] == ""
    assert found["state"] == "execution_success"
    assert (found["ran"], found["foreign"]) == (None, [])
    assert found["reports"] >= 6
    for place in ("task", "trained_on", "safety", "broken"):
        assert words(place) in found["text"], place


def test_an_error_shows_the_words_and_nothing_of_them_runs(seen: Json) -> None:
    found = seen["seen"]["refused"]
    assert found["state"] == "execution_error"
    assert NAMES["wrong"] in found["message"]
    assert (found["ran"], found["foreign"]) == (None, [])


def test_no_script_of_the_page_fails_on_them(seen: Json) -> None:
    assert seen["complaints"] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The pages that the pack writes itself, with such words wherever somebody else's get in."""
    need_browser()
    folder = tmp_path_factory.mktemp("pages")
    said = words("page")
    cells = [demo_report.ShownImage(png(), Seen(vehicle, True), said) for vehicle in (True, False)]
    arm = demo_report.Arm(said, said, cells, 1.0, said)
    facts = {said: said}
    shown = demo_report.Demo([arm] * 7, [said], (said, said), 1, said, said, facts, facts, {said: {"status": said}})
    made = {"demo": demo_report.page(shown), "audit": audit_page.render(hostile(said), {said: png()})}
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return visit("pages.mjs", *((folder / f"{name}.html").as_uri() for name in made), timeout=300)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("which", [0, 1], ids=["demo", "audit"])
def test_the_packs_own_pages_show_the_words_and_nothing_of_them_runs(which: int, pages: list[Json]) -> None:
    found = pages[which]
    assert (found["ran"], found["foreign"], found["complaints"]) == (None, [], [])
    assert found["text"].count(words("page")) >= 5


def test_the_demos_report_fits_windows_of_every_width(pages: list[Json]) -> None:
    assert set(pages[0]["beyond"].values()) == {0}, pages[0]["beyond"]


def test_no_drop_down_of_the_pack_offers_a_name_that_would_run(seen: Json) -> None:
    menus = seen["seen"]["drawn"]["menus"]
    assert menus["opened"] >= 10
    assert "left out, with < in the name" in menus["text"]
    assert (menus["ran"], menus["foreign"]) == (None, [])
