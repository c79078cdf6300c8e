"""The training nodes in the real ComfyUI: what they make, what they leave as it was, what they refuse."""

from __future__ import annotations

import shutil

import pytest
import torch
from graphs import GraphError, base_graph, decode, sampler
from safetensors.torch import load_file

from modular_lora_guard.bootstrap.paths import ROOT

PICTURES = ROOT / "world" / "assets" / "gloss" / "10_gloss"
SMALL = {"network_dim": 4, "network_alpha": 4.0, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2}


@pytest.fixture
def inputs(comfy, tmp_path):
    """ComfyUI's input folder with a data set of three pictures."""
    folder = tmp_path / "input" / "pictures" / "2_gloss"
    folder.mkdir(parents=True)
    for stem in ("cat-face", "balloon", "crown"):
        for ending in (".png", ".txt"):
            shutil.copy(PICTURES / f"{stem}{ending}", folder)
    before = comfy.folder_paths.get_input_directory()
    comfy.folder_paths.set_input_directory(str(tmp_path / "input"))
    yield tmp_path / "input"
    comfy.folder_paths.set_input_directory(before)


def defaults(comfy, node: str) -> dict:
    """A node's inputs at their defaults."""
    schema = comfy.nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    found = {**schema["required"], **schema.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in found.items() if len(spec) > 1 and "default" in spec[1]}


def task_graph(comfy, **changes) -> dict:
    graph = base_graph()
    graph["safety"] = {
        "class_type": "ModularLoraLoadSafety",
        "inputs": {"lora_name": "safety_te.safetensors", "strength": 1.0},
    }
    loaded = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2], "data_set": "pictures"}
    values = defaults(comfy, "ModularLoraTrainTask") | SMALL | loaded
    graph["train"] = {"class_type": "ModularLoraTrainTask", "inputs": values | {"safety_lora": ["safety", 0]} | changes}
    return graph


def test_task_training_gives_a_lora_that_the_guard_takes_and_leaves_the_model_bitwise(
    comfy, run_graph, loras, loaded, inputs
):
    graph = task_graph(comfy, output_name="made", sample_every_n_steps=2, sample_prompts="gloss, cat\n")
    graph["train"]["inputs"]["more_options"] = "sample_size = 64\nsample_steps = 2\ntraining_comment = 'a test'"
    graph["guard"] = {
        "class_type": "ModularLoraGuardModel",
        "inputs": {"model": ["ckpt", 0], "clip": ["ckpt", 1], "safety_lora": ["safety", 0], "task_lora": ["train", 0]},
    }
    graph["sample"] = sampler(["guard", 0], "ModularLoraKSampler")
    graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = ["guard", 1]
    graph["decode"] = decode(["sample", 0])
    graph["save"] = {
        "class_type": "ModularLoraSaveImage",
        "inputs": {"images": ["decode", 0], "filename_prefix": "t", "unattested": "refuse"},
    }
    before = {k: v.clone() for k, v in loaded[0].model.state_dict().items()}
    out = run_graph(graph)
    after = loaded[0].model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    (task,), report, loss, samples = out["train"]
    assert task.lora.metadata["modular_lora.role"] == "task"
    assert task.lora.metadata["ss_training_comment"] == "a test"
    assert task.lora.metadata["modular_lora.safety_sha256"] in report or "frozen" in report
    assert loss.shape[-1] == 3
    assert samples.shape[1:] == (64, 64, 3)
    assert "guarded" in out["sample"][1]
