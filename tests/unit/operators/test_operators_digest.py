"""``operator digest``: what a policy's lists of task LoRAs are made of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.operators.cli import main
from safetensors.torch import save_file

TENSORS = {"a.lora_down.weight": torch.ones(2, 4), "a.lora_up.weight": torch.full((3, 2), 0.5)}


def saved(path: Path, tensors: dict, **metadata: str) -> Path:
    save_file(tensors, path, metadata)
    return path


def test_both_are_told_and_the_tensors_are_those_of_a_file_that_was_saved_again(tmp_path, capsys):
    one = saved(tmp_path / "one.safetensors", TENSORS)
    two = saved(tmp_path / "two.safetensors", dict(reversed(TENSORS.items())), note="saved again")
    assert main(["digest", str(one), str(two)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    files = [words[1] for words in lines if words[0] == "file"]
    values = [words[1] for words in lines if words[0] == "tensors"]
    assert files == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)]
    assert files[0] != files[1]
    assert values[0] == values[1] == read_lora(one).values_sha256


def test_other_names_leave_it_and_other_values_shapes_or_dtypes_change_it(tmp_path):
    whole = read_lora(saved(tmp_path / "whole.safetensors", TENSORS)).values_sha256
    renamed = {name.replace("a.", "b."): value for name, value in TENSORS.items()}
    assert read_lora(saved(tmp_path / "renamed.safetensors", renamed)).values_sha256 == whole
    others = [
        {name: value * 2 for name, value in TENSORS.items()},
        {name: value.half() for name, value in TENSORS.items()},
        {**TENSORS, "a.lora_down.weight": torch.ones(2, 8)},
        {**TENSORS, "a.alpha": torch.tensor(1.0)},
    ]
    found = [read_lora(saved(tmp_path / f"{i}.safetensors", t)).values_sha256 for i, t in enumerate(others)]
    assert len({whole, *found}) == 5


def test_a_file_that_is_no_lora_is_told_in_one_line(tmp_path, caplog):
    (tmp_path / "x.safetensors").write_bytes(b"no LoRA")
    assert main(["digest", str(tmp_path / "x.safetensors")]) == 1
    (said,) = caplog.messages
    assert said.startswith("x.safetensors: ")
    assert "\n" not in said
