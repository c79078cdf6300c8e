"""Enforcement in the real ComfyUI: what the policy refuses when a prompt is queued, and what it refuses as it runs."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from gate_graphs import gated_run, install_stub, part
from graphs import GraphError, base_graph, decode, guarded_graph, sampler
from modular_lora_guard.operators import keys, signing
from operator_graphs import Operator, required
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NONE_REQUIRED = "[guard]\nrequired = []\n"


@pytest.fixture
def operator(comfy, loras, run_graph):
    one = Operator(comfy, run_graph)
    yield one
    one.remove()
    shutil.rmtree(one.path.parent / "record", ignore_errors=True)


@pytest.fixture
def sha256(comfy, loras):
    return lambda name: hashlib.sha256((comfy.loras / name).read_bytes()).hexdigest()


@pytest.fixture
def enforced(operator, sha256) -> Operator:
    """The policy that most tests begin with: the safety LoRA must be there at 0.9."""
    operator.write(required(sha256("safety.safetensors")))
    return operator


@pytest.fixture
def add_node(comfy):
    """Puts a node of another pack beside ComfyUI's own."""
    known = comfy.nodes.NODE_CLASS_MAPPINGS
    before = set(known)

    def add(name: str, run, inputs: dict | None = None, outputs: tuple = ("IMAGE",), is_output: bool = False) -> None:
        made = {"RETURN_TYPES": outputs, "FUNCTION": "run", "CATEGORY": "test", "OUTPUT_NODE": is_output}
        made |= {"run": staticmethod(run), "INPUT_TYPES": classmethod(lambda cls: {"required": inputs or {}})}
        known[name] = type(name, (), made)

    yield add
    for name in set(known) - before - {"ModularLoraRefused"}:
        del known[name]


def stock(seed: int, **changes) -> dict:
    """An unguarded graph."""
    graph = base_graph()
    graph["sample"] = sampler(["ckpt", 0], seed=seed, **changes)
    graph["decode"] = decode(["sample", 0], "VAEDecode")
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "stock"}}
    return graph


def guarded(seed: int, **changes) -> dict:
    graph = guarded_graph(**changes)
    graph["sample"]["inputs"]["seed"] = seed
    return graph


def stopped(operator: Operator, graph: dict, words: str) -> GraphError:
    """The error of a graph that passes when queued, or never went through the queue, and stops as it runs."""
    with pytest.raises(GraphError, match=words) as caught:
        operator.run_graph(copy.deepcopy(graph))
    assert caught.value.stage == "execution"
    assert operator.record()[-1]["kind"] == "refused"
    return caught.value


def test_without_a_policy_nothing_of_comfyui_is_touched_and_afterwards_nothing_is_left(operator, comfy, sha256):
    import comfy.model_base
    import comfy.samplers

    def touched() -> list:
        return [
            comfy_execution.get_output_data,
            comfy.samplers.CFGGuider.sample,
            comfy.model_base.BaseModel.apply_model,
        ]

    comfy_execution, known = operator.comfy.execution, operator.comfy.nodes.NODE_CLASS_MAPPINGS
    before = touched()
    graph = stock(100)
    assert operator.enforce.on_prompt(said := {"prompt": graph}) is said
    assert touched() == before
    assert "ModularLoraRefused" not in known
    operator.write(required(sha256("safety.safetensors")))
    assert not set(touched()) & set(before)
    assert "ModularLoraRefused" in known
    operator.remove()
    assert touched() == before
    assert "ModularLoraRefused" not in known
    assert operator.record()[-1]["kind"] == "policy"
    assert operator.record()[-1]["gone"]


