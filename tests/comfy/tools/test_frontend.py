"""The pack's front-end files against the real node schemas: workflows, help pages, names and tooltips."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.tools.locales.cli import from_schemas
from modular_lora_guard.tools.locales.texts import LANGUAGES
from modular_lora_guard.tools.templates.graph import VIRTUAL, to_prompt
from modular_lora_guard.tools.world import (
    ASSETS,
    DATA_SET,
    DETECTOR_CONCEPTS,
    DETECTOR_ONNX,
    SAFETY_LORA,
    SEQUENTIAL_LORA,
    TASK_LORA,
)
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FEW = {  # in place of a workflow's own
    "steps": 2,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "sample_every_n_steps": 2,
    "sample_steps": 2,
    "denoising_steps": 2,
    "pool_size": 6,
    "sample_prompts": "gloss, cat face",
    "synonyms": "twemoji, racing car",
    "preserve": "twemoji, cat face",
}
PLACES = (  # model folder, file
    ("safety_loras", SAFETY_LORA),
    ("loras", TASK_LORA),
    ("loras", SEQUENTIAL_LORA),
    ("modular_lora_detectors", DETECTOR_ONNX),
    ("modular_lora_detectors", DETECTOR_CONCEPTS),
)
WORDS = ("## Input", "## Output", "## Example")

Json = dict[str, Any]


@cache
def load(name: str) -> Json:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def workflow_nodes() -> Iterator[tuple[str, Json]]:
    for file in WORKFLOWS:
        for node in load(f"workflows/{file.name}")["nodes"]:
            yield file.stem, node


@pytest.fixture(scope="session")
def schemas(comfy) -> dict[str, Json]:
    """What /object_info says of the pack's nodes."""
    found = {}
    for name, node in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("ModularLora"):
            info = node.GET_NODE_INFO_V1() if hasattr(node, "GET_NODE_INFO_V1") else node.GET_SCHEMA().get_v1_info(node)
            found[name] = info if isinstance(info, dict) else vars(info)
    assert found
    return found


def inputs(schema: Json) -> dict[str, Json]:
    """Input name -> options, required and optional."""
    return {k: v[1] for s in ("required", "optional") for k, v in schema["input"].get(s, {}).items()}


def test_there_are_workflows() -> None:
    assert ROOT / "workflows" / "1 Guard an ordinary graph.json" in WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_is_a_whole_front_end_graph(file) -> None:
    graph = load(f"workflows/{file.name}")
    assert graph["version"] == 0.4
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["last_node_id"] == max(nodes)
    assert any(node["type"] in VIRTUAL for node in graph["nodes"]), "no note explains it"
    for number, source, out, target, slot, kind in graph["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        made, taken = nodes[source]["outputs"][out]["type"], nodes[target]["inputs"][slot]["type"]
        assert made in taken.split(",") or "*" in (made, taken)
        assert kind in (made, taken)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_has_a_small_image_of_its_name(file) -> None:
    thumbnail = file.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 200_000
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 300


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_names_no_machine(file) -> None:
    assert not re.search(r"/(home|root|tmp|work|Users)/|localhost|127\.0\.0\.1", file.read_text(encoding="utf-8"))


def test_every_node_type_of_the_workflows_exists(comfy) -> None:
    known = set(comfy.nodes.NODE_CLASS_MAPPINGS) | VIRTUAL
    assert [(w, n["type"]) for w, n in workflow_nodes() if n["type"] not in known] == []


def test_every_node_of_the_pack_is_in_a_workflow(schemas) -> None:
    assert set(schemas) <= {node["type"] for _, node in workflow_nodes()}


def test_workflow_nodes_have_the_slots_of_their_schemas(schemas) -> None:
    for workflow, node in workflow_nodes():
        if schema := schemas.get(node["type"]):
            assert {slot["name"] for slot in node["inputs"]} == set(inputs(schema)), f"{workflow}: {node['type']}"
            assert [slot["type"] for slot in node["outputs"]] == list(schema["output"]), f"{workflow}: {node['type']}"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs(file, comfy, trained, run_graph) -> None:
    graph = to_prompt(load(f"workflows/{file.name}"))
    for folder, name in PLACES:
        (comfy.base / "models" / folder).mkdir(exist_ok=True)
        shutil.copyfile(ASSETS / name, comfy.base / "models" / folder / name)
    shutil.copytree(ASSETS / DATA_SET, comfy.base / "input" / DATA_SET, dirs_exist_ok=True)
    for node in graph.values():
        if "ckpt_name" in node["inputs"]:
            node["inputs"]["ckpt_name"] = trained
        node["inputs"] |= {name: few for name, few in FEW.items() if name in node["inputs"]}
    run_graph(graph)
    texts = list(comfy.server.texts.values())
    assert any(said in text for text in texts for said in ("Guarded: ", "net strength", "concept rate"))


def test_every_node_has_a_help_page(schemas) -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "web" / "docs").glob("*.md")}
    assert set(pages) == set(schemas)
    for name, schema in schemas.items():
        assert pages[name].startswith(f"# {schema['display_name']}\n"), name
        for key in inputs(schema):
            assert f"`{key}`" in pages[name], f"{name}: input {key} is not explained"
        wanted = WORDS if schema["output"] else (WORDS[0], WORDS[2])
        assert all(word in pages[name] for word in wanted), name


def test_inputs_that_are_folded_away_have_a_value_of_their_own(schemas) -> None:
    folded = {
        f"{name}.{key}": o for name, schema in schemas.items() for key, o in inputs(schema).items() if o.get("advanced")
    }
    assert {"ModularLoraGuardModel.accept_merged", "ModularLoraTaskTrainingOptions.kohya_files"} <= set(folded)
    assert [name for name, options in folded.items() if "default" not in options] == []


def test_english_names_and_tooltips_are_those_of_the_schemas(schemas) -> None:
    assert load("locales/en/nodeDefs.json") == from_schemas(schemas)


def test_english_names_every_category_of_the_node_menu(schemas) -> None:
    said = load("locales/en/main.json")["nodeCategories"]
    assert set(said) == {part for schema in schemas.values() for part in schema["category"].split("/")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translated_tooltip_keeps_the_values_of_its_drop_down(language, schemas) -> None:
    there, lost = load(f"locales/{language}/nodeDefs.json"), []
    for node, schema in schemas.items():
        for name, options in inputs(schema).items():
            said = there[node]["inputs"][name]["tooltip"]
            values = [str(value) for value in choices(schema, name) if len(str(value)) > 1]
            told = [v for v in values if re.search(rf"(?<![\w-]){re.escape(v)}(?![\w-])", options["tooltip"])]
            lost += [f"{node}.{name}: {value} not in: {said}" for value in told if value not in said]
    assert lost == []


def choices(schema: Json, name: str) -> list:
    """The values of an input's drop-down; none where it has none."""
    (kind, options) = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}[name][:2]
    return kind if isinstance(kind, list) else options.get("options") or []


def test_english_texts_hold_nothing_that_the_front_end_would_interpret() -> None:
    def texts(value: Any) -> Iterator[str]:
        for item in value.values():
            yield from texts(item) if isinstance(item, dict) else [item]

    assert [text for text in texts(load("locales/en/nodeDefs.json")) if re.search(r"[{}@|]", text)] == []
