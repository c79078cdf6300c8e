"""What a policy asks of LoRAs and gates, in the real ComfyUI."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.provenance import keys, signing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.gate_graphs import gated_run, install_stub
from support.operator_graphs import guarded, required, stopped


@pytest.fixture
def stub(comfy, monkeypatch):
    return install_stub(comfy, monkeypatch)


def gate_policy(sha256, rest: str = "") -> str:
    return f"{required(sha256('safety.safetensors'))}[gate]\nrequired = true\n{rest}"


def test_where_a_gate_is_required_what_it_did_not_judge_does_not_leave(operator, sha256, stub):
    operator.write(gate_policy(sha256))
    graph = gated_run()
    operator.run(graph)
    line = next(line for line in operator.record() if line["kind"] == "gate")
    assert line["flags"] == [False] * 3
    graph["sample"]["inputs"]["seed"] = 11
    graph["save"]["inputs"]["images"] = ["any", 0]
    graph["any"] = {"class_type": "AnyPass", "inputs": {"value": ["decode", 0]}}
    assert set(operator.queue(graph)) == {"save"}
    stopped(operator, graph, "refused.gate.required")


@pytest.mark.parametrize(
    ("changes", "rule", "named"),
    [
        ({"threshold": 0.5}, "gate.thresholds", "thing is 0.5"),
        ({"classes": "thing 0.41"}, "gate.thresholds", "thing is 0.41"),
        ({"classes": "thing off\nodd thing 2 0.1"}, "gate.thresholds", "thing is off"),
        ({"classes": "thing 0.4 0.2"}, "gate.thresholds", "thing"),
        ({"action": "report", "classes": "thing 0.4"}, "gate.actions", "report"),
    ],
)
def test_a_graph_cannot_loosen_the_gate(changes, rule, named, operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {thing = 0.4}\n"))
    stopped(operator, gated_run(**changes), f"refused.{rule}", named)


def test_a_stricter_gate_and_the_default_one_serve(operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {thing = 0.4}\n"))
    operator.run(gated_run(threshold=0.3))
    graph = gated_run()
    del graph["settings"], graph["gate"]["inputs"]["gate"]
    graph["sample"]["inputs"]["seed"] = 12
    assert "thing 0.4" in operator.run(graph)["gate"][4].replace("≥ ", "").replace("at ", "")


def test_a_detector_that_does_not_know_a_label_is_refused(operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {other = 0.4}\n"))
    stopped(operator, gated_run(), "refused.gate.thresholds", "other")


def test_a_policy_that_tightens_makes_the_guard_be_built_again(operator, sha256):
    operator.write(required(sha256("safety.safetensors")))
    graph = guarded(13)
    operator.run(graph)
    operator.write(required(sha256("safety.safetensors"), least=2.0))
    assert "2 or more" in operator.queue(graph)["guard"]
    assert stopped(operator, graph, "refused.guard.required", "2 ").node_type == "ModularLoraGuardModel"


def lora_without(comfy, name: str, source: str, prefix: str, factor: float, **metadata: str) -> str:
    """A LoRA of the layers of ``source`` that begin with ``prefix``, its up factors scaled."""
    tensors = {k: v for k, v in load_file(comfy.loras / source).items() if k.startswith(prefix)}
    tensors = {k: v * factor if "lora_up" in k else v for k, v in tensors.items()}
    save_file(tensors, comfy.loras / name, metadata or None)
    comfy.folder_paths.filename_list_cache.clear()
    return name


def test_a_task_lora_that_weakens_the_safety_lora_is_refused(operator, sha256, comfy):
    against = lora_without(comfy, "against.safetensors", "safety.safetensors", "lora_unet_", -0.4)
    operator.write(required(sha256("safety.safetensors")))
    graph = guarded(14, task=against)
    graph["task"]["inputs"]["strength_model"] = 1.0
    assert operator.queue(graph) == {}
    stopped(operator, graph, "refused.guard.required", "0.600")
    operator.write(required(sha256("safety.safetensors"), least=0.55))
    operator.run(graph)


def test_a_task_lora_that_weakens_it_on_the_text_encoder_alone_is_refused(operator, sha256, comfy):
    against = lora_without(comfy, "against_te.safetensors", "safety_te.safetensors", "lora_te", -0.4)
    operator.write(required(sha256("safety_te.safetensors")))
    graph = guarded(15, safety="safety_te.safetensors", task=against, clip=True)
    graph["task"]["inputs"]["strength_clip"] = 1.0
    stopped(operator, graph, "refused.guard.required", "0.600")


def test_task_loras_are_allowed_and_denied_by_content_under_any_name(operator, sha256, comfy):
    shutil.copyfile(comfy.loras / "task.safetensors", comfy.loras / "renamed.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    rest = f'[tasks]\ndeny = ["{sha256("task.safetensors")}"]\n'
    operator.write(required(sha256("safety.safetensors")) + rest)
    graph = guarded(16, task="renamed.safetensors")
    assert set(operator.queue(graph)) == {"task"}
    stopped(operator, graph, "refused.tasks.deny")
    operator.run(guarded(16, task="other.safetensors"))


def test_marks_of_interference_and_contamination_are_errors_where_the_policy_says_so(operator, sha256, comfy):
    marked = lora_without(comfy, "shared.safetensors", "safety.safetensors", "lora_unet_", 0.2)
    rest = "interference_is_error = true\n"
    operator.write(required(sha256("safety.safetensors")) + rest)
    stopped(operator, guarded(17, task=marked), "refused.guard.interference_is_error")
    operator.run(guarded(17))
    said = {"modular_lora.trained_on": "W0 and safety"}
    marked = lora_without(comfy, "contaminated.safetensors", "task.safetensors", "lora_unet_", 1.0, **said)
    with safe_open(comfy.loras / marked, "pt") as file:
        assert file.metadata() == said
    operator.write(required(sha256("safety.safetensors")) + "contamination_is_error = true\n")
    stopped(operator, guarded(18, task=marked), "refused.guard.contamination_is_error")


def test_a_merged_base_is_refused_though_the_graph_accepts_it(enforced):
    graph = guarded(19)
    merged = {"model": ["ckpt", 0], "lora_name": "other.safetensors", "strength_model": 1.0}
    graph["merged"] = {"class_type": "LoraLoaderModelOnly", "inputs": merged}
    graph["guard"]["inputs"] |= {"model": ["merged", 0], "accept_merged": True}
    assert set(enforced.queue(graph)) == {"merged", "guard"}
    stopped(enforced, graph, ("refused.guard.required", "refused.nodes.sampling"))


def test_a_safety_lora_is_taken_by_its_signature_and_refused_by_name_without(operator, comfy, tmp_path: Path):
    for name in ("host", "other"):
        keys.keygen(tmp_path / f"{name}.pem")
    folder = operator.path.parent / "keys"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tmp_path / "host.pub", folder / "host.pub")
    lora = comfy.loras / "signed.safetensors"
    shutil.copyfile(comfy.loras / "safety.safetensors", lora)
    comfy.folder_paths.filename_list_cache.clear()
    operator.write('[guard]\nrequired = [{signed_by = "host"}]\n[keys]\nhost = "keys/host.pub"\n')
    graph = guarded(20, safety="signed.safetensors")
    assert "signed.safetensors" in operator.queue(graph)["guard"]
    stopped(operator, graph, "refused.guard.required", "signed.safetensors.sig")
    signing.sign(lora, tmp_path / "other.pem")
    stopped(operator, graph, "refused.guard.required", "host")
    signing.sign(lora, tmp_path / "host.pem")
    operator.run(graph)
    shutil.copyfile(comfy.loras / "other.safetensors", lora)
    assert "changed" in operator.queue(graph)["guard"]
    stopped(operator, graph, "refused.guard.required", "SHA-256")
