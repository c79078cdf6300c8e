"""The verdict as programs read it: in /history over HTTP, and in the websocket's messages, against its schema."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo.client import Client
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.world import DETECTOR_CONCEPTS, DETECTOR_ONNX, SIZE
from PIL import Image, ImageOps

pytestmark = pytest.mark.server
COMFYUI = os.environ.get("MODULAR_LORA_COMFYUI")
SCHEMA = json.loads((ROOT / "docs" / "verdict.schema.json").read_text(encoding="utf-8"))
KEY = "modular_lora"
OUTPUT = {
    "decode-0",
    "save-0",
    "scaled-save",
    "edited",
    "gate",
    "gated",
    "withheld",
    "stock",
    "shown",
    "three-gated",
    "three-saved",
}  # nodes that answer with a verdict

Json = dict[str, Any]


def settings(**inputs: Any) -> Json:
    plain: Json = {"preset": "none", "threshold": 0.0, "classes": "", "action": "blur", "provider": "CPU"}
    files = {"detector": "classifier", "classifier": DETECTOR_ONNX, "labels": DETECTOR_CONCEPTS}
    return node("ModularLoraGateSettings", **files | plain | inputs)


def graph(world: DemoWorld) -> Graph:
    """A guarded image: saved, saved after an edit, gated and saved, and withheld by a gate that flags everything.

    And three of which the one in the middle, which no guarded run made, is left out when they are saved.
    """
    made = graphs.guarded(world.setting(steps=2, seed=3, prompts=("gloss, cat face",)))
    image = ["decode-0", 0]
    made["invert"] = node("ImageInvert", image=image)
    made["edited"] = node(
        "ModularLoraSaveImage", images=["invert", 0], filename_prefix="edited", unattested="save and say so"
    )
    scaling: Json = {"upscale_method": "bilinear", "width": 32, "height": 32, "crop": "disabled"}
    made["scaled"] = node("ImageScale", image=image, **scaling)
    made["scaled-save"] = node(
        "ModularLoraSaveImage", images=["scaled", 0], filename_prefix="scaled", unattested="refuse"
    )
    made["settings"] = settings()
    made["gate"] = node("ModularLoraGate", images=image, gate=["settings", 0])
    saving: Json = {"format": "png", "quality": 95, "unfit": "refuse", "save_flagged": False}
    made["gated"] = node("ModularLoraSaveGated", images=["gate", 0], filename_prefix="gated", **saving)
    made["strict"] = settings(threshold=1e-9, action="withhold")
    made["withheld"] = node("ModularLoraGate", images=image, gate=["strict", 0])
    made["never"] = node("ModularLoraSaveGated", images=["withheld", 0], filename_prefix="never", **saving)
    made["stock"] = node("SaveImage", images=image, filename_prefix="stock")
    made["shown"] = node("PreviewImage", images=["invert", 0])
    made["unseen"] = node("PreviewImage", images=["withheld", 0])
    made["flipped"] = node("ImageFlip", image=image, flip_method="y-axis: horizontally")
    made["white"] = node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0xFFFFFF)
    made["two"] = node("ImageBatch", image1=image, image2=["white", 0])
    made["three"] = node("ImageBatch", image1=["two", 0], image2=["flipped", 0])
    made["three-gated"] = node("ModularLoraGate", images=["three", 0], gate=["settings", 0])
    made["three-saved"] = node(
        "ModularLoraSaveGated",
        images=["three-gated", 0],
        filename_prefix="three",
        **saving | {"unfit": "skip and say so"},
    )
    return made


class Heard(Client):
    """A client that keeps what the websocket says of each node's end."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.executed: Json = {}

    def _handle(self, kind: str, data: Json, prompt_id: str, on_event: Any) -> bool:
        if kind == "executed" and data.get("prompt_id") == prompt_id:
            self.executed[data["node"]] = data["output"]
        return super()._handle(kind, data, prompt_id, on_event)


