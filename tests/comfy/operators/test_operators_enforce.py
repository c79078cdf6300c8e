"""Enforcement in the real ComfyUI: what the policy refuses when a prompt is queued, and what it refuses as it runs."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.errors import refuses
from support.gate_graphs import part
from support.graphs import GraphError, base_graph, decode, sampler
from support.operator_graphs import guarded, required, stopped

NONE_REQUIRED = "[guard]\nrequired = []\n"
UNGUARDED = "refused.guard.required", "refused.nodes.sampling"


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


def test_without_a_policy_nothing_of_comfyui_is_touched_and_afterwards_nothing_is_left(operator, comfy, sha256):
    from comfy import model_base, samplers

    def touched() -> list:
        return [
            comfy_execution.get_output_data,
            samplers.CFGGuider.sample,
            model_base.BaseModel.apply_model,
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
    from comfy import samplers

    operator.write(required(sha256("safety.safetensors")))
    ours = samplers.CFGGuider.sample
    calls = []

    def theirs(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(samplers.CFGGuider, "sample", theirs)
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
    assert stopped(enforced, stock(1), UNGUARDED).node_type == "KSampler"
    assert enforced.record()[-1]["node"] == "sample"


def test_a_guarded_graph_runs_and_is_in_the_record(enforced):
    out = enforced.run(guarded(2))
    assert "\nguarded" in out["sample"][1]
    (run,) = [line for line in enforced.record() if line["kind"] == "run"]
    assert run["attestation"]["status"] == "guarded"
    assert run["node"] == "sample"
    assert "prompts" not in run


def test_nodes_that_others_expand_to_are_checked(enforced, add_node):
    inner = {f"x.{name}": node for name, node in stock(4).items()}
    for node in inner.values():
        node["inputs"] = {k: [f"x.{v[0]}", v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
    add_node("Expander", lambda: {"result": (["x.decode", 0],), "expand": inner}, is_output=True)
    assert enforced.queue({"e": {"class_type": "Expander", "inputs": {}}}) == {}
    assert (
        stopped(
            enforced,
            {"e": {"class_type": "Expander", "inputs": {}}},
            UNGUARDED,
        ).node_type
        == "Expander"
    )
    only = {"x.load": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 4}}}
    only["x.save"] = {"class_type": "PreviewImage", "inputs": {"images": ["x.load", 0]}}
    add_node("Shower", lambda: {"result": (["x.load", 0],), "expand": only}, is_output=True)
    stopped(enforced, {"e": {"class_type": "Shower", "inputs": {}}}, "refused.open.unattested")


@pytest.mark.parametrize("way", ["a guider", "the stock function", "apply_model"])
def test_a_node_that_samples_by_itself_is_stopped(way, enforced, loaded, add_node):
    """It takes no MODEL over a link, so that only what it does shows what it is."""
    import torch
    from comfy import model_management, samplers

    def run(seed):
        model, clip, _ = loaded
        latent, made = torch.zeros(1, 4, 8, 8), clip.encode_from_tokens_scheduled(clip.tokenize("x"))
        if way == "apply_model":
            model_management.load_models_gpu([model])
            return (model.model.apply_model(latent, torch.ones(1), c_crossattn=made[0][0]),)
        if way == "a guider":
            guider = samplers.CFGGuider(model)
            guider.set_conds(made, made)
            euler = samplers.sampler_object("euler")
            return (guider.sample(latent, latent, euler, torch.tensor([1.0, 0.0])),)
        latent = {"samples": latent}
        return enforced.comfy.nodes.common_ksampler(model, seed, 1, 1.0, "euler", "normal", made, made, latent)

    add_node("Own", run, {"seed": ("INT", {"default": 0})}, ("LATENT",), is_output=True)
    graph = {"own": {"class_type": "Own", "inputs": {"seed": 1}}}
    assert enforced.queue(graph) == {}
    stopped(enforced, graph, UNGUARDED)


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
    stopped(operator, graph, UNGUARDED)


def test_one_class_under_a_denied_and_another_name_is_denied(operator, comfy, monkeypatch):
    known = comfy.nodes.NODE_CLASS_MAPPINGS
    monkeypatch.setitem(known, "Alias", known["EmptyLatentImage"])
    operator.write(f'{NONE_REQUIRED}[nodes]\ndeny = ["EmptyLatentImage"]\n')
    graph = stock(7)
    graph["latent"]["class_type"] = "Alias"
    graph["latent"]["inputs"]["width"] = 72
    stopped(operator, graph, "refused.nodes.deny")


def test_an_image_that_was_edited_does_not_leave_and_one_that_was_not_does(enforced):
    graph = guarded(8)
    graph["edit"] = {"class_type": "ImageInvert", "inputs": {"image": ["decode", 0]}}
    graph["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["edit", 0]}}
    stopped(enforced, graph, "refused.open.unattested")
    graph["edit"] = {"class_type": "AnyPass", "inputs": {"value": ["decode", 0]}}
    enforced.run_graph(graph)


def test_a_batch_with_one_unattested_image_does_not_leave(enforced):
    graph = guarded(9)
    plain = {"width": 64, "height": 64, "batch_size": 1, "color": 0x2468AC}  # not black, which gates put in
    graph["empty"] = {"class_type": "EmptyImage", "inputs": plain}
    graph["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["decode", 0], "image2": ["empty", 0]}}
    graph["save"]["inputs"] |= {"images": ["both", 0], "unattested": "save and say so"}
    assert set(enforced.queue(graph)) == {"save"}
    stopped(enforced, graph, "refused.open.unattested")


def test_a_node_that_shows_images_on_the_way_is_stopped(enforced, add_node, comfy):
    shown = {"images": [{"filename": "x.png", "subfolder": "", "type": "temp"}]}
    add_node("Peek", lambda image: {"ui": shown, "result": (image,)}, {"image": ("IMAGE",)})
    graph = guarded(25)
    graph["peek"] = {"class_type": "Peek", "inputs": {"image": ["decode", 0]}}
    graph["save"]["inputs"]["images"] = ["peek", 0]
    stopped(enforced, graph, "refused.open.unattested", "Peek")
    assert not any(event == "executed" and data["node"] == "peek" for event, data in comfy.server.messages)


def test_a_graph_does_not_say_itself_that_nothing_changed(enforced):
    graph = guarded(24)
    for node in graph.values():
        node["is_changed"] = ["as before"]
    said = enforced.enforce.on_prompt({"prompt": graph})
    assert not any("is_changed" in node for node in said["prompt"].values())
    assert said["prompt"].keys() == graph.keys()


def test_no_record_no_image(operator, sha256):
    (operator.path.parent / "blocked").parent.mkdir(parents=True, exist_ok=True)
    (operator.path.parent / "blocked").write_text("a file", encoding="utf-8")
    operator.write(required(sha256("safety.safetensors")) + '[record]\nfolder = "blocked"\n')
    with refuses("record.not-written", "blocked"):
        operator.run_graph(guarded(21))
    assert set(operator.queue(stock(21))) == {"sample", "save"}


def test_where_no_lora_is_required_sampling_is_free_and_recorded(operator):
    operator.write(NONE_REQUIRED)
    operator.run(stock(22))
    assert operator.record()[-1]["attestation"] == {"status": "unguarded"}


@pytest.mark.parametrize("key", ["training", "guarded_as_model", "audit"])
def test_our_own_nodes_ask_too(key, operator, comfy):
    operator.write(NONE_REQUIRED)
    policy: ModuleType = part(comfy, "comfy_host.enforcement.policy")
    with refuses(f"refused.open.{key}"):
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
