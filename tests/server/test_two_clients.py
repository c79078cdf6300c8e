"""Two clients that sample at once in a real server under a policy: every image is attested for its own prompt."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from modular_lora_guard.modular_lora.provenance import attested
from modular_lora_guard.tools.benchmarks import clients
from PIL import Image
from PIL.PngImagePlugin import PngInfo

COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
PROMPTS, ALL_PROMPTS = 10, 180
JOB = clients.Job(7, "gloss, cactus", 1.0, 0.4)


@pytest.mark.server
@pytest.mark.slow
def test_every_image_is_attested_for_its_own_prompt(tmp_path: Path, extent) -> None:
    if not COMFYUI or not WORLD:
        pytest.skip("MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD are not set: run the tests with `python3 run.py test`")
    prompts = extent(PROMPTS, ALL_PROMPTS)
    drawn = clients.run(Path(COMFYUI), Path(WORLD), tmp_path, prompts, seed=3)
    assert len(drawn) == 2 * prompts
    assert [one for one in drawn if one.wrong] == []
    assert len({one.pixels for one in drawn}) == prompts


@pytest.fixture
def made() -> dict:
    return {"sample": {"class_type": "ModularLoraKSampler", "inputs": {"seed": 7}}}


def judged(tmp_path: Path, made: dict, status: str = "guarded", strength: float = 1.0, sent: dict | None = None) -> str:
    """What is wrong with an image that was made up, beside a record of its run."""
    pixels = np.full((8, 8, 3), 9, np.uint8)
    loras = [{"role": "safety", "strength_model": strength}, {"role": "task", "strength_model": 0.4}]
    run = {"loras": loras, "net_strength": {}, "embeddings_sha256": [], "evaluations": 2, "firings": 9}
    text = PngInfo()
    text.add_text(attested.KEY, json.dumps(run | {"status": status} | attested.pixels(pixels)))
    text.add_text("prompt", json.dumps(sent or made))
    Image.fromarray(pixels).save(tmp_path / "a.png", pnginfo=text)
    line = {"kind": "run", "prompt_id": "mine", "attestation": run}
    (tmp_path / "record-000001.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return clients.judge(JOB, made, (tmp_path / "a.png").read_bytes(), "mine", tmp_path).wrong


def test_an_image_of_another_prompt_is_found(tmp_path: Path, made: dict) -> None:
    assert not judged(tmp_path, made)
    assert "reads unattested" in judged(tmp_path, made, status="unattested")
    assert "names the strengths" in judged(tmp_path, made, strength=1.1)
    other = {"sample": {"class_type": "ModularLoraKSampler", "inputs": {"seed": 8}}}
    assert "another graph" in judged(tmp_path, made, sent=other)


def test_images_that_two_prompts_share_or_that_differ_between_clients_are_found() -> None:
    one = clients.Drawn(JOB, "a", "")
    assert not clients.compared([one, one])[0].wrong
    assert "the other client got another image" in clients.compared([one, clients.Drawn(JOB, "b", "")])[0].wrong
    other = dataclasses.replace(one, job=dataclasses.replace(JOB, seed=8))
    assert "another prompt got this image" in clients.compared([one, other])[1].wrong
