"""What a host asks of two real ComfyUI servers behind a proxy, whose policy is a mounted file."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from modular_lora_guard.operators import cli
from modular_lora_guard.tools.demo import base, graphs, images
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.world import DETECTOR_CONCEPTS, DETECTOR_ONNX
from support.small_proxy import HEADER, STRANGER, asked, proxy, receiver

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="connects from 127.0.0.2, which other systems must be told of"),
]
COMFYUI = os.environ.get("MODULAR_LORA_COMFYUI")
TOKEN, SECRET = "a token drawn at random", "a secret drawn at random"
ACME, OTHER = {"X-Api-Key": "key of acme"}, {"X-Api-Key": "key of other"}
TENANTS = {"key of acme": "acme", "key of other": "other"}
WORKERS = ("one", "two")


class Hosts(NamedTuple):
    """Two servers, the proxy in front of them, and what came to the webhook."""

    workers: tuple[Server, ...]
    front: str
    came: list[tuple[dict[str, str], bytes]]
    policy: Path

    def records(self) -> list[Path]:
        places = zip(self.workers, WORKERS, strict=True)
        return [server.base / "user" / "__modular_lora" / f"record-{name}" for server, name in places]

    def lines(self, kind: str, worker: int = 0) -> list[dict]:
        files = sorted(self.records()[worker].glob("record-*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def run(self, graph: graphs.Graph, key: dict[str, str]) -> dict[str, Any]:
        """The history of a prompt that was sent through the proxy."""
        status, said = asked(f"{self.front}/prompt", key, {"prompt": graph})
        assert (status, said.get("node_errors")) == (200, {}), said
        place = f"{self.front}/history/{said['prompt_id']}"
        until(lambda: asked(place, key)[1])
        return asked(place, key)[1][said["prompt_id"]]


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300  # a busy machine
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hosts(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "monitor.token").write_text(TOKEN, encoding="utf-8")
    policy = folder / "mounted.toml"
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        hook, came = stack.enter_context(receiver([503, 302]))  # the first message comes at its third try
        patch.setenv("MODULAR_LORA_POLICY_FILE", str(policy))
        patch.setenv("HOOK_SECRET", SECRET)
        policy.write_text(
            f"""[guard]
