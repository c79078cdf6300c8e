"""What the nodes say and refuse in the real ComfyUI: scales, names in two folders, stacks, runs without steps."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import GraphError, guarded_graph, save_lora

CHOICES = ("refuse if they differ", "as in the file's tensors", "as stated in its metadata")


def without_alpha(loras, source: str, target: str, metadata: dict[str, str], scale: float = 1.0) -> str:
    """A copy of a LoRA of rank 4 without alphas, its weights times ``scale``."""
    tensors = {k: v for k, v in load_file(loras.folder / source).items() if not k.endswith(".alpha")}
    tensors = {k: v * scale if "lora_up" in k else v for k, v in tensors.items()}
    save_file(tensors, loras.folder / target, metadata)
    return target


@pytest.fixture
def load(comfy):
    """The module of the loading nodes."""
    return sys.modules[comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraLoadTask"].__module__]


def test_a_safety_lora_of_two_scales_is_an_error_and_runs_as_it_is_chosen(run_graph, loras):
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "4"}
    graph = guarded_graph(without_alpha(loras, "safety.safetensors", "two.safetensors", metadata), None)
    with refuses("lora.two-scales", "two.safetensors", "0.5 (ss_network_alpha 2 over ss_network_dim 4)"):
        run_graph(graph)
    results = {}
    for choice in CHOICES[1:]:
        graph["safety"]["inputs"]["scale"] = choice
        results[choice] = run_graph(graph)
    tensors, stated = (results[choice]["sample"] for choice in CHOICES[1:])
    assert not torch.equal(tensors[0]["samples"], stated[0]["samples"])
    for choice, word in zip(CHOICES[1:], ("tensors", "metadata"), strict=True):
        assert f"scale of its {word}" in results[choice]["sample"][1]
        assert "scale" in results[choice]["guard"][2]
    halved = without_alpha(loras, "safety.safetensors", "halved.safetensors", {}, 0.5)
    expected = run_graph(guarded_graph(halved, None))["sample"][0]["samples"]
    assert torch.allclose(stated[0]["samples"], expected, atol=1e-5)


def test_a_choice_that_no_drop_down_has_is_refused(run_graph, loras, load):
    graph = guarded_graph(task=None)
    graph["safety"]["inputs"]["scale"] = "as I like"
    with pytest.raises(GraphError):
        run_graph(graph)
    assert tuple(load.SCALES) == CHOICES


def test_a_task_lora_of_two_scales_acts_as_in_comfyui_and_says_so(run_graph, loras):
    metadata = {"ss_network_alpha": "16", "ss_network_dim": "4"}
    name = without_alpha(loras, "safety.safetensors", "task_two.safetensors", metadata, 0.01)
    report = run_graph(guarded_graph("other.safetensors", name))["guard"][2]
    assert "layers act at scale 1, as ComfyUI's own loader reads them" in report
    assert "states 4 (ss_network_alpha 16 over ss_network_dim 4)" in report


def test_a_name_in_both_folders_is_refused_unless_it_is_one_file(comfy, run_graph, loras):
    folder = comfy.base / "models" / "safety_loras"
    target = folder / "safety.safetensors"
    target.write_bytes((loras.folder / "safety.safetensors").read_bytes())
    comfy.folder_paths.filename_list_cache.clear()
    try:
        run_graph(guarded_graph(task=None))
        save_lora(target, loras.unet, 4, 77)
        with pytest.raises(GraphError, match="safety_loras and loras") as error:
            run_graph(guarded_graph(task=None))
        assert error.value.stage == "validation"
    finally:
        target.unlink()
        comfy.folder_paths.filename_list_cache.clear()


def test_a_task_lora_of_the_text_encoder_alone_needs_the_clip(run_graph, loras):
    save_lora(loras.folder / "te.safetensors", dict(list(loras.text.items())[:4]), 2, 51)
    with refuses("lora.applies-nowhere", "te.safetensors", "4 "):
        run_graph(guarded_graph(task="te.safetensors"))
    assert "te.safetensors: 4 layers" in run_graph(guarded_graph(task="te.safetensors", clip=True))["guard"][2]


def test_a_task_lora_of_another_base_is_told_about_both_halves(run_graph, loras):
    tensors = load_file(loras.folder / "task_te.safetensors")
    tensors = {k.replace("lora_unet_", "lora_unet_other_"): v for k, v in tensors.items()}
    save_file(tensors, loras.folder / "other_base.safetensors")
    with refuses("lora.applies-nowhere", "other_base.safetensors", "0 of"):
        run_graph(guarded_graph(task="other_base.safetensors"))


def test_a_block_that_is_named_twice_is_refused(run_graph, loras):
    graph = guarded_graph()
    graph["task"]["inputs"]["block_weights"] = "IN01:0.5, M00:0, in01:1"
    with refuses("blocks.twice", "IN01"):
        run_graph(graph)


@pytest.mark.parametrize("how", ["denoise", "steps"])
def test_a_run_without_a_step_says_that_nothing_was_sampled(run_graph, loras, how):
    """Also after a run that did sample with the same guarded model: its report is not shown again."""
    graph = guarded_graph(task=None)
    assert "\nguarded" in run_graph(graph)["sample"][1]
    graph["save"]["inputs"]["unattested"] = "save without attestation"
    if how == "denoise":
        graph["sample"]["inputs"]["denoise"] = 0.0
    else:
        inputs = {k: v for k, v in graph["sample"]["inputs"].items() if k not in ("seed", "denoise")}
        inputs |= {"noise_seed": 1, "add_noise": "enable", "start_at_step": 9, "end_at_step": 10_000}
        inputs |= {"return_with_leftover_noise": "disable"}
        graph["sample"] = {"class_type": "ModularLoraKSamplerAdvanced", "inputs": inputs}
    results = run_graph(graph)
    assert "\nnot sampled: the model was not evaluated (denoise 0" in results["sample"][1]
    assert "evaluations" not in results["sample"][1].splitlines()[0]
    assert "\nunattested: nothing was sampled (denoise 0, or no step to do)" in results["decode"][1]


@pytest.mark.parametrize("row", ["absolute", "linked", "windows", "three", "two", "dict", "text", "none"])
def test_a_row_of_a_lora_stack_is_read(row, comfy, loras, load, tmp_path):
    name = "a/style.safetensors"
    (loras.folder / "a").mkdir(exist_ok=True)
    save_lora(loras.folder / name, dict(list(loras.unet.items())[:4]), 2, 1)
    comfy.folder_paths.filename_list_cache.clear()
    linked = tmp_path / "linked"
    linked.symlink_to(loras.folder)
    rows = {
        "absolute": (str(loras.folder / name), 0.8, 0.5),
        "linked": (str(linked / name), 0.8, 0.5),
        "windows": (name.replace("/", "\\"), 0.8, 0.5),
        "three": (name, 0.8, 0.5),
        "two": (name, 0.8),
        "dict": {"name": name, "strength": 0.8, "strength_clip": 0.5},
        "text": (name, "0.8", " 0.5"),
        "none": [name, 0.8, None],
    }
    ((task,),) = (load.stacked([rows[row]]),)
    assert task.lora.path.resolve() == (loras.folder / name).resolve()
    assert (task.strength_model, task.strength_clip) == (0.8, 0.8 if row in ("two", "none") else 0.5)


def test_a_path_outside_the_loras_folders_is_refused_with_its_row(comfy, loras, load, tmp_path):
    save_lora(tmp_path / "x.safetensors", dict(list(loras.unet.items())[:4]), 2, 1)
    for path in (tmp_path / "x.safetensors", loras.folder / ".." / "x.safetensors"):
        with refuses("file.no-such-file", "LORA_STACK row 2"):
            load.stacked([("task.safetensors", 1.0, 1.0), (str(path), 1.0, 1.0)])
