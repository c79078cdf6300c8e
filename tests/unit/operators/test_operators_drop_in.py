"""What a policy says of graphs with Guard before they run: an ordinary graph with one node more."""

from __future__ import annotations

import pytest
from support.graphs import node
from support.policy_graphs import TASK, refused


def ordinary(**changes: dict) -> dict:
    """ComfyUI's own nodes behind Guard: a loader of LoRAs, prompt, sampler, decode, save."""
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="x"),
        "guard": node(
            "ModularLoraGuard",
            model=["ckpt", 0],
            clip=["ckpt", 1],
            vae=["ckpt", 2],
            lora_name="safety.safetensors",
            strength=1.0,
        ),
        "lora": node("LoraLoader", model=["guard", 0], clip=["guard", 1], lora_name="task.safetensors"),
        "pos": node("CLIPTextEncode", clip=["lora", 1], text="a cat"),
        "latent": node("EmptyLatentImage", width=64),
        "sample": node("KSampler", model=["lora", 0], positive=["pos", 0], latent_image=["latent", 0]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["guard", 2]),
        "save": node("SaveImage", images=["decode", 0]),
    } | changes


def test_an_ordinary_graph_behind_guard_is_not_refused() -> None:
    assert refused(ordinary()) == {}
    sigmas = {"sigmas": node("BasicScheduler", model=["lora", 0]), "show": node("PreviewAny", source=["sigmas", 0])}
    assert refused(ordinary(**sigmas)) == {}


@pytest.mark.parametrize("link", ["model", "clip"])
def test_a_loader_of_loras_that_stands_elsewhere_is_refused(link: str) -> None:
    graph = ordinary()
    graph["lora"]["inputs"][link] = ["ckpt", 0 if link == "model" else 1]
    found = refused(graph)
    assert found["lora"] == {"guard.required"}
    graph = ordinary(before=node("LoraLoader", model=["ckpt", 0], clip=["ckpt", 1], lora_name="task.safetensors"))
    graph["guard"]["inputs"] |= {"model": ["before", 0], "clip": ["before", 1]}
    assert refused(graph) == {"before": {"guard.required"}}


def test_what_samples_or_decodes_past_it_is_refused() -> None:
    graph = ordinary()
    graph["sample"]["inputs"]["model"] = ["ckpt", 0]
    assert refused(graph)["sample"] == {"nodes.sampling"}
    graph = ordinary()
    graph["decode"]["inputs"]["vae"] = ["ckpt", 2]
    assert refused(graph) == {"save": {"open.unattested"}}
    graph = ordinary(any=node("Switch", a=["lora", 0], b=["ckpt", 0]))
    graph["sample"]["inputs"]["model"] = ["any", 0]
    assert "sample" in refused(graph)


def test_nodes_of_other_packs_need_their_names_still() -> None:
    graph = ordinary(other=node("FreeU", model=["lora", 0]))
    graph["sample"]["inputs"]["model"] = ["other", 0]
    assert "other" in refused(graph)
    assert refused(graph, '[nodes]\npatching = ["FreeU"]') == {}


@pytest.mark.parametrize(("name", "strength"), [("task.safetensors", 1.0), ("safety.safetensors", 0.5), ("other", 1.0)])
def test_the_safety_lora_on_the_node_must_be_the_one_that_is_required(name: str, strength: float) -> None:
    graph = ordinary()
    graph["guard"]["inputs"] |= {"lora_name": name, "strength": strength}
    found = refused(graph)
    assert found == ({} if name == "other" else {"guard": {"guard.required"}})  # of no such file the run tells
    graph["guard"]["inputs"] |= {"lora_name": "task.safetensors", "safety_lora": ["safety", 0]}
    graph["safety"] = node("ModularLoraLoadSafety", lora_name="safety.safetensors", strength=1.0)
    assert refused(graph) == {}


def test_a_file_that_was_saved_again_is_known_by_its_tensors() -> None:
    values = "d" * 64
    assert refused(ordinary(), f'[tasks]\nallow = ["{values}"]') == {}
    assert refused(ordinary(), f'[tasks]\ndeny = ["{values}"]') == {"lora": {"tasks.deny"}}


@pytest.mark.parametrize("rule", ["deny", "allow"])
def test_a_lora_behind_it_is_held_against_the_policys_lists(rule: str) -> None:
    listed = f'[tasks]\n{rule} = ["{TASK if rule == "deny" else "c" * 64}"]'
    assert refused(ordinary(), listed) == {"lora": {f"tasks.{rule}"}}
