"""A policy and Guard in the real ComfyUI: the node is the guard, and what its LoRAs are is held to the lists."""

from __future__ import annotations

import copy

import pytest
from safetensors.torch import load_file, save_file
from support.drop_in import guarded, ordinary
from support.errors import refuses
from support.graphs import node
from support.operator_graphs import required, stopped

pytestmark = pytest.mark.usefixtures("packs")
TASK, OTHER = "task.safetensors", "other.safetensors"
NAMED = '[nodes]\npatching = ["PackScalingLoader"]\n'


def graph(seed: int, *loaders: tuple[str, float]) -> dict:
    made = guarded(ordinary(*loaders))
    made["sample"]["inputs"]["seed"] = seed
    return made


def test_an_ordinary_graph_with_guard_runs_under_a_policy_and_stands_in_the_record(enforced):
    enforced.run(graph(50, (TASK, 0.7)))
    run = [line for line in enforced.record() if line["kind"] == "run"][-1]["attestation"]
    assert run["status"] == "guarded"
    assert [lora["name"] for lora in run["loras"]] == ["safety.safetensors", TASK]


def test_without_guard_the_same_graph_is_refused(enforced):
    assert set(enforced.queue(ordinary((TASK, 0.7)))) >= {"lora0", "sample"}


def test_another_safety_lora_on_the_node_is_refused(enforced):
    made = graph(51)
    made["guard"]["inputs"]["lora_name"] = OTHER
    assert "is required" in enforced.queue(made)["guard"]
    made = graph(51)
    made["guard"]["inputs"]["strength"] = 0.4
    assert "stands at 0.4" in enforced.queue(made)["guard"]


def test_a_denied_file_is_refused_by_its_sha256_when_queued_and_when_it_runs(operator, sha256):
    operator.write(required(sha256("safety.safetensors")) + f'[tasks]\ndeny = ["{sha256(TASK)}"]\n')
    assert "is denied" in operator.queue(graph(52, (TASK, 0.7)))["lora0"]
    stopped(operator, graph(52, (TASK, 0.7)), "refused.tasks.deny")
    operator.run(graph(53, (OTHER, 0.7)))


@pytest.mark.parametrize("rule", ["deny", "allow"])
def test_a_file_that_was_saved_again_is_the_same_lora(comfy, operator, sha256, loras, rule):
    """By the SHA-256 of its tensors, which stands in the policy in the place of the file's."""
    values = comfy.host_files.read_lora(loras.folder / TASK).values_sha256
    save_file(load_file(loras.folder / TASK), loras.folder / "again.safetensors", {"note": "saved again"})
    comfy.folder_paths.filename_list_cache.clear()
    assert sha256("again.safetensors") != sha256(TASK)
    operator.write(required(sha256("safety.safetensors")) + f'[tasks]\n{rule} = ["{values}"]\n')
    made = graph(58, ("again.safetensors", 0.7))
    if rule == "allow":
        operator.run(made)
        assert "not allowed" in operator.queue(graph(59, (OTHER, 0.7)))["lora0"]
    else:
        assert "is denied" in operator.queue(made)["lora0"]
        stopped(operator, made, "refused.tasks.deny")


def test_where_files_are_allowed_what_is_of_no_file_is_refused(operator, sha256):
    allowed = f'[tasks]\nallow = ["{sha256(TASK)}"]\n'
    operator.write(required(sha256("safety.safetensors")) + allowed + NAMED)
    operator.run(graph(54, (TASK, 0.7)))
    made = graph(55)
    made["scaled"] = node("PackScalingLoader", model=["guard", 0], lora_name=TASK, factor=0.5)
    made["sample"]["inputs"]["model"] = ["scaled", 0]
    stopped(operator, made, "refused.tasks.allow")


def test_a_loader_in_front_and_a_plain_clip_are_refused_as_they_run(enforced):
    made = graph(56, (TASK, 0.7))
    made["lora0"]["inputs"]["clip"] = ["ckpt", 1]
    assert "beside the guard" in enforced.queue(made)["lora0"]
    stopped(enforced, made, "refused.guard.required", "Guard")


def test_what_the_stock_vae_decodes_does_not_leave(enforced):
    made = graph(57, (TASK, 0.7))
    made["decode"]["inputs"]["vae"] = ["ckpt", 2]
    assert "save" in enforced.queue(made)
    with refuses("refused.open.unattested"):
        enforced.run_graph(copy.deepcopy(made) | {"plain": node("VAEDecode", samples=["latent", 0], vae=["ckpt", 2])})
