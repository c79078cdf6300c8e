"""Names of saved images: as the stock Save Image has them, and never one that is taken."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from conftest import new_executor
from modular_lora_guard.modular_lora.provenance.marking import KEYWORD
from modular_lora_guard.modular_lora.util import plain_json
from PIL import Image
from support.gate_graphs import KEY, gated_run, install_stub, part
from support.graphs import guarded_graph


def held(folder: Path) -> dict[Path, str]:
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "prefix",
    ["plain", "", "names/", "names//", "names/.", "a%batch_num%", "%batch_num%", "deep/%batch_num%/x", "."],
)
def test_what_was_saved_before_is_never_written_over(prefix, comfy, run_graph, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path))
    graph = guarded_graph()
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["save"]["inputs"]["filename_prefix"] = prefix
    before: dict[Path, str] = {}
    for i in range(3):
        graph["sample"]["inputs"]["seed"] = 100 + i % 2
        graph["save"]["inputs"]["unattested"] = ["refuse", "save and say so"][i % 2]  # so that it runs again
        run_graph(graph)
        now = held(tmp_path)
        assert before.items() <= now.items()
        assert len(now) == 2 * (i + 1)
        before = now
    assert not [file for file in before if file.name.startswith(".part-")]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_no_graph_beside_an_image_is_written_over(format, comfy, run_graph, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path))
    install_stub(comfy, monkeypatch).score = lambda image: 0.0
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": "b%batch_num%", "format": format}
    (tmp_path / "b1_00001_.json").write_text("mine")
    (tmp_path / "b2_00002_.part").write_text("mine")
    for _ in range(2):
        before = held(tmp_path)
        run_graph(graph)
        assert before.items() <= held(tmp_path).items()
        graph["save"]["inputs"]["quality"] = 90
    for file in tmp_path.glob("*.json"):
        if file.read_text() != "mine":
            said = json.loads(file.read_text())
            assert (tmp_path / said["file"]).with_suffix(".json") == file


@pytest.mark.parametrize("length", [200, 243, 244])
def test_a_prefix_as_long_as_names_can_be_is_saved_as_the_stock_node_does(
    length, comfy, run_graph, loras, tmp_path, monkeypatch
):
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path))
    graph = guarded_graph()
    graph["save"]["inputs"]["filename_prefix"] = "n" * length
    graph["stock"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "s" * length}}
    run_graph(graph, new_executor(comfy))  # the stock node keeps the folder in which it saved first
    assert sorted(len(file.name) for file in tmp_path.iterdir()) == [length + 11] * 2


@pytest.mark.parametrize("graph", [{}, {"prompt": {}}], ids=["alone", "with a graph"])
def test_a_name_that_is_taken_between_looking_and_writing_stays_as_it_is(graph, comfy, tmp_path, monkeypatch):
    save = part(comfy, "comfy_host.saving")
    path = tmp_path / "a.image"
    write = Path.write_bytes

    def meanwhile(file: Path, content: bytes) -> int:
        path.write_text("theirs")
        return write(file, content)

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    with pytest.raises(FileExistsError):
        save._write(path, b"ours", graph)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.image", "theirs")]


def test_a_graph_with_nan_gives_json_that_every_reader_takes(comfy, run_graph, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path))
    graph = guarded_graph()
    graph["unused"] = {"class_type": "PrimitiveFloat", "inputs": {"value": math.nan, "other": [math.inf, 1.5]}}
    run_graph(graph)
    (file,) = tmp_path.iterdir()
    with Image.open(file) as image:
        texts = image.text

    def refuse(name: str) -> None:
        raise ValueError(name)

    said = {key: json.loads(value, parse_constant=refuse) for key, value in texts.items() if key != KEYWORD}
    assert said["prompt"]["unused"]["inputs"] == {"value": None, "other": [None, 1.5]}
    assert said[KEY]["status"] == "guarded"


def test_numbers_that_are_none_become_null_and_all_else_stays():
    value = {"a": [1, 2.5, math.nan, (math.inf, -math.inf)], "b": {"c": "NaN", "d": True, "e": None}}
    assert json.loads(plain_json.dumps(value)) == {"a": [1, 2.5, None, [None, None]], "b": value["b"]}
    assert plain_json.dumps({"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'
