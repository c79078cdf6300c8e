"""The pack in a real ComfyUI server, through HTTP and websocket, as the front end uses it."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from modular_lora_guard.tools.bootstrap.paths import PACK_NAME, ROOT
from modular_lora_guard.tools.demo import base, graphs, images, settings, show
from modular_lora_guard.tools.demo.client import Client, Event, Failed, Interrupted, Rejected
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.world import DATA_SET
from PIL import Image

pytestmark = pytest.mark.server
COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
NODE_IDS = {
    "ModularLoraLoadSafety",
    "ModularLoraLoadTask",
    "ModularLoraGuardModel",
    "ModularLoraGuardedAsModel",
    "ModularLoraKSampler",
    "ModularLoraKSamplerAdvanced",
    "ModularLoraGuider",
    "ModularLoraDecode",
    "ModularLoraDecodeTiled",
    "ModularLoraSaveImage",
    "ModularLoraInterference",
    "ModularLoraMakeSafety",
    "ModularLoraCombineSafety",
    "ModularLoraTrainTask",
    "ModularLoraTrainSafety",
    "ModularLoraTaskTrainingOptions",
    "ModularLoraSafetyTrainingOptions",
    "ModularLoraDatasetReport",
    "ModularLoraProjectTask",
    "ModularLoraCalibrateSafety",
    "ModularLoraConceptPrompts",
}
GUARDED_TYPE = "MODULAR_LORA_GUARDED_MODEL"


@pytest.fixture(scope="module")
def server(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    with Server(Path(COMFYUI or ""), sys.executable, folder / "base", log=folder / "server.log", cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def setting(world: DemoWorld) -> graphs.Setting:
    return world.setting(steps=2, seed=7, prompts=("gloss, racing car", "gloss, cat face"))


def refused(client: Client, graph: Graph) -> Rejected:
    with pytest.raises(Rejected) as caught:
        client.submit(graph)
    return caught.value


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def draw(client: Client, graph: Graph) -> list[bytes]:
    result = client.run(graph, timeout=300)
    saves = sorted(name for name in graph if name.startswith("save-"))
    return [client.image(image) for name in saves for image in result.images(name)]


def test_every_node_is_there_with_a_tooltip_on_every_input_and_output(client: Client) -> None:
    info = client.get_json("/object_info")
    assert set(info) >= NODE_IDS
    for name in NODE_IDS:
        entry = info[name]
        assert entry["description"], name
        assert entry["category"].startswith("modular lora"), name
        for section in ("required", "optional"):
            for key, spec in entry["input"].get(section, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{key}"
        assert all(entry["output_tooltips"]), name


def test_files_are_offered_in_the_drop_downs(client: Client, world: DemoWorld) -> None:
    info = client.get_json("/object_info/ModularLoraLoadSafety")["ModularLoraLoadSafety"]
    kind, options = info["input"]["required"]["lora_name"]
    names = options["options"] if kind == "COMBO" else kind
    assert {world.safety.name, world.task.name} <= set(names)
    assert len(names) == len(set(names))


def test_the_guarded_graph_draws_attested_images_with_progress(client: Client, setting: graphs.Setting) -> None:
    events: list[Event] = []
    result = client.run(graphs.guarded(setting), events.append, timeout=300)
    assert {event.node for event in events if event.maximum} == {"sampler-0", "sampler-1"}
    assert max(event.value for event in events) == setting.steps
    assert "guarded" in result.text("guard-report")
    assert f"over {setting.steps} evaluations" in result.text("run-report")
    for index in range(2):
        (reference,) = result.images(graphs.save_node(index))
        png = client.image(reference)
        (record,) = images.attestation(png).values()
        assert record["status"] == "guarded"
        assert [lora["name"] for lora in record["loras"]] == [setting.safety, setting.task]


def test_unguarded_images_carry_no_attestation_and_differ(
    client: Client, world: DemoWorld, setting: graphs.Setting
) -> None:
    asked = world.demo(steps=2, seed=7, prompts=setting.prompts)
    drawn = {arm: draw(client, graph(asked)) for arm, graph in _arms().items()}
    assert all(len(pngs) == 2 for pngs in drawn.values())
    assert not images.attestation(drawn["unguarded"][0])
    others = [pixels(pngs[0]) for arm, pngs in drawn.items() if arm != "first"]
    assert len(set(others)) == len(others)
    first, safety = (list(map(pixels, drawn[arm])) for arm in ("first", "safety"))
    assert first[0] == safety[0], "of a vehicle, safety first draws what the safety LoRA alone does"
    assert first[1] != safety[1]


def _arms() -> dict[str, Callable[[graphs.Setting], Graph]]:
    return {plan.key: plan.graph for plan in show.PLANS}


@pytest.mark.slow
def test_the_demo_leaves_images_and_a_report_that_needs_no_network(
    server: Server, world: DemoWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show.show(server, world, steps=2, seed=1, output=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    arms, prompts = len(show.PLANS), len(settings.SUPPRESSED + settings.KEPT)
    assert page.count("data:image/png;base64,") == arms * prompts
    assert page.count("<small>activity ") == 4 * prompts, "under every picture of a guarded arm"
    assert not re.search(r"""(?:src|href|action)=["']?http|url\(["']?http""", page)
    assert "https://" not in page
    assert f"{prompts} of {prompts} guarded images" in page
    assert "&#34;status&#34;: &#34;guarded&#34;" in page
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > arms * 64
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == arms * prompts
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def _stock(name: str, setting: graphs.Setting) -> Graph:
    """The guarded graph whose GUARDED_MODEL goes into a stock node instead of a guarded sampler."""
    whole = graphs.guarded(setting)
    graph = {key: whole[key] for key in ("checkpoint", "safety", "task", "guard")}
    guarded, clip = ["guard", 0], ["guard", 1]
    model: list[Any] = ["stock", 0]
    if name == "LoraLoader":
        graph["stock"] = node(
            name, lora_name=setting.task, strength_model=1.0, strength_clip=1.0, model=guarded, clip=clip
        )
    elif name == "ModelMergeSimple":
        graph["stock"] = node(name, model1=guarded, model2=["checkpoint", 0], ratio=0.5)
    elif name == "ModelSave":
        return graph | {"stock": node(name, model=guarded, filename_prefix="stolen")}
    else:
        model = guarded
    return graph | graphs.branches(setting, graphs.STOCK, "stock", model=model, clip=clip)


@pytest.mark.parametrize("name", ["LoraLoader", "KSampler", "ModelSave", "ModelMergeSimple"])
def test_a_guarded_model_has_no_link_into_stock_nodes(name: str, client: Client, setting: graphs.Setting) -> None:
    error = refused(client, _stock(name, setting))
    assert error.status == 400
    assert "return_type_mismatch" in error.types()
    assert GUARDED_TYPE in str(error)


@pytest.mark.parametrize(
    ("loader", "inputs", "words"),
    [
        ("safety", {"lora_name": "no_such_file.safetensors"}, "no_such_file.safetensors"),
        ("task", {"lora_name": "no_such_file.safetensors"}, "no_such_file.safetensors"),
        ("safety", {"strength": 0.0}, "must be above 0: 0 disables the safety LoRA"),
        ("safety", {"strength": -1.0}, "must be above 0: 0 disables the safety LoRA"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    loader: str, inputs: dict[str, Any], words: str, client: Client, setting: graphs.Setting
) -> None:
    graph = graphs.guarded(setting)
    graph[loader]["inputs"].update(inputs)
    error = refused(client, graph)
    assert error.status == 400
    assert "custom_validation_failed" in error.types()
    assert words in str(error)


def test_an_unguarded_model_stops_at_the_guarded_sampler(client: Client, setting: graphs.Setting) -> None:
    graph = graphs.checkpoint(setting) | graphs.branches(
        setting, graphs.GUARDED, "none", model=["checkpoint", 0], clip=["checkpoint", 1]
    )
    with pytest.raises(Failed) as caught:
        client.run(graph, timeout=300)
    assert caught.value.kind == "ModularLoraKSampler"
    assert "guard" in caught.value.reason.lower()


def test_an_interrupt_ends_the_run_and_the_next_one_is_whole(
    client: Client, world: DemoWorld, setting: graphs.Setting
) -> None:
    before = draw(client, graphs.base(setting))
    sent: list[Event] = []

    def interrupt(event: Event) -> None:
        if event.value and not sent:
            sent.append(event)
            client.interrupt()

    long = world.setting(steps=5000, seed=3, prompts=setting.prompts[:1])
    with pytest.raises(Interrupted):
        client.run(graphs.guarded(long), interrupt, timeout=300)
    assert sent
    again = world.setting(steps=2, seed=8, prompts=setting.prompts)
    assert all(images.attestation(png) for png in draw(client, graphs.guarded(again)))
    other = world.setting(steps=2, seed=9, prompts=setting.prompts)
    draw(client, graphs.base(other))  # so that nothing of the first run is left in the cache
    assert [pixels(png) for png in draw(client, graphs.base(setting))] == [pixels(png) for png in before]


def test_the_server_answers_while_it_trains(client: Client, setting: graphs.Setting) -> None:
    graph = graphs.checkpoint(setting)
    entry = client.get_json("/object_info/ModularLoraTrainTask")["ModularLoraTrainTask"]["input"]
    inputs = entry["required"] | entry["optional"]
    given = {name: options["default"] for name, (_, options) in inputs.items() if "default" in options}
    given |= {name: ["checkpoint", slot] for slot, name in enumerate(("model", "clip", "vae"))}
    given |= {"data_set": DATA_SET, "resolution": 64, "target": "cross-attention", "max_train_steps": 4}
    graph["train"] = node("ModularLoraTrainTask", **given)
    graph["report"] = node("PreviewAny", source=["train", 1])
    running: dict[int, int] = {}

    def ask(event: Event) -> None:
        if event.node == "train" and event.maximum == given["max_train_steps"]:
            running[event.value] = len(client.get_json("/queue")["queue_running"])

    result = client.run(graph, ask, timeout=300)
    assert set(running.values()) == {1}
    assert result.text("report").startswith("Trained in 4 steps and saved.\nsaved as lora.safetensors in loras")
    with Image.open(io.BytesIO(client.image(result.images("train")[0]))) as curve:
        assert curve.size == (640, 360)


def test_the_workflows_are_in_the_template_browser(client: Client) -> None:
    expected = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert expected
    assert set(client.get_json("/workflow_templates").get(PACK_NAME, [])) == expected
    for name in expected:
        assert client.get_json(f"/api/workflow_templates/{PACK_NAME}/{quote(name)}.json")["nodes"]


def test_english_names_are_served_for_every_node(client: Client) -> None:
    definitions = client.get_json("/i18n")["en"]["nodeDefs"]
    assert set(definitions) >= NODE_IDS
    assert all(definitions[name]["display_name"] for name in NODE_IDS)


@pytest.mark.parametrize("name", sorted(NODE_IDS))
def test_every_node_has_a_help_page(name: str, client: Client) -> None:
    folder = ROOT / "web" / "docs"
    page = f"{name}.md" if (folder / f"{name}.md").exists() else f"{name}/en.md"
    text = client.get(f"/extensions/{PACK_NAME}/docs/{page}").decode()
    assert len(text) > 100
