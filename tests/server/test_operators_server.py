"""The operator's policy in a real ComfyUI server: what HTTP answers, what runs, and what HTTP cannot reach."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.provenance.record import verify
from modular_lora_guard.tools.demo import base, graphs, images
from modular_lora_guard.tools.demo.client import Client, Event, Failed, Rejected
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import DIRECT, Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from PIL import Image

pytestmark = pytest.mark.server
COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
PROTECTED = "__modular_lora"
MARK = "told to nobody"  # stands in the policy


@pytest.fixture(scope="module")
def server(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operator")
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    _policy(folder / "base").parent.mkdir()
    _policy(folder / "base").write_text(_enforced(world), encoding="utf-8")
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=folder / "server.log", cpu=True) as running:
        yield running


@pytest.fixture
def policy(server: Server, world: DemoWorld) -> Iterator[Path]:
    """The policy's file, put back afterwards."""
    yield _policy(server.base)
    _policy(server.base).write_text(_enforced(world), encoding="utf-8")


@pytest.fixture(scope="module")
def setting(world: DemoWorld) -> graphs.Setting:
    return world.setting(steps=2, seed=7, prompts=("gloss, racing car",))


def _policy(folder: Path) -> Path:
    return folder / "user" / PROTECTED / "policy.toml"


def _enforced(world: DemoWorld, least: float = 0.9) -> str:
    sha256 = hashlib.sha256(world.safety.read_bytes()).hexdigest()
    return f'# {MARK}\n[guard]\nrequired = [{{sha256 = "{sha256}", min_net_strength = {least}}}]\n'


def _refused(client: Client, graph: Graph) -> dict[str, dict]:
    """Node -> what the server's answer says of it."""
    with pytest.raises(Rejected) as caught:
        client.submit(graph)
    assert caught.value.status == 400
    return caught.value.body["node_errors"]