required = [{{sha256 = "{sha256(world.safety)}", min_net_strength = 0.9}}]
[record]
folder = "record-{{worker}}"
[gate]
review_folder = "review"
[monitor]
token = "monitor.token"
[webhook]
url = "{hook}/refused"
secret = "env:HOOK_SECRET"
[tenants]
header = "{HEADER}"
proxies = ["127.0.0.2"]
loras = {{ acme = ["{sha256(world.task)}"] }}
""",
            encoding="utf-8",
        )
        servers = []
        for name in WORKERS:
            place = folder / name
            base.prepare(place, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
            patch.setenv("MODULAR_LORA_WORKER", name)
            servers.append(
                Server(
                    Path(COMFYUI or ""),
                    sys.executable,
                    place,
                    log=folder / f"{name}.log",
                    cpu=True,
                    extra=("--disable-metadata",),
                )
            )
            servers[-1].start()
            stack.callback(servers[-1].stop)
        front = stack.enter_context(proxy([one.url for one in servers], TENANTS, lambda name: int(name == "other")))
        yield Hosts(tuple(servers), front, came, policy)


@pytest.fixture(scope="module")
def setting(world: DemoWorld) -> graphs.Setting:
    return world.setting(steps=2, seed=7, prompts=("gloss, racing car",))


def monitor(hosts: Hosts, what: str, token: str = TOKEN, worker: int = 0) -> tuple[int, Any]:
    return asked(f"{hosts.workers[worker].url}/modular_lora/{what}", {"Authorization": f"Bearer {token}"})


def figures(hosts: Hosts, worker: int = 0) -> dict[str, float]:
    """Samples of a scrape, as Prometheus' own parser reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    status, text = monitor(hosts, "metrics", worker=worker)
    assert status == 200, text
    return {
        ",".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_ready_is_proved_on_a_tiny_run_and_the_answer_is_kept(hosts: Hosts) -> None:
    status, said = monitor(hosts, "ready")
    assert status == 200, said
    assert said["ready"] is True
    assert said["refused"] == "guard.required"
    assert said["guarded"].startswith("guarded, 1 evaluations, ")
    (line,) = hosts.lines("ready")
    assert line["guarded"] == said["guarded"]
    assert monitor(hosts, "ready")[1]["checked"] == said["checked"]
    assert len(hosts.lines("ready")) == 1


@pytest.mark.parametrize("what", ["ready", "metrics"])
def test_without_the_token_nothing_is_told(what: str, hosts: Hosts) -> None:
    for token in ("", "another token, as long"):
        status, said = monitor(hosts, what, token)
        assert (status, set(said)) == (401, {"error"})


def test_an_allowed_lora_runs_for_its_tenant_whose_name_is_in_the_record_and_the_run_is_counted(
    hosts: Hosts, setting: graphs.Setting
) -> None:
    before = figures(hosts).get("modular_lora_runs_total,guarded", 0)
    history = hosts.run(graphs.guarded(setting), ACME)
    assert history["status"]["status_str"] == "success", history["status"]
    assert hosts.lines("run")[-1]["tenant"] == "acme"
    after = figures(hosts)
    assert after["modular_lora_runs_total,guarded"] == before + 1
    assert after["modular_lora_run_seconds_sum"] == pytest.approx(
        sum(line["seconds"] for line in hosts.lines("run")), abs=0.01
    )


def test_disable_metadata_leaves_out_the_graph_and_keeps_the_attestation(hosts: Hosts, setting: graphs.Setting) -> None:
    history = hosts.run(graphs.guarded(replace(setting, seed=8)), ACME)
    (image,) = history["outputs"][graphs.save_node(0)]["images"]
    file = hosts.workers[0].base / "output" / image["subfolder"] / image["filename"]
    (record,) = images.attestation(file.read_bytes()).values()
    assert record["status"] == "guarded"
    assert b"prompt" not in file.read_bytes().partition(b"IDAT")[0].replace(b"prompts", b"")


def test_another_tenant_may_not_use_that_lora_and_a_refusal_is_counted_and_sent_signed(
    hosts: Hosts, setting: graphs.Setting
) -> None:
    graph = graphs.guarded(setting)
    status, said = asked(f"{hosts.front}/prompt", OTHER, {"prompt": graph})
    assert status == 400
    assert "(policy: tasks.allow)" in said["node_errors"]["task"]["errors"][0]["details"]
    until(lambda: hosts.lines("refused", 1))
    refused = hosts.lines("refused", 1)[-1]
    assert (refused["tenant"], refused["rule"]) == ("other", "tasks.allow")
    assert figures(hosts, 1)["modular_lora_refusals_total,tasks.allow"] == 1
    until(lambda: figures(hosts, 1).get("modular_lora_webhook_total,delivered"))
    mine = [(headers, body) for headers, body in hosts.came if b"tasks.allow" in body]
    assert len(mine) == 3, "503, then a redirect, then taken"
    assert len({headers["webhook-id"] for headers, _ in mine}) == len({body for _, body in mine}) == 1
    headers, body = mine[-1]
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    wanted = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"
    said = json.loads(body)
    assert (said["type"], said["data"]["tenant"], said["data"]["node"]) == ("modular_lora.refused", "other", "task")
    assert said["data"]["execution"] == refused["execution"]
    assert not any("redirected" in headers for headers, _ in hosts.came)


def test_a_tenants_name_counts_only_once_and_from_a_listed_address(hosts: Hosts, setting: graphs.Setting) -> None:
    """The client's own word is nothing: another address, no name, or a ticket of its own making."""
    url, body = f"{hosts.workers[0].url}/prompt", {"prompt": graphs.guarded(setting)}
    forged = body | {"extra_data": {"modular_lora_ticket": "acme"}}
    from_stranger = asked(url, {HEADER: "acme", "X-Forwarded-For": "127.0.0.2"}, body, STRANGER)
    for status, said in (from_stranger, asked(url, {}, forged), asked(url, {HEADER: " "}, body)):
        assert status == 400
        (error,) = next(iter(said["node_errors"].values()))["errors"]
        assert "(policy: tenants.header)" in error["details"]
    assert asked(f"{hosts.front}/prompt", {"X-Api-Key": "of nobody"}, body)[0] == 401


def gated(setting: graphs.Setting) -> graphs.Graph:
    """A guarded image before three gates: one that flags it, one whose second detector does not, one for a person."""
    graph = graphs.guarded(setting)
    files = {"detector": "classifier", "classifier": DETECTOR_ONNX, "labels": DETECTOR_CONCEPTS, "preset": "none"}
    how = {"classes": "", "action": "blur", "provider": "CPU"}
    own = graphs.node("ModularLoraGateSettings", **files, threshold=0.0001, **how)
    nsfw = files | {"detector": "open-nsfw", "classifier": "none", "labels": "none"}
    graph["second"] = graphs.node("ModularLoraGateSettings", **nsfw, threshold=0.999, **how)
    person = {"classes": "vehicle 1\nvehicle review 0.000001", "action": "withhold"}
    graph["alone-set"] = own
    graph["confirmed-set"] = graphs.node("ModularLoraGateSettings", **own["inputs"], confirm=["second", 0])
    graph["person-set"] = graphs.node("ModularLoraGateSettings", **files, threshold=0.0, **(how | person))
    for name in ("alone", "confirmed", "person"):
        graph[name] = graphs.node("ModularLoraGate", images=["decode-0", 0], gate=[f"{name}-set", 0])
        graph[f"show-{name}"] = graphs.node("PreviewImage", images=[name, 0])
    return graph


def test_a_gate_blurs_passes_what_a_second_detector_does_not_confirm_and_keeps_what_a_person_decides(
    hosts: Hosts, setting: graphs.Setting
) -> None:
    history = hosts.run(gated(replace(setting, seed=9)), ACME)
    assert history["status"]["status_str"] == "success", history["status"]
    verdicts = {name: history["outputs"][name]["modular_lora"][0] for name in ("alone", "confirmed", "person")}
    assert {name: one["gate"]["answer"] for name, one in verdicts.items()} == {
        "alone": "block",
        "confirmed": "pass",
        "person": "review",
    }
    assert [one["gate"]["changed"] for one in verdicts.values()] == [True, False, False]
    assert verdicts["confirmed"]["gate"]["second"].startswith("open-nsfw")
    assert verdicts["person"]["withheld"]
    lines = {line["node"]: line for line in hosts.lines("gate")}
    (name,) = lines["person"]["kept"]
    (record,) = images.attestation((hosts.records()[0].parent / "review" / name).read_bytes()).values()
    assert record["status"] == "guarded"
    said = figures(hosts)
    answers = [said[f"modular_lora_gate_images_total,{answer}"] for answer in ("block", "pass", "review")]
    assert answers == [1, 1, 1]
    flags = {name.partition(",")[2]: n for name, n in said.items() if name.startswith("modular_lora_gate_flags_total")}
    counted = [line["labels"] for line in lines.values()]
    assert flags == {label: sum(one.get(label, 0) for one in counted) for one in counted for label in one}
    assert any("measured error: not measured" in text for text in history["outputs"]["alone-set"]["text"])


def test_each_worker_has_its_record_and_one_command_verifies_them_together(
    hosts: Hosts,
    setting: graphs.Setting,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hosts.run(graphs.safety_only(setting), OTHER)
    assert [line["tenant"] for line in hosts.lines("run", 1)] == ["other"]
    assert "other" not in {line["tenant"] for line in hosts.lines("run", 0)}
    records = [str(one) for one in hosts.records()]
    assert cli.main(["record", "verify", *records]) == 0
    said = capsys.readouterr().out
    assert all(one in said for one in records)
    (file,) = hosts.records()[1].glob("record-*.jsonl")
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"rule":"tasks.allow"', b'"rule":"tasks.other"'))
    assert cli.main(["record", "verify", *records]) == 1
    assert records[1] in caplog.messages[-1]
    assert records[0] not in caplog.messages[-1]
    file.write_bytes(before)


def test_a_mounted_policy_that_goes_stops_everything(hosts: Hosts, setting: graphs.Setting) -> None:
    text = hosts.policy.read_text(encoding="utf-8")
    hosts.policy.unlink()
    try:
        status, said = asked(f"{hosts.front}/prompt", ACME, {"prompt": graphs.guarded(setting)})
        assert status == 400
        assert "mounted.toml is not there" in next(iter(said["node_errors"].values()))["errors"][0]["details"]
        assert monitor(hosts, "ready")[0] == 503
    finally:
        hosts.policy.write_text(text, encoding="utf-8")