def test_another_packs_wrapper_around_ours_stays_when_the_policy_goes(operator, sha256, monkeypatch):
    import comfy.samplers

    operator.write(required(sha256("safety.safetensors")))
    ours = comfy.samplers.CFGGuider.sample
    calls = []

    def theirs(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", theirs)
    operator.remove()
    operator.run_graph(stock(101))
    assert calls == [1]
    operator.write(required(sha256("safety.safetensors")))
    with pytest.raises(GraphError):
        operator.run_graph(stock(102))


def test_an_unguarded_graph_is_refused_when_queued_and_when_it_runs(enforced):
    refused = enforced.queue(stock(1))
    assert set(refused) == {"sample", "save"}
    assert "Node sample (KSampler)" in refused["sample"]
    said = [line for line in enforced.record() if line["kind"] == "refused"]
    assert {(line["node"], line["type"], line["rule"]) for line in said} == {
        ("sample", "KSampler", "nodes.sampling"),
        ("save", "SaveImage", "open.unattested"),
    }
    assert stopped(enforced, stock(1), "not guarded").node_type == "KSampler"
    assert enforced.record()[-1]["node"] == "sample"


def test_a_guarded_graph_runs_and_is_in_the_record(enforced):
    out = enforced.run(guarded(2))
    assert out["sample"][1].startswith("guarded")
    (run,) = [line for line in enforced.record() if line["kind"] == "run"]
    assert run["attestation"]["status"] == "guarded"
    assert run["node"] == "sample"
    assert "prompts" not in run


def test_prompts_are_recorded_where_the_policy_says_so(operator, sha256):
    operator.write(required(sha256("safety.safetensors")) + "[record]\nprompts = true\n")
    said = operator.enforce.on_prompt({"prompt": guarded(3), "prompt_id": "test"})
    operator.run_graph(said["prompt"])
    (run,) = [line for line in operator.record() if line["kind"] == "run"]
    assert sorted(run["prompts"]) == ["", "gloss, cat"]


def test_nodes_that_others_expand_to_are_checked(enforced, add_node):
    inner = {f"x.{name}": node for name, node in stock(4).items()}
    for node in inner.values():
        node["inputs"] = {k: [f"x.{v[0]}", v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
    add_node("Expander", lambda: {"result": (["x.decode", 0],), "expand": inner}, is_output=True)
    assert enforced.queue({"e": {"class_type": "Expander", "inputs": {}}}) == {}
    assert stopped(enforced, {"e": {"class_type": "Expander", "inputs": {}}}, "not guarded").node_type == "Expander"
    only = {"x.load": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 4}}}
    only["x.save"] = {"class_type": "PreviewImage", "inputs": {"images": ["x.load", 0]}}
    add_node("Shower", lambda: {"result": (["x.load", 0],), "expand": only}, is_output=True)
    stopped(enforced, {"e": {"class_type": "Shower", "inputs": {}}}, "no guarded run made")


@pytest.mark.parametrize("way", ["a guider", "the stock function", "apply_model"])
def test_a_node_that_samples_by_itself_is_stopped(way, enforced, loaded, add_node):
    """It takes no MODEL over a link, so that only what it does shows what it is."""
    import comfy.samplers
    import torch

    def run(seed):
        model, clip, _ = loaded
        latent, made = torch.zeros(1, 4, 8, 8), clip.encode_from_tokens_scheduled(clip.tokenize("x"))
        if way == "apply_model":
            comfy.model_management.load_models_gpu([model])
            return (model.model.apply_model(latent, torch.ones(1), c_crossattn=made[0][0]),)
        if way == "a guider":
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(made, made)
            euler = comfy.samplers.sampler_object("euler")
            return (guider.sample(latent, latent, euler, torch.tensor([1.0, 0.0])),)
        latent = {"samples": latent}
        return enforced.comfy.nodes.common_ksampler(model, seed, 1, 1.0, "euler", "normal", made, made, latent)

    add_node("Own", run, {"seed": ("INT", {"default": 0})}, ("LATENT",), is_output=True)
    graph = {"own": {"class_type": "Own", "inputs": {"seed": 1}}}
    assert enforced.queue(graph) == {}
    stopped(enforced, graph, r"not guarded|outside of a guarded run")


def test_a_sampler_of_another_pack_that_is_named_runs_on_a_guarded_model(operator, sha256, comfy):
    named = '[nodes]\nsampling = ["KSampler"]\n[open]\nguarded_as_model = true\n'
    operator.write(required(sha256("safety.safetensors")) + named)
    graph = guarded(5)
    graph["as"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    graph["sample"] = sampler(["as", 0])
    operator.run(graph)
    assert operator.record()[-1]["attestation"]["status"] == "guarded"
    graph["sample"]["inputs"] |= {"model": ["any", 0], "seed": 6}
    graph["any"] = {"class_type": "AnyPass", "inputs": {"value": ["ckpt", 0]}}
    stopped(operator, graph, "not guarded")


def test_one_class_under_a_denied_and_another_name_is_denied(operator, comfy, monkeypatch):
    known = comfy.nodes.NODE_CLASS_MAPPINGS
    monkeypatch.setitem(known, "Alias", known["EmptyLatentImage"])
    operator.write(f'{NONE_REQUIRED}[nodes]\ndeny = ["EmptyLatentImage"]\n')
    graph = stock(7)
    graph["latent"]["class_type"] = "Alias"
    graph["latent"]["inputs"]["width"] = 72
    stopped(operator, graph, "denied")


def test_a_picture_that_was_edited_does_not_leave_and_one_that_was_not_does(enforced):
    graph = guarded(8)
    graph["edit"] = {"class_type": "ImageInvert", "inputs": {"image": ["decode", 0]}}
    graph["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["edit", 0]}}
    stopped(enforced, graph, "open.unattested")
    graph["edit"] = {"class_type": "AnyPass", "inputs": {"value": ["decode", 0]}}
    enforced.run_graph(graph)


def test_a_batch_with_one_unattested_picture_does_not_leave(enforced):
    graph = guarded(9)
    graph["empty"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    graph["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["decode", 0], "image2": ["empty", 0]}}
    graph["save"]["inputs"] |= {"images": ["both", 0], "unattested": "save and say so"}
    assert set(enforced.queue(graph)) == {"save"}
    stopped(enforced, graph, "open.unattested")


def test_a_node_that_shows_pictures_on_the_way_is_stopped(enforced, add_node, comfy):
    shown = {"images": [{"filename": "x.png", "subfolder": "", "type": "temp"}]}
    add_node("Peek", lambda image: {"ui": shown, "result": (image,)}, {"image": ("IMAGE",)})
    graph = guarded(25)
    graph["peek"] = {"class_type": "Peek", "inputs": {"image": ["decode", 0]}}
    graph["save"]["inputs"]["images"] = ["peek", 0]
    stopped(enforced, graph, "on the way")
    assert not any(event == "executed" and data["node"] == "peek" for event, data in comfy.server.messages)


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
    stopped(operator, graph, "gate.required")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 0.5}, "threshold of thing is 0.5"),
        ({"classes": "thing 0.41"}, "threshold of thing is 0.41"),
        ({"classes": "thing off\nodd thing 2 0.1"}, "threshold of thing is off"),
        ({"classes": "thing 0.4 0.2"}, "shrunk"),
        ({"action": "report", "classes": "thing 0.4"}, "gate.actions"),
    ],
)
def test_a_graph_cannot_loosen_the_gate(changes, words, operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {thing = 0.4}\n"))
    stopped(operator, gated_run(**changes), words)


def test_a_stricter_gate_and_the_default_one_serve(operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {thing = 0.4}\n"))
    operator.run(gated_run(threshold=0.3))
    graph = gated_run()
    del graph["settings"], graph["gate"]["inputs"]["gate"]
    graph["sample"]["inputs"]["seed"] = 12
    assert "thing 0.4" in operator.run(graph)["gate"][4].replace("≥ ", "").replace("at ", "")


def test_a_detector_that_does_not_know_a_label_is_refused(operator, sha256, stub):
    operator.write(gate_policy(sha256, "thresholds = {other = 0.4}\n"))
    stopped(operator, gated_run(), "does not know other")


def test_a_policy_that_tightens_makes_the_guard_be_built_again(operator, sha256):
    operator.write(required(sha256("safety.safetensors")))
    graph = guarded(13)
    operator.run(graph)
    operator.write(required(sha256("safety.safetensors"), least=2.0))
    assert "2 or more" in operator.queue(graph)["guard"]
    assert stopped(operator, graph, "2 is the least").node_type == "ModularLoraGuardModel"


def test_a_graph_does_not_say_itself_that_nothing_changed(enforced):
    graph = guarded(24)
    for node in graph.values():
        node["is_changed"] = ["as before"]
    said = enforced.enforce.on_prompt({"prompt": graph})
    assert not any("is_changed" in node for node in said["prompt"].values())
    assert said["prompt"].keys() == graph.keys()


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
    stopped(operator, graph, "net strength of 0.600")
    operator.write(required(sha256("safety.safetensors"), least=0.55))
    operator.run(graph)


def test_a_task_lora_that_weakens_it_on_the_text_encoder_alone_is_refused(operator, sha256, comfy):
    against = lora_without(comfy, "against_te.safetensors", "safety_te.safetensors", "lora_te", -0.4)
    operator.write(required(sha256("safety_te.safetensors")))
    graph = guarded(15, safety="safety_te.safetensors", task=against, clip=True)
    graph["task"]["inputs"]["strength_clip"] = 1.0
    stopped(operator, graph, "net strength of 0.600")


def test_task_loras_are_allowed_and_denied_by_content_under_any_name(operator, sha256, comfy):
    shutil.copyfile(comfy.loras / "task.safetensors", comfy.loras / "renamed.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    rest = f'[tasks]\ndeny = ["{sha256("task.safetensors")}"]\n'
    operator.write(required(sha256("safety.safetensors")) + rest)
    graph = guarded(16, task="renamed.safetensors")
    assert set(operator.queue(graph)) == {"task"}
    stopped(operator, graph, "tasks.deny")
    operator.run(guarded(16, task="other.safetensors"))


def test_marks_of_interference_and_contamination_are_errors_where_the_policy_says_so(operator, sha256, comfy):
    marked = lora_without(comfy, "shared.safetensors", "safety.safetensors", "lora_unet_", 0.2)
    rest = "interference_is_error = true\n"
    operator.write(required(sha256("safety.safetensors")) + rest)
    stopped(operator, guarded(17, task=marked), "guard.interference_is_error")
    operator.run(guarded(17))
    said = {"modular_lora.trained_on": "W0 and safety"}
    marked = lora_without(comfy, "contaminated.safetensors", "task.safetensors", "lora_unet_", 1.0, **said)
    with safe_open(comfy.loras / marked, "pt") as file:
        assert file.metadata() == said
    operator.write(required(sha256("safety.safetensors")) + "contamination_is_error = true\n")
    stopped(operator, guarded(18, task=marked), "guard.contamination_is_error")


def test_a_merged_base_is_refused_though_the_graph_accepts_it(enforced):
    graph = guarded(19)
    merged = {"model": ["ckpt", 0], "lora_name": "other.safetensors", "strength_model": 1.0}
    graph["merged"] = {"class_type": "LoraLoaderModelOnly", "inputs": merged}
    graph["guard"]["inputs"] |= {"model": ["merged", 0], "accept_merged": True}
    assert set(enforced.queue(graph)) == {"merged", "guard"}
    stopped(enforced, graph, r"guard.required|nodes.sampling")


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
    stopped(operator, graph, "signed.safetensors.sig")
    signing.sign(lora, tmp_path / "other.pem")
    stopped(operator, graph, "trusted are: host")
    signing.sign(lora, tmp_path / "host.pem")
    operator.run(graph)
    shutil.copyfile(comfy.loras / "other.safetensors", lora)
    assert "changed" in operator.queue(graph)["guard"]
    stopped(operator, graph, "changed|SHA-256")


def test_no_record_no_picture(operator, sha256):
    (operator.path.parent / "blocked").parent.mkdir(parents=True, exist_ok=True)
    (operator.path.parent / "blocked").write_text("a file", encoding="utf-8")
    operator.write(required(sha256("safety.safetensors")) + '[record]\nfolder = "blocked"\n')
    with pytest.raises(GraphError, match="blocked"):
        operator.run_graph(guarded(21))
    assert set(operator.queue(stock(21))) == {"sample", "save"}


def test_where_no_lora_is_required_sampling_is_free_and_recorded(operator):
    operator.write(NONE_REQUIRED)
    operator.run(stock(22))
    assert operator.record()[-1]["attestation"] == {"status": "unguarded"}


@pytest.mark.parametrize("key", ["training", "guarded_as_model", "audit"])
def test_our_own_nodes_ask_too(key, operator, comfy):
    operator.write(NONE_REQUIRED)
    policy: ModuleType = part(comfy, "nodes.policy")
    with pytest.raises(comfy.host.GuardError, match=f"open.{key}"):
        policy.check_open(key)
    operator.write(f"{NONE_REQUIRED}[open]\n{key} = true\n")
    policy.check_open(key)


def test_a_graph_that_cannot_be_checked_is_refused(enforced, add_node, comfy):
    def broken(cls):
        raise ValueError("no inputs today")

    add_node("Broken", lambda: (None,), is_output=True)
    comfy.nodes.NODE_CLASS_MAPPINGS["Broken"].INPUT_TYPES = classmethod(broken)
    refused = enforced.queue({"b": {"class_type": "Broken", "inputs": {}}})
    assert "no inputs today" in refused["b"]


def test_the_refusal_node_itself_never_runs(enforced):
    graph = guarded(23) | {"r": {"class_type": "ModularLoraRefused", "inputs": {"policy": ""}}}
    with pytest.raises(GraphError, match="refused by the operator's policy"):
        enforced.run(graph)
