"""A training workflow as it was saved before there were presets, opened in ComfyUI's own front end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.tools.demo import base
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from support import browsers
from support.browsers import COMFYUI, WORLD, need_browser

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]
TRAIN, OPTIONS = "ModularLoraTrainTask", "ModularLoraTaskTrainingOptions"
SOCKETS = ("model", "clip", "vae", "safety_lora")
FORMER: dict[str, Any] = {  # widgets that Train Task LoRA had, in their order, and what was set
    "data_set": "gloss", "output_name": "mine", "network_dim": 5, "network_alpha": 5.0, "target": "attention",
    "learning_rate": 0.003, "max_train_steps": 160, "train_batch_size": 3, "resolution": 64, "seed": 7,
    "optimizer_type": "Adafactor", "lr_scheduler": "cosine", "lr_warmup_steps": 20, "mixed_precision": "bf16",
    "gradient_checkpointing": True, "network_train_text_encoder": False, "min_snr_gamma": 5.0, "noise_offset": 0.0,
    "project": False, "save_every_n_steps": 50, "sample_every_n_steps": 0, "sample_prompts": "gloss, cat\ngloss, car",
    "more_options": "sample_size = 64", "resume": True, "engine": "embedded", "ckpt_name": "", "kohya_files": "",
}  # fmt: skip
OWN = ("data_set", "output_name", "max_train_steps", "seed", "resume")  # what it shows still


def saved() -> dict[str, Any]:
    inputs: list[dict[str, Any]] = [{"name": name, "type": "*", "link": None} for name in SOCKETS]
    inputs += [{"name": name, "type": "*", "widget": {"name": name}, "link": None} for name in FORMER]
    node = {"id": 1, "type": TRAIN, "pos": [0, 0], "size": [400, 1000], "flags": {}, "order": 0, "mode": 0}
    node |= {"inputs": inputs, "outputs": [], "properties": {}, "widgets_values": list(FORMER.values())}
    whole = {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "groups": [], "config": {}}
    return whole | {"extra": {}, "version": 0.4}


@pytest.mark.parametrize(("front_end", "nodes2"), [("pinned", False), ("newest", True)])
def test_its_values_are_on_an_options_node_beside_it(front_end: str, nodes2: bool, tmp_path: Path) -> None:
    extra = browsers.front_end_options(front_end)
    need_browser()
    world = DemoWorld.at(Path(WORLD or ""))
    base.prepare(tmp_path / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    log = tmp_path / "server.log"
    with Server(Path(COMFYUI or ""), sys.executable, tmp_path / "base", log=log, cpu=True, extra=extra) as server:
        visit = {"url": server.url, "folder": str(tmp_path), "nodes2": nodes2, "workflow": saved()}
        seen = browsers.visit("former.mjs", json.dumps(visit), timeout=600)
    assert seen["complaints"] == []
    queued = {entry["class_type"]: entry["inputs"] for entry in seen["queued"].values()}
    (options,) = (key for key, entry in seen["queued"].items() if entry["class_type"] == OPTIONS)
    assert queued[TRAIN] == {name: FORMER[name] for name in OWN} | {"preset": "none", "options": [options, 0]}
    there = queued[OPTIONS]
    for name, value in FORMER.items():
        if name not in OWN:
            assert there[name] == ({True: "yes", False: "no"}[value] if isinstance(value, bool) else value), name
    left = {name: value for name, value in there.items() if name not in FORMER}
    assert set(left.values()) <= {"preset", -1, ""}, "what it did not have is as the preset says"
    assert seen["sockets"][TRAIN] == [*SOCKETS, "options"]
