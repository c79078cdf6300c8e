"""The trainers' command line and options: help, TOML, errors, and one training in the real ComfyUI."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training import cli, options
from modular_lora_guard.training.options import OptionError, SafetyOptions, TaskOptions
from support.errors import refuses
from support.graphs import save_lora

ROOT = Path(__file__).resolve().parents[3]
LAYERS = {f"lora_unet_mid_block_attentions_0_proj_{end}": LayerSpec("x", (16, 12)) for end in ("in", "out")}


@pytest.mark.parametrize("cls", [TaskOptions, SafetyOptions])
def test_every_option_can_be_given_on_the_command_line_and_in_toml(cls, tmp_path):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, cls)
    assert vars(parser.parse_args([])) == {}
    text = parser.format_help()
    for field in dataclasses.fields(cls):
        assert f"--{field.name}" in text
        assert field.metadata["description"]
    given = ["--network_dim", "4", "--learning_rate", "1", "--gradient_checkpointing", "--sample_prompts", "a b", "c"]
    chosen = vars(parser.parse_args(given))
    config = tmp_path / "c.toml"
    config.write_text(
        "network_dim = 4\nlearning_rate = 1\ngradient_checkpointing = true\nsample_prompts = ['a b', 'c']"
    )
    assert options.load(cls, None, chosen) == options.load(cls, config)
    assert options.load(cls, config, {"network_dim": 9}).network_dim == 9


WRONG = "option.wrong-value"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("netwrk_dim = 4", "option.unknown-key", ("netwrk_dim", "network_dim?")),
        ("xyzzy = 1", "option.unknown-key", ("xyzzy", "algo, dora_wd, conv_dim")),
        ("network_dim = '4'", WRONG, ("network_dim", "'4'")),
        ("network_dim = true", WRONG, ("network_dim", "True")),
        ("target = 'all'", WRONG, ("target", "'cross-attention', 'attention', 'linear' or 'conv'", "'all'")),
        ("sample_prompts = [1]", WRONG, ("sample_prompts[0]", "1")),
        ("sample_prompts = {a = 1}", WRONG, ("sample_prompts", "{'a': 1}")),
        ("flip_aug = 1", WRONG, ("flip_aug", "1")),
        ("learning_rate = nan", WRONG, ("learning_rate", "nan")),
        ("learning_rate = true", WRONG, ("learning_rate", "True")),
        ("learning_rate = 0", WRONG, ("learning_rate", "0")),
        ("sample_size = 100", WRONG, ("sample_size", "8", "100")),
        ("__dataclass_self__ = 1", "option.unknown-key", ("__dataclass_self__",)),
        ("self = 1", "option.unknown-key", ("self",)),
        ('"two\\nlines" = 1', "option.unknown-key", ("two?lines",)),
        (f"learning_rate = 1{'0' * 400}", WRONG, ("learning_rate", "1000000")),
        (f"learning_rate = 0x{'f' * 9000}", WRONG, ("learning_rate",)),
        ("network_dim = -1", WRONG, ("network_dim", "-1")),
        (f"network_dim = 1{'0' * 9000}", "option.toml", ()),
        ("network_dim = ", "option.toml", ()),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(text, code, named):
    with refuses(code, *named):
        options.load(TaskOptions, None, options.parse(text))


@given(st.text(max_size=60))
def test_any_text_is_options_or_an_option_error(text):
    with suppress(OptionError):
        assert isinstance(options.load(TaskOptions, None, options.parse(text)), TaskOptions)


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_project_and_inspect(tmp_path, capsys):
    for name, rank, seed in (("task", 4, 1), ("safety", 2, 2)):
        save_lora(tmp_path / f"{name}.safetensors", LAYERS, rank, seed)
    task, safety, made = (tmp_path / f"{n}.safetensors" for n in ("task", "safety", "made"))
    assert run("project", task, safety, "--output", made, "--save_precision", "float") == 0
    assert "2 of 2 layers paired" in capsys.readouterr().out
    new, rows = read_lora(made), read_lora(safety)
    for name, layer in new.layers.items():
        overlap = (layer.down @ rows.layers[name].down.T).norm()
        assert overlap < 1e-5 * layer.down.norm() * rows.layers[name].down.norm()
    assert new.metadata["modular_lora.safety_sha256"] == rows.sha256
    assert run("inspect", made) == 0
    assert "rank (layers) 4 (2)" in capsys.readouterr().out


def test_what_is_wrong_is_one_line_and_exit_code_1(tmp_path, capsys, caplog):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert run("inspect", tmp_path / "broken.safetensors") == 1
    assert "broken.safetensors" in caplog.text
    assert run("dataset", "--train_data_dir", tmp_path) == 1
    assert "no folder named like '10_name'" in caplog.text
    with pytest.raises(SystemExit):
        run("train-task", "--checkpoint", "x", "--no_such_option")
    assert "no_such_option" in capsys.readouterr().err
    assert run("train-task", "--checkpoint", "x", "--cpu_offload_checkpointing") == 1
    assert "cpu_offload_checkpointing: the embedded engine" in caplog.text


def test_the_data_set_of_the_demo_world_is_looked_through(capsys):
    assert run("dataset", "--train_data_dir", ROOT / "tools" / "world" / "assets" / "gloss", "--resolution", "64") == 0
    assert "60 images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_lora_is_trained_by_one_command(comfy, tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
    command = [sys.executable, "-m", "training", "train-task", "--checkpoint"]
    command += [str(Path(os.environ["MODULAR_LORA_WORLD"]) / "demo_world_sd15.safetensors")]
    assets = ROOT / "tools" / "world" / "assets"
    values = {"train_data_dir": assets / "gloss", "resolution": 64, "network_dim": 4, "max_train_steps": 2}
    values |= {"output_dir": tmp_path, "output_name": "made"}
    values |= {"safety_lora": assets / "demo_safety_vehicles.safetensors"}
    command += [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "frozen, in no optimizer group, not in the training" in done.stdout
    made = read_lora(tmp_path / "made.safetensors")
    assert len(made.layers) == 84
    assert made.metadata["modular_lora.role"] == "task"
    assert made.metadata["ss_base_model_version"] == "sd_v1"
