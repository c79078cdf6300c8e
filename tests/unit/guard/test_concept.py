"""Concept prompts in a safety LoRA's metadata: read strictly, written into a copy whose tensors are the same bytes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import concept
from modular_lora_guard.training import cli
from safetensors import safe_open
from safetensors.torch import save_file
from support.errors import refuses

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(str.strip)


def lora(path, **metadata):
    torch.manual_seed(0)
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    tensors = {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(2.0)}, path, {"ss_note": "é", **metadata})
    return path


def body(path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@given(st.lists(TEXT, min_size=1, max_size=concept.MOST, unique=True))
def test_a_copy_says_what_was_written_and_its_tensors_are_the_same_bytes(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("copy")
    source, target = lora(folder / "s.safetensors"), folder / "t.safetensors"
    before = source.read_bytes()
    made = concept.write_copy(source, target, prompts)
    assert source.read_bytes() == before
    assert body(target) == body(source)
    assert (made.path, made.name, concept.read(made)) == (target, "t.safetensors", tuple(prompts))
    with safe_open(target, "pt") as file:  # another reader than ours
        assert file.metadata() == {"ss_note": "é", concept.PROMPTS_KEY: json.dumps(prompts)}
    assert concept.write_copy(source, target, prompts).sha256 == made.sha256  # the same again
    assert sorted(os.listdir(folder)) == ["s.safetensors", "t.safetensors"]


def test_nothing_is_written_over(tmp_path):
    source = lora(tmp_path / "s.safetensors")
    before = source.read_bytes()
    for target in (source, lora(tmp_path / "other.safetensors", other="1")):
        held = target.read_bytes()
        with refuses("concept.name-taken"):
            concept.write_copy(source, target, ["a car"])
        assert target.read_bytes() == held
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "s.safetensors"]


WRONG = {
    "no JSON": "a car",
    "no list": '{"a": 1}',
    "a text": '"a car"',
    "empty": "[]",
    "a number": '["a car", 3]',
    "a list": '[["a car"]]',
    "blank": '["a car", "  "]',
    "many": json.dumps([f"car {i}" for i in range(33)]),
    "long": json.dumps(["x" * 501]),
    "surrogate": '["\\ud800"]',
    "NUL": '["a\\u0000"]',
    "deep": "[" * 20_000,
    "huge": '["' + "x" * 300_000 + '"]',
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_malformed_value_is_an_error_that_names_the_file(kind, tmp_path):
    file = read_lora(lora(tmp_path / "bad.safetensors", **{concept.PROMPTS_KEY: WRONG[kind]}))
    with refuses("file.concept-prompts", "bad.safetensors", "modular_lora.concept_prompts") as error:
        concept.read(file)
    assert len(str(error.value)) < 500


def test_a_file_without_the_key_has_none(tmp_path):
    assert concept.read(read_lora(lora(tmp_path / "s.safetensors"))) == ()


def test_trainers_write_the_prompts_that_fit():
    assert json.loads(concept.trained(["a car", "x" * 501, "a car", "a bus"])) == ["a car", "a bus"]
    assert len(json.loads(concept.trained([f"car {i}" for i in range(50)]))) == concept.MOST
    assert concept.trained(["x" * 501]) == ""


def test_the_command_writes_a_copy(tmp_path, capsys):
    source, target = lora(tmp_path / "s.safetensors"), tmp_path / "t.safetensors"
    (tmp_path / "p.txt").write_text("\ufeffa bus\n\n a tram \n", encoding="utf-8")
    words = ["--prompt", "a car", "--prompts_file", str(tmp_path / "p.txt"), "--output", str(target)]
    assert cli.main(["concept-prompts", str(source), *words]) == 0
    assert concept.read(read_lora(target)) == ("a car", "a bus", "a tram")
    assert "3 concept prompts" in capsys.readouterr().out
    assert cli.main(["concept-prompts", str(source), "--output", str(tmp_path / "none.safetensors")]) == 1
    assert not (tmp_path / "none.safetensors").exists()
