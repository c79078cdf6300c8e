"""What is wrong with files and folders is said before ComfyUI is started and a checkpoint is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from modular_lora_guard.audit import cli as audit
from modular_lora_guard.audit import engines
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.places import check_writable
from modular_lora_guard.training import cli as training
from support.errors import refuses
from support.graphs import save_lora

ROOT = Path(__file__).resolve().parents[3]
GLOSS = str(ROOT / "tools" / "world" / "assets" / "gloss")
LAYERS = {f"lora_unet_mid_block_attentions_0_proj_{end}": LayerSpec("x", (16, 12)) for end in ("in", "out")}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a checkpoint that nothing may load, prompts, and a file where a folder should be."""

    def load(*_, **__):
        raise AssertionError("ComfyUI was started before everything was checked")

    monkeypatch.setattr(training, "comfy_host", load)
    monkeypatch.setattr(engines.Here, "open", load)
    (tmp_path / "base.safetensors").write_bytes(b"never read")
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "prompts.txt").write_text("a car\n")
    save_lora(tmp_path / "safety.safetensors", LAYERS, rank=2, seed=1)
    return tmp_path


TASK = {"train_data_dir": GLOSS, "output_dir": "{}/out"}
SAFETY = {"concept": "a car", "output_dir": "{}/out"}
AUDIT = {"safety": "{}/safety.safetensors", "unsafe_prompts": "{}/prompts.txt", "output_dir": "{}/out"}


def words(place: Path, *first: str, **values: str) -> list[str]:
    pairs = ((f"--{name}", value.format(place)) for name, value in values.items())
    return [*first, "--checkpoint", str(place / "base.safetensors"), *(part for pair in pairs for part in pair)]


@pytest.mark.parametrize(
    ("command", "values", "fragment"),
    [
        ("train-task", TASK | {"output_dir": "{}/taken/out"}, "output_dir"),
        ("train-task", TASK | {"train_data_dir": "{}/none"}, "none"),
        ("train-task", TASK | {"safety_lora": "{}/none.safetensors"}, "none.safetensors"),
        ("train-task", TASK | {"network_weights": "{}/none.safetensors"}, "none.safetensors"),
        ("train-task", TASK | {"resume": "{}/none"}, "resume"),
        ("train-task", TASK | {"known_bases": "{}/none.json"}, "none.json"),
        ("train-task", TASK | {"vae": "{}/none.safetensors"}, "none.safetensors"),
        ("train-task", TASK | {"checkpoint": "{}/none.safetensors"}, "none.safetensors"),
        ("train-safety", SAFETY | {"output_dir": "{}/taken/out"}, "output_dir"),
        ("train-safety", {"output_dir": "{}/out"}, "concept"),
        ("train-safety", SAFETY | {"resume": "{}/none"}, "resume"),
        ("train-safety", SAFETY | {"vae": "{}/none.safetensors"}, "none.safetensors"),
    ],
)
def test_a_training(command, values, fragment, place, caplog):
    assert training.main(words(place, command, **values)) == 1
    assert fragment in caplog.records[-1].message
    assert "Traceback" not in caplog.text


def test_projecting(place, caplog):
    lora = str(place / "safety.safetensors")
    for output in ("taken/new.safetensors",):
        assert training.main(words(place, "project", lora, lora, output=f"{place}/{output}")) == 1
        assert "--output" in caplog.records[-1].message


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        (AUDIT | {"output_dir": "{}/taken/out"}, "output_dir"),
        (AUDIT | {"safety": "{}/none.safetensors"}, "none.safetensors"),
        (AUDIT | {"unsafe_prompts": "{}/none.txt"}, "none.txt"),
        (AUDIT | {"synonyms": "{}/none.txt"}, "synonyms"),
        (AUDIT | {"inception": "{}/none.safetensors"}, "inception"),
        (AUDIT | {"clip": "{}/none"}, "clip"),
        (AUDIT | {"task_pictures": "{}/none"}, "task_pictures"),
        (AUDIT | {"start_pictures": "{}/none"}, "start_pictures"),
    ],
)
def test_an_audit(values, fragment, place, caplog):
    assert audit.main(words(place, "run", **values)) == 1
    assert fragment in caplog.records[-1].message


def test_gate_error(place, caplog):
    assert audit.main(["gate-error", GLOSS, GLOSS, "--output", str(place / "taken" / "error.json")]) == 1
    assert "--output" in caplog.records[-1].message


def test_what_was_tried_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "b"):
        with refuses("place.not-writable", "output_dir"):
            check_writable(taken, "output_dir")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() or path.name == "a"] == []
