"""In a real ComfyUI server: the safety LoRA taken back before the guard, and a base sent to the upload route."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo.client import Client, Failed, Rejected
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from PIL import Image

pytestmark = pytest.mark.server
COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")


@pytest.fixture(scope="module")
def server(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bases")
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    shutil.copyfile(world.safety, folder / "base" / "models" / "loras" / "safety_of_stock.safetensors")
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=folder / "server.log", cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def setting(world: DemoWorld) -> graphs.Setting:
    return world.setting(steps=2, seed=7, prompts=("gloss, racing car",))


def behind(setting: graphs.Setting, name: str, strength: float) -> Graph:
    """Guard Model, with accept_merged on, behind the stock LoraLoader."""
    graph = graphs.safety_only(setting)
    both = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    graph["lora"] = node("LoraLoader", lora_name=name, strength_model=strength, strength_clip=strength, **both)
    graph["guard"]["inputs"] |= {"model": ["lora", 0], "clip": ["lora", 1], "accept_merged": True}
    return graph


def test_the_safety_lora_at_minus_one_before_the_guard_gives_no_image(client: Client, setting: graphs.Setting) -> None:
    with pytest.raises(Failed, match="holds the values of the safety LoRA") as caught:
        client.run(behind(setting, "safety_of_stock.safetensors", -1.0), timeout=300)
    assert caught.value.kind == "ModularLoraGuardModel"


def test_a_task_lora_before_the_guard_is_what_load_task_lora_is(client: Client, setting: graphs.Setting) -> None:
    ours = client.run(behind(setting, setting.task, 1.0), timeout=300)
    asked = client.run(graphs.guarded(setting), timeout=300)
    save = graphs.save_node(0)
    images = [np.asarray(Image.open(io.BytesIO(client.image(r.images(save)[0]))), int) for r in (ours, asked)]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert "\nguarded: " in ours.text("run-report")
    assert "task pending LoRA 1" in ours.text("run-report")


def test_an_uploaded_u_net_is_not_sampled_under_a_policy(
    server: Server, client: Client, world: DemoWorld, setting: graphs.Setting
) -> None:
    upload(server, "output", "diffusion_models", "less.safetensors", b"x" * 64)
    graph = graphs.guarded(setting)
    graph["unet"] = node("UNETLoader", unet_name="less.safetensors", weight_dtype="default")
    graph["guard"]["inputs"]["model"] = ["unet", 0]
    policy = server.base / "user" / "__modular_lora" / "policy.toml"
    policy.parent.mkdir(exist_ok=True)
    safety, base_file = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (world.safety, world.checkpoint))
    policy.write_text(f'[guard]\nrequired = [{{sha256 = "{safety}"}}]\n[base]\nallow = ["{base_file}"]\n', "utf-8")
    try:
        with pytest.raises(Rejected) as caught:
            client.submit(graph)
        assert "(policy: weights)" in caught.value.body["node_errors"]["unet"]["errors"][0]["details"]
        client.run(graphs.guarded(setting), timeout=300)  # the base that is named
        policy.write_text(f'[guard]\nrequired = [{{sha256 = "{safety}"}}]\n[base]\nallow = ["{safety}"]\n', "utf-8")
        time.sleep(1.5)  # the policy is looked at once a second
        with pytest.raises(Failed, match=r"policy: base\.allow"):
            client.run(graphs.guarded(world.setting(steps=2, seed=8, prompts=("gloss, cat face",))), timeout=300)
    finally:
        policy.unlink()


def upload(server: Server, kind: str, subfolder: str, name: str, content: bytes) -> None:
    mark = uuid.uuid4().hex
    fields = {"type": kind, "subfolder": subfolder}
    head = [f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head.append(f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n')
    body = "".join(head).encode() + content + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    request = urllib.request.Request(f"{server.url}/upload/image", body, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        assert answer.status == 200
