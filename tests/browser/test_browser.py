"""What a user sees: ComfyUI's own front end in a real Chromium, on a real server, from the template browser on."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.tools.bootstrap.paths import PACK_NAME, ROOT
from modular_lora_guard.tools.demo import base
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from support import browsers
from support.browsers import COMFYUI, WORLD, need_browser

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]
MAIN = "1 Guard an ordinary graph"
WORKFLOWS = [MAIN, *sorted(file.stem for file in (ROOT / "workflows").glob("*.json") if file.stem != MAIN)]
RUN_SECONDS = 600  # for one workflow on busy cores

Json = dict[str, Any]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """One visit to the front end: every workflow opened and run, as plain data; screenshots go to pytest's folder."""
    need_browser()
    folder = tmp_path_factory.mktemp("browser")
    world = DemoWorld.at(Path(WORLD or ""))
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=folder / "server.log", cpu=True) as server:
        given = (server.url, PACK_NAME, folder, str(RUN_SECONDS), *WORKFLOWS)
        return browsers.visit("template.mjs", *given, timeout=RUN_SECONDS * len(WORKFLOWS))


@pytest.fixture(params=WORKFLOWS)
def seen(request: pytest.FixtureRequest, visit: Json) -> Json:
    saved = json.loads((ROOT / "workflows" / f"{request.param}.json").read_text(encoding="utf-8"))
    return {"saved": saved, **visit["seen"][request.param]}


def of_type(state: Json, *types: str) -> list[Json]:
    return [node for node in state["nodes"] if node["type"] in types]


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def test_the_template_browser_lists_every_workflow_with_its_picture(visit: Json) -> None:
    assert set(visit["seen"][MAIN]["cards"]) == set(WORKFLOWS)


def test_no_script_fails_on_the_page(visit: Json) -> None:
    assert visit["complaints"] == []


def test_every_node_is_drawn_without_error(seen: Json) -> None:
    loaded, saved = seen["loaded"], seen["saved"]
    assert loaded["dialogs"] == []
    assert sorted((n["id"], n["type"]) for n in loaded["nodes"]) == sorted((n["id"], n["type"]) for n in saved["nodes"])
    assert loaded["links"] == len(saved["links"])
    for node in loaded["nodes"]:
        assert node["registered"], node
        assert not node["failed"], node
        assert node["unlinked"] == [], node
        assert node["box"][3] >= node["needs"], f"{node['title']} is too small for its widgets"


def test_no_node_covers_another(seen: Json) -> None:
    for state in (seen["loaded"], seen["ran"]):
        for a, b in combinations(state["nodes"], 2):
            assert not overlap(a["box"], b["box"]), f"{a['title']} and {b['title']} overlap"


def test_outputs_have_names_not_types(seen: Json) -> None:
    for node in seen["loaded"]["nodes"]:
        if node["type"].startswith("ModularLora"):
            assert all(name == name.lower() for name in node["outputs"]), node


def test_widgets_show_the_saved_values(seen: Json) -> None:
    saved = {node["id"]: node for node in seen["saved"]["nodes"]}
    for node in seen["loaded"]["nodes"]:
        shown = [v for name, v in node["widgets"].items() if not name.startswith("$$")]
        assert shown == saved[node["id"]].get("widgets_values", []), node


def test_the_run_succeeds(seen: Json) -> None:
    assert seen["outcome"] == {"state": "success", "errors": []}
    assert seen["ran"]["dialogs"] == []
    assert not any(node["failed"] for node in seen["ran"]["nodes"])


def test_the_picture_is_on_the_save_node(seen: Json) -> None:
    nodes = of_type(seen["ran"], "ModularLoraSaveImage", "ModularLoraSaveGated", "PreviewImage")
    assert nodes
    for node in nodes:
        assert node["pictures"], node
        assert min(min(picture) for picture in node["pictures"]) >= 64, node


def test_the_reports_are_on_the_nodes(seen: Json) -> None:
    decoded = of_type(seen["ran"], "ModularLoraDecode")
    assert all(node["report"].startswith("guarded: ") for node in decoded)
    for node in of_type(seen["ran"], "ModularLoraSaveImage"):
        assert node["report"] == "1 of 1 images attested"
    for node in of_type(seen["ran"], "ModularLoraInterference"):
        assert "net strength" in node["report"]
    for node in of_type(seen["ran"], "ModularLoraTrainTask", "ModularLoraTrainSafety"):
        assert node["report"].startswith("saved as ")
        assert node["pictures"] == [[640, 360]], "the loss curve"
    gated = of_type(seen["ran"], "ModularLoraGate", "ModularLoraSampleAndGate")
    for node in gated:
        assert "of 4 images flagged" in node["report"]
        assert "does not cover: " in node["report"]
    for node in of_type(seen["ran"], "ModularLoraSaveGated"):
        assert node["report"] == "4 of 4 images saved, attested and gated"
    audited = of_type(seen["ran"], "ModularLoraAudit")
    for node in audited:
        assert "modular − safety, concept rate" in node["report"]
        assert [width for width, _ in node["pictures"]] == [640], "the plot"
    assert decoded or gated or audited or of_type(seen["ran"], "ModularLoraInterference")


def test_guard_and_sampler_of_the_main_workflow_say_what_they_did(visit: Json) -> None:
    ran = visit["seen"][MAIN]["ran"]
    (guard,), (sampler,) = of_type(ran, "ModularLoraGuardModel"), of_type(ran, "ModularLoraKSampler")
    assert "layers guarded" in guard["report"]
    assert "demo_safety_vehicles.safetensors" in guard["report"]
    assert sampler["report"].startswith("guarded: ")
    assert "over 20 evaluations" in sampler["report"]