@pytest.fixture(scope="module")
def place(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdict") / "base"
    base.prepare(folder, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with Server(Path(COMFYUI or ""), sys.executable, place, log=place.parent / "log", cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def ran(server: Server, world: DemoWorld) -> Json:
    client = Heard(server.url)
    result = client.run(graph(world), timeout=300)
    return {"history": client.history(result.prompt_id), "websocket": client.executed, "id": result.prompt_id}


@pytest.fixture(scope="module")
def verdicts(ran: Json) -> Json:
    return {name: out[KEY] for name, out in ran["history"]["outputs"].items() if KEY in out}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_nodes_that_decode_gate_save_or_show_images_answer_with_a_verdict_that_fits_the_schema(verdicts: Json) -> None:
    assert set(verdicts) == OUTPUT
    for name, some in verdicts.items():
        assert [one["image"] for one in some] == list(range(3 if name.startswith("three") else 1)), name
        for one in some:
            jsonschema.validate(one, SCHEMA)


def test_the_schema_knows_every_key_that_is_answered(verdicts: Json) -> None:
    closed = json.loads(json.dumps(SCHEMA).replace('"required"', '"additionalProperties": false, "required"'))
    del closed["$defs"]["run"]["properties"]["safety_loras"]["items"][
        "additionalProperties"
    ]  # closed by what it refers to
    for some in verdicts.values():
        for one in some:
            plain = json.loads(json.dumps(one))
            for lora in (plain["run"] or {}).get("safety_loras", ()):
                assert set(lora) == {
                    *SCHEMA["$defs"]["lora"]["properties"],
                    *SCHEMA["$defs"]["run"]["properties"]["safety_loras"]["items"]["properties"],
                }
            if plain["run"]:
                plain["run"]["safety_loras"] = []
            jsonschema.validate(plain, closed)


def test_the_websocket_says_the_same_as_the_history(ran: Json, verdicts: Json) -> None:
    assert {name: out[KEY] for name, out in ran["websocket"].items() if out and KEY in out} == verdicts


def test_images_stand_where_and_as_comfyui_puts_them(ran: Json) -> None:
    for name in ("save-0", "edited", "gated", "stock", "shown"):
        output = ran["history"]["outputs"][name]
        (image,) = output["images"]
        assert set(image) == {"filename", "subfolder", "type"}
        assert output[KEY][0]["file"] == image


def test_an_image_is_attested_with_its_loras_and_its_gate(verdicts: Json, world: DemoWorld) -> None:
    (one,) = verdicts["gated"]
    assert (one["attested"], one["status"], one["withheld"], one["refusal"]) == (True, "guarded", False, None)
    assert [lora["name"] for lora in one["run"]["safety_loras"]] == [world.safety.name]
    assert [lora["name"] for lora in one["run"]["task_loras"]] == [world.task.name]
    assert one["run"]["evaluations"] == 2
    assert (one["gate"]["flagged"], one["gate"]["changed"]) == (False, False)


def test_an_edit_by_a_node_that_is_known_is_named(verdicts: Json) -> None:
    (one,) = verdicts["scaled-save"]
    assert (one["attested"], one["status"]) == (True, "guarded; edited: ImageScale")
    assert one["edited_by"] == [{"type": "ImageScale", "action": None}]


def test_an_image_that_nobody_vouches_for_is_unattested_and_the_nodes_it_passed_through_are_named(
    verdicts: Json,
) -> None:
    (one,) = verdicts["edited"]
    assert (one["attested"], one["status"], one["run"]) == (False, "unattested", None)
    assert one["why"] == "passed through ImageInvert: not vouched for"
    assert one["passed_through"] == ["ImageInvert"]
    assert one["file"]


def test_stock_nodes_that_save_or_show_answer_with_a_verdict_too(verdicts: Json) -> None:
    assert verdicts["stock"][0] | {"file": None} == verdicts["save-0"][0] | {"file": None}
    assert verdicts["shown"][0] | {"file": None} == verdicts["edited"][0] | {"file": None}
    assert verdicts["shown"][0]["file"]["type"] == "temp"


def test_a_withheld_image_is_a_result_with_a_reason_and_nothing_of_it_is_written(
    ran: Json, verdicts: Json, place: Path
) -> None:
    assert ran["history"]["status"]["status_str"] == "success"
    (one,) = verdicts["withheld"]
    assert (one["withheld"], one["file"], one["gate"]["flagged"]) == (True, None, True)
    assert one["refusal"]["rule"] == "gate.withhold"
    assert one["refusal"]["reason"].startswith("blocked by ")
    assert one["refusal"]["remedy"]
    found = [label for label in one["gate"]["findings"] if label["blocked"]]
    assert found
    assert all(label["score"] >= label["threshold"] == 1e-9 for label in found)
    assert not {"never", "unseen"} & set(ran["history"]["outputs"])
    assert not list((place / "output").glob("never*"))


def worker(client: Client, outputs: Json) -> list[tuple[str, bytes]]:
    """Node and file of each image that a host hands on which reads `images` alone, as RunPod's worker-comfyui does."""
    found = []
    for name, output in outputs.items():
        for image in output.get("images", []):
            if image["type"] != "temp":
                reference = {key: image[key] for key in ("filename", "subfolder", "type")}
                found.append((name, client.image(reference)))
    return found


def test_a_host_that_reads_images_alone_gets_those_that_were_saved_in_order(
    ran: Json, server: Server, verdicts: Json
) -> None:
    found = worker(Client(server.url), ran["history"]["outputs"])
    assert sorted(name for name, _ in found) == sorted(
        [
            *("save-0", "edited", "scaled-save", "gated", "stock"),
            *["three-saved"] * 2,
        ]
    )
    (plain,), saved = (
        [Image.open(io.BytesIO(data)).convert("RGB") for node, data in found if node == name]
        for name in ("save-0", "three-saved")
    )
    assert [one.tobytes() for one in saved] == [plain.tobytes(), ImageOps.mirror(plain).tobytes()]
    files = ran["history"]["outputs"]["three-saved"]["images"]
    assert [one["file"] for one in verdicts["three-saved"]] == [files[0], None, files[1]]
    assert [one["withheld"] for one in verdicts["three-saved"]] == [False, True, False]
    assert verdicts["three-saved"][1]["refusal"]["rule"] == "unfit"


def test_the_lines_of_the_documentation_read_it(ran: Json, server: Server, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 6
    script = tmp_path / "read.py"
    script.write_text(
        code.replace("http://127.0.0.1:8188", server.url).replace("PROMPT_ID", ran["id"]), encoding="utf-8"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True).stdout
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert set(lines) == OUTPUT
    assert "guarded" in lines["gated"]
    assert "unattested" in lines["edited"]
    assert "blocked by" in lines["withheld"]


@pytest.mark.parametrize("told", ["brief", "none"])
def test_a_policy_cuts_down_what_the_history_tells(
    told: str, server: Server, place: Path, world: DemoWorld, ran: Json
) -> None:
    policy = place / "user" / "__modular_lora" / "policy.toml"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text(
        f'[guard]\nrequired = []\n[open]\nunattested = true\n[history]\nverdict = "{told}"\n', encoding="utf-8"
    )
    asyncio.run(asyncio.sleep(2.5))  # the server looks once a second
    client = Client(server.url)
    try:
        outputs = client.history(client.run(graph(world), timeout=300).prompt_id)["outputs"]
    finally:
        policy.unlink()
        asyncio.run(asyncio.sleep(2.5))
    ours = {name: out for name, out in outputs.items() if name not in ("guard-report", "run-report")}
    said = json.dumps(ours)
    assert outputs["save-0"]["images"]
    assert world.safety.name not in said
    assert "racing-car" not in said
    assert "sha256" not in said
    if told == "none":
        assert not any(KEY in out or "text" in out for out in ours.values())
        return
    for name in OUTPUT:
        for one in ours[name][KEY]:
            jsonschema.validate(one, SCHEMA)
    assert ours["withheld"][KEY][0]["refusal"] == {"rule": "gate.withhold", "code": "gate.blocked"}
    assert ours["save-0"]["text"] == ["1 of 1 images attested"]


def with_guard(world: DemoWorld, seed: int) -> Graph:
    """An ordinary graph of one step, with the node Guard."""
    setting = world.setting(steps=1, seed=seed, prompts=("gloss, cat face",))
    made = graphs.checkpoint(setting)
    loaded: Json = {name: ["checkpoint", i] for i, name in enumerate(("model", "clip", "vae"))}
    made["drop-in"] = node("ModularLoraGuard", **loaded, lora_name=world.safety.name, strength=1.0)
    made |= graphs.branches(setting, graphs.STOCK, "drop-in", model=["drop-in", 0], clip=["drop-in", 1])
    return made


def test_a_page_hears_of_its_own_runs_on_guard_and_of_none_that_was_queued_without_an_id(
    server: Server, world: DemoWorld
) -> None:
    """The server sends in order: what of the first run were for every page would come before the second run's end."""

    class Page(Client):
        def __init__(self, url: str) -> None:
            super().__init__(url)
            self.reports: list[Json] = []

        def submit(self, prompt: Json, client_id: str | None = None) -> str:
            before = super().submit(with_guard(world, 11))
            self.history(before)  # until it has ended
            return super().submit(prompt, client_id)

        def _handle(self, kind: str, data: Json, prompt_id: str, on_event: Any) -> bool:
            if kind == "modular_lora.report":
                self.reports.append(data)
            return super()._handle(kind, data, prompt_id, on_event)

    page = Page(server.url)
    page.run(with_guard(world, 12), timeout=300)
    assert [data["node"] for data in page.reports] == ["drop-in"]
    assert page.reports[0]["run"].startswith("Guarded: ")