def _lines(server: Server, kind: str) -> list[dict]:
    files = sorted((_policy(server.base).parent / "record").glob("record-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_an_unguarded_graph_is_answered_with_400_on_its_nodes_and_nothing_is_queued(
    server: Server, client: Client, setting: graphs.Setting
) -> None:
    errors = _refused(client, graphs.base(setting))
    assert set(errors) == {"sampler-0", next(name for name in errors if name.startswith("save-"))}
    (error,) = errors["sampler-0"]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert "Node sampler-0 (KSampler)" in error["details"]
    assert "(policy: nodes.sampling)" in error["details"]
    assert "use Guarded KSampler" in error["details"]
    assert client.get_json("/queue") == {"queue_running": [], "queue_pending": []}
    _until(lambda: any(line.get("node") == "sampler-0" for line in _lines(server, "refused")))
    said = [line for line in _lines(server, "refused") if line.get("node") == "sampler-0"]
    assert said[-1]["rule"] == "nodes.sampling"
    assert uuid.UUID(said[-1]["prompt_id"])
    assert uuid.UUID(said[-1]["execution"])


MEBIBYTE = 2**20
HEAVY = {  # 21 MiB and more each; name -> graph, lines of its refusals
    "types of 1 MiB": ({f"{i}": node(f"{i}" * MEBIBYTE) for i in range(21)}, 1),
    "a node's id of 21 MiB": ({"x" * 21 * MEBIBYTE: node("KSampler")}, 1),
    "an input's name of 21 MiB": ({"1": node("KSampler", **{"x" * 21 * MEBIBYTE: 1})}, 1),
    "a text of 21 MiB": ({"1": node("Unknown", text="x" * 21 * MEBIBYTE)}, 1),
    "a hundred thousand nodes": ({f"{i}": node("KSampler", text="x" * 200) for i in range(100_000)}, 1),
    "a node with a hundred thousand inputs": ({"1": node("KSampler", **{f"{i}": "x" * 200 for i in range(10**5)})}, 1),
    "four thousand refusals": ({f"{i}": node(f"Unknown{i}", text="x" * 5500) for i in range(4000)}, 51),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_prompt_is_refused_in_bounded_lines_while_the_server_goes_on(
    name: str, server: Server, client: Client
) -> None:
    graph, count = HEAVY[name]
    mine = uuid.uuid4().hex
    folder = _policy(server.base).parent / "record"
    before = sum(file.stat().st_size for file in folder.iterdir())
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.post_json("/prompt", {"prompt": graph, "prompt_id": mine})
    assert caught.value.code == 400
    assert len(caught.value.read()) < MEBIBYTE
    own = lambda: [line for line in _lines(server, "refused") if line["prompt_id"] == mine]  # noqa: E731
    _until(lambda: len(own()) >= count)
    assert len(own()) == count
    assert sum(file.stat().st_size for file in folder.iterdir()) - before < MEBIBYTE
    assert verify(folder).whole
    if count == 51:
        assert own()[-1]["more"] == {"nodes": 3950}
        assert "3950 more refusals" in own()[-1]["reason"]
    assert client.get_json("/queue") == {"queue_running": [], "queue_pending": []}


def test_targets_of_a_partial_run_do_not_spare_the_rest(client: Client, setting: graphs.Setting) -> None:
    graph = graphs.base(setting)
    body = {"prompt": graph, "partial_execution_targets": [next(n for n in graph if n.startswith("save-"))]}
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.post_json("/prompt", body)
    assert caught.value.code == 400
    assert "sampler-0" in json.loads(caught.value.read())["node_errors"]


@pytest.mark.parametrize("prompt", [None, [], "x", {"1": None}, {"1": {"class_type": "KSampler"}}, {"1": {}}])
def test_what_is_no_graph_is_answered_with_400(prompt: object, client: Client) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.post_json("/prompt", {"prompt": prompt})
    assert caught.value.code == 400


def test_a_guarded_graph_draws_attested_images_and_each_run_is_in_the_record(
    server: Server, client: Client, world: DemoWorld, setting: graphs.Setting
) -> None:
    result = client.run(graphs.guarded(setting), timeout=300)
    (image,) = result.images(graphs.save_node(0))
    (record,) = images.attestation(client.image(image)).values()
    assert record["status"] == "guarded"
    (run,) = [line for line in _lines(server, "run") if line["prompt_id"] == result.prompt_id]
    assert run["node"] == "sampler-0"
    assert run["attestation"]["net_strength"] == record["net_strength"]
    assert "prompts" not in run
    assert verify(_policy(server.base).parent / "record").whole


def test_a_weak_safety_lora_or_another_file_is_refused_when_queued(client: Client, setting: graphs.Setting) -> None:
    graph = graphs.guarded(setting)
    graph["safety"]["inputs"]["strength"] = 0.5
    assert "0.9 or more" in _refused(client, graph)["guard"]["errors"][0]["details"]
    graph["safety"]["inputs"] |= {"strength": 1.0, "lora_name": setting.task}
    del graph["task"], graph["guard"]["inputs"]["task_lora"]
    assert "lacks the safety LoRA" in _refused(client, graph)["guard"]["errors"][0]["details"]


def _places() -> Iterator[str]:
    """Ways to ask for the policy's file."""
    for path in (f"../{PROTECTED}/policy.toml", f"{PROTECTED}/policy.toml", f"..\\{PROTECTED}\\policy.toml"):
        quoted = urllib.parse.quote(path, safe="")
        yield f"/userdata/{quoted}"
        yield f"/userdata/{urllib.parse.quote(quoted, safe='')}"
        yield f"/api/userdata/{quoted}"
    for folder in (f"../user/{PROTECTED}", f"user/{PROTECTED}", "."):
        for kind in ("output", "input", "temp"):
            asked = {"filename": "policy.toml", "subfolder": folder, "type": kind}
            yield f"/view?{urllib.parse.urlencode(asked)}"
    yield f"/view?filename={urllib.parse.quote(f'../user/{PROTECTED}/policy.toml', safe='')}&type=output"
    yield f"/userdata?dir={urllib.parse.quote(f'../{PROTECTED}')}&recurse=true"
    yield f"/v2/userdata?path={urllib.parse.quote(f'../{PROTECTED}')}"
    yield f"/user/{PROTECTED}/policy.toml"


@pytest.mark.parametrize("header", [None, PROTECTED])
def test_no_address_gives_the_policy_away(header: str | None, server: Server) -> None:
    places = list(_places())
    assert len(places) > 20
    for place in places:
        said = _answer(urllib.request.Request(f"{server.url}{place}", headers={"Comfy-User": header} if header else {}))
        assert MARK.encode() not in said, place
        assert b"policy.toml" not in said, place


def _answer(request: urllib.request.Request) -> bytes:
    try:
        with DIRECT.open(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.read()


def test_no_address_overwrites_moves_or_deletes_the_policy(server: Server, client: Client, policy: Path) -> None:
    before = policy.read_bytes()
    quoted = urllib.parse.quote(f"../{PROTECTED}/policy.toml", safe="")
    client.post_json("/userdata/mine.toml", "x")
    ways = [
        ("POST", f"/userdata/{quoted}?overwrite=true"),
        ("DELETE", f"/userdata/{quoted}"),
        ("POST", f"/userdata/{quoted}/move/taken.toml"),
        ("POST", f"/userdata/mine.toml/move/{quoted}?overwrite=true"),
    ]
    for method, place in ways:
        for headers in ({}, {"Comfy-User": PROTECTED}):
            request = urllib.request.Request(f"{server.url}{place}", b"[guard]", headers, method=method)
            with pytest.raises(urllib.error.HTTPError):
                DIRECT.open(request, timeout=60)
    with pytest.raises(urllib.error.HTTPError):
        DIRECT.open(_upload(server, f"../user/{PROTECTED}"), timeout=60)
    assert policy.read_bytes() == before
    assert sorted(p.name for p in policy.parent.iterdir()) == ["policy.toml", "record"]


def _upload(server: Server, folder: str) -> urllib.request.Request:
    boundary = uuid.uuid4().hex
    parts = {"subfolder": folder, "type": "input", "overwrite": "true"}
    body = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in parts.items()
    )
    body += f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="policy.toml"\r\n\r\n[guard]\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return urllib.request.Request(f"{server.url}/upload/image", f"{body}--{boundary}--\r\n".encode(), headers)


def test_an_image_that_no_guarded_run_made_does_not_leave(
    server: Server, client: Client, setting: graphs.Setting
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")
    (server.base / "input" / "mine.png").write_bytes(image.getvalue())
    plain = {"load": node("LoadImage", image="mine.png"), "show": node("PreviewImage", images=["load", 0])}
    assert "(policy: open.unattested)" in _refused(client, plain)["show"]["errors"][0]["details"]
    edited = graphs.guarded(setting)
    edited["edit"] = node("ImageInvert", image=["decode-0", 0])
    edited["show"] = node("PreviewImage", images=["edit", 0])
    with pytest.raises(Failed, match="no guarded run made") as caught:
        client.run(edited, timeout=300)
    assert caught.value.kind == "PreviewImage"


def test_a_policy_that_changes_while_a_prompt_runs_stops_it(
    server: Server, client: Client, world: DemoWorld, policy: Path
) -> None:
    sent: list[Event] = []

    def tighten(event: Event) -> None:
        if event.value and not sent:
            sent.append(event)
            policy.write_text(_enforced(world, least=2.0), encoding="utf-8")

    long = world.setting(steps=40, seed=3, prompts=("gloss, cat face",))
    with pytest.raises(Failed, match="2 is the least"):
        client.run(graphs.guarded(long), tighten, timeout=300)
    assert sent
    assert _lines(server, "refused")[-1]["rule"] == "guard.required"  # written before the run's error is told


def test_a_policy_that_comes_while_an_unguarded_prompt_runs_stops_it(
    server: Server, client: Client, world: DemoWorld, policy: Path
) -> None:
    policy.unlink()
    sent: list[Event] = []

    def enforce(event: Event) -> None:
        if event.value and not sent:
            sent.append(event)
            policy.write_text(_enforced(world), encoding="utf-8")

    long = world.setting(steps=10_000, seed=4, prompts=("gloss, cat face",))
    with pytest.raises(Failed, match=r"outside of a guarded run|that is not guarded"):
        client.run(graphs.base(long), enforce, timeout=300)
    assert sent


def test_a_broken_policy_stops_everything_and_says_where_it_is_broken(
    client: Client, setting: graphs.Setting, policy: Path
) -> None:
    policy.write_text("[guard]\nrequired = [\n  {sha256 = 'short'},\n]\n", encoding="utf-8")
    errors = _refused(client, graphs.guarded(setting))
    assert "line 3, guard.required[0].sha256" in next(iter(errors.values()))["errors"][0]["details"]


def test_without_a_policy_everything_is_as_it_was(client: Client, setting: graphs.Setting, policy: Path) -> None:
    policy.unlink()
    _until(lambda: "ModularLoraRefused" not in client.get_json("/object_info"))
    result = client.run(graphs.base(setting), timeout=300)
    assert all(result.images(name) for name in graphs.base(setting) if name.startswith("save-"))


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120  # a busy machine
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
