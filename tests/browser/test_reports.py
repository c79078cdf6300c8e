"""The reports on the nodes in the real front ends: what is read, when it is still there, and that it is only text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from safetensors.torch import load_file, save_file
from support.browsers import COMFYUI, WORLD, front_end_options, need_browser, visit

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]
HOSTILE = '<img src=x onerror="window.modularLoraRan=1">[[read|https://elsewhere.example]]'
GUARDED = "Guarded: the safety LoRA ran in all 2 evaluations of the model. 1 task LoRA."
TEXTS = {  # by node type: the first line
    "ModularLoraGuardModel": "The model is guarded by 1 safety LoRA, on 84 layers. 1 task LoRA.",
    "ModularLoraKSampler": GUARDED,
    "ModularLoraDecode": GUARDED,
    "ModularLoraSaveImage": "1 of 1 images attested",
    "ModularLoraInterference": "A net strength of 1.001 is left beside 1 task LoRA.",
}
ABOVE = "1 of 1 images (ModularLoraSaveImage save-0): guarded"
AGAIN = set(TEXTS) - {"ModularLoraGuardModel", "ModularLoraKSampler"}  # ComfyUI does not look behind what is cached
LOOKS = [("pinned", False), ("pinned", True), ("newest", False), ("newest", True)]
NAMES = [f"{front_end}, {'Nodes 2.0' if nodes2 else 'classic'}" for front_end, nodes2 in LOOKS]

Json = dict[str, Any]


def graph(world: DemoWorld, task: str, seed: int) -> Graph:
    made = graphs.guarded(world.setting(steps=2, seed=seed, prompts=("gloss, cat face",)))
    made["task"]["inputs"]["lora_name"] = task
    both = {"safety_lora": ["safety", 0], "task_lora": ["task", 0]}
    made["interference"] = node("ModularLoraInterference", model=["checkpoint", 0], **both)
    del made["guard-report"], made["run-report"]
    return made


def visits(front_end: str, folder: Path) -> list[Json]:
    """A visit with the classic canvas, and one with Nodes 2.0."""
    options = front_end_options(front_end)
    need_browser()
    world = DemoWorld.at(Path(WORLD or ""))
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    log, found = folder / "log", []
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=log, cpu=True, extra=options) as server:
        for nodes2 in (False, True):
            shots = folder / f"nodes2-{nodes2}"
            shots.mkdir()
            task = (
                folder / "base" / "models" / "loras" / f"strange-{nodes2}.safetensors"
            )  # nothing comes from the cache
            save_file(load_file(world.task), task, {"modular_lora.trained_on": f"{HOSTILE}{nodes2}"})
            (shots / "graph.json").write_text(json.dumps(graph(world, task.name, int(nodes2))), encoding="utf-8")
            given = {"url": server.url, "nodes2": nodes2, "graph": str(shots / "graph.json"), "folder": str(shots)}
            found.append(visit("reports.mjs", json.dumps(given), timeout=900))
    return found


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    return visits("pinned", tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    return visits("newest", tmp_path_factory.mktemp("reports-newest"))


@pytest.fixture(params=LOOKS, ids=NAMES)
def seen(request: pytest.FixtureRequest) -> Json:
    front_end, nodes2 = request.param
    return request.getfixturevalue(front_end)[nodes2]["seen"]


def texts(state: Json) -> dict[str, str]:
    """Reports by node type, without the activity's figure, which goes with the seed; `above` gives what is above."""
    return {
        one["type"]: re.sub(r" \(activity [^)]*\)", "", one["text"].rpartition("\n\n")[2]) for one in state["reports"]
    }


def above(state: Json) -> str:
    guard = next(one["text"] for one in state["reports"] if one["type"] == "ModularLoraGuardModel")
    return guard.rpartition("\n\n")[0]


def test_every_node_shows_its_report_when_the_job_has_ended(seen: Json) -> None:
    assert seen["first"]["state"] == "execution_success", seen["first"]["message"]
    assert {kind: text.splitlines()[0] for kind, text in texts(seen["first"]).items()} == TEXTS
    assert all(one["fixed"] for one in seen["first"]["reports"]), "nobody writes into it"
    assert all(one["drawn"] for one in seen["first"]["reports"])
    assert above(seen["first"]) == ABOVE


def test_line_breaks_are_kept_and_words_are_only_words(seen: Json) -> None:
    text = texts(seen["first"])["ModularLoraGuardModel"]
    assert text.splitlines()[1].startswith("note: task strange-")
    assert HOSTILE in text
    for state in ("first", "back", "cached", "reloaded"):
        assert (seen[state]["ran"], seen[state]["foreign"]) == (None, []), state


def test_the_reports_are_there_again_after_another_workflow_and_after_a_reload(seen: Json) -> None:
    assert seen["elsewhere"]["reports"] == []
    for state in ("back", "cached", "reloaded"):
        assert texts(seen[state]) == texts(seen["first"]), state
        assert above(seen[state]) == ABOVE, state


def test_the_reports_are_neither_saved_nor_queued(seen: Json) -> None:
    assert "modular_lora_report" not in seen["prompt"]
    for state in ("first", "cached", "reloaded"):
        assert not any(line in seen[state]["saved"] for line in TEXTS.values())


def test_a_run_from_the_cache_reports_as_the_first_one_did(seen: Json) -> None:
    assert seen["cached"]["state"] == "execution_success"
    assert set(texts(seen["cached"])) >= AGAIN
