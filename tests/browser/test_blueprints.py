"""Subgraph blueprints in ComfyUI's own front end: found by name, added, wired and run as a user does it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.tools.demo import base
from modular_lora_guard.tools.demo.client import Client
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.templates.definitions import BLUEPRINTS
from modular_lora_guard.tools.world import CHECKPOINT, DATA_SET, SAFETY_LORA, TASK_LORA
from support import browsers
from support.browsers import COMFYUI, WORLD, need_browser

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]
SAMPLING, GATING, TRAINING = BLUEPRINTS
LOADER = "CheckpointLoaderSimple"
SECONDS = 600  # for the run on busy cores
ASKED = {
    "blueprints": list(BLUEPRINTS),
    "nodes": {LOADER: {"ckpt_name": CHECKPOINT}, "EmptyLatentImage": {"width": 64, "height": 64}},
    "values": {
        SAMPLING: {
            "safety LoRA": SAFETY_LORA,
            "task LoRA": TASK_LORA,
            "positive prompt": "gloss, cat face",
            "steps": 2,
            "cfg": 3.0,
        },
        GATING: {
            "detector": "classifier",
            "classifier": "demo_detector.onnx",
            "labels": "demo_concepts.json",
            "action": "report",
            "filename_prefix": "from_a_blueprint",
        },
        TRAINING: {
            "data_set": DATA_SET,
            "output_name": "from_a_blueprint",
            "max_train_steps": 2,
            "train_batch_size": 2,
            "resolution": 64,
        },
    },
    "links": [
        *((LOADER, out, name, out.lower()) for name in (SAMPLING, TRAINING) for out in ("MODEL", "CLIP", "VAE")),
        ("EmptyLatentImage", "LATENT", SAMPLING, "latent_image"),
        (SAMPLING, "image", GATING, "images"),
    ],
    "seconds": SECONDS,
}
LOOKS = {"pinned": False, "newest": True}  # front end -> with Nodes 2.0

Json = dict[str, Any]


@pytest.fixture(scope="module", params=LOOKS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Json:
    options = browsers.front_end_options(request.param)
    need_browser()
    folder, world = tmp_path_factory.mktemp("blueprints"), DemoWorld.at(Path(WORLD or ""))
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    log = folder / "server.log"
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=log, cpu=True, extra=options) as server:
        listed = Client(server.url).get_json("/global_subgraphs").values()
        asked = ASKED | {"url": server.url, "folder": str(folder), "nodes2": LOOKS[request.param]}
        found = browsers.visit("blueprints.mjs", json.dumps(asked), timeout=2 * SECONDS)
    files = {file.name for file in (folder / "base").rglob("from_a_blueprint*")}
    return dict(found) | {"listed": {one["name"] for one in listed}, "files": files}


def test_comfyui_serves_every_blueprint(seen: Json) -> None:
    assert seen["listed"] >= set(BLUEPRINTS)


def test_each_is_found_by_its_name_and_added_as_a_subgraph(seen: Json) -> None:
    assert set(seen["shown"]) == set(BLUEPRINTS)
    for name, (graph, about) in BLUEPRINTS.items():
        shown = seen["shown"][name]
        assert shown["subgraph"]
        assert sorted(kind for kind, _ in shown["inner"]) == sorted(node["class_type"] for node in graph.values())
        assert all(registered for _, registered in shown["inner"])
        assert shown["inputs"] == [given for given, _, _ in about.inputs]
        assert shown["outputs"] == [given for given, _, _ in about.outputs]
        assert set(shown["widgets"]) <= {given for given, _, _ in about.inputs}
        assert len(shown["widgets"]) >= 5


def test_all_three_run_together_and_write_what_they_promise(seen: Json) -> None:
    assert seen["run"] == {"state": "success", "errors": []}, seen["dialogs"]
    assert "from_a_blueprint.safetensors" in seen["files"]
    assert any(name.endswith(".png") for name in seen["files"])


def test_no_script_of_the_page_fails(seen: Json) -> None:
    assert seen["complaints"] == []
