"""Every path by which a graph could merge, save or drop the LoRAs is refused with one line, or keeps the guard."""

from __future__ import annotations

import pytest
import torch
from support.errors import refuses
from support.graphs import GraphError, decode, guarded_graph, node, sampler

REFUSED_LINKS = {
    "LoraLoaderModelOnly": {"lora_name": "task.safetensors", "strength_model": 1.0},
    "LoraLoader": {"lora_name": "task.safetensors", "strength_model": 1.0, "strength_clip": 1.0, "clip": ["ckpt", 1]},
    "ModelSave": {"filename_prefix": "x"},
    "CheckpointSave": {"filename_prefix": "x", "clip": ["ckpt", 1], "vae": ["ckpt", 2]},
    "KSampler": sampler(["guard", 0])["inputs"],
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
}
MERGES = {
    "ModelMergeSimple": ("model1", "model2", {"ratio": 0.5}),
    "ModelMergeAdd": ("model1", "model2", {}),
    "ModelMergeSubtract": ("model1", "model2", {"multiplier": 1.0}),
    "ModelMergeBlocks": ("model1", "model2", {"input": 0.5, "middle": 0.5, "out": 0.5}),
}


def as_model() -> dict:
    """The guarded graph with its model made a MODEL, and a stock sampler on whatever "last" gives."""
    graph = guarded_graph()
    for name in ("sample", "decode", "save"):
        graph.pop(name)
    graph["asmodel"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    return graph


def sampled(graph: dict, model: list, **changes) -> dict:
    graph["sample"] = sampler(model, **changes)
    graph["decode"] = decode(["sample", 0])
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["decode", 1]}}
    return graph


@pytest.mark.parametrize("kind", REFUSED_LINKS)
def test_a_guarded_model_does_not_fit_a_socket_that_merges_saves_or_samples_unguarded(kind, run_graph, loras):
    graph = guarded_graph()
    graph["bad"] = node(kind, **{**REFUSED_LINKS[kind], "model": ["guard", 0]})
    if kind not in ("ModelSave", "CheckpointSave"):
        graph["show"] = node("PreviewAny", source=["bad", 0])
    with pytest.raises(GraphError, match=r"return_type_mismatch") as error:
        run_graph(graph)
    assert error.value.stage == "validation"


def test_a_detour_through_an_any_type_switch_fails_with_our_error(comfy, run_graph, loras):
    graph = guarded_graph()
    graph["any"] = node("AnyPass", value=["guard", 0])
    graph["bad"] = sampler(["any", 0])
    graph["show"] = node("PreviewAny", source=["bad", 0])
    with refuses("handle"):
        run_graph(graph)


@pytest.mark.parametrize("kind", ["LoraLoaderModelOnly", "LoraLoader"])
def test_a_stock_lora_loader_after_the_guard_is_refused(kind, run_graph, loras):
    graph = as_model()
    graph["lora"] = node(kind, **{**REFUSED_LINKS[kind], "model": ["asmodel", 0]})
    with refuses("model.refused", "add_patches"):
        run_graph(sampled(graph, ["lora", 0]))


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("role", [0, 1])
def test_merging_a_guarded_model_either_way_is_refused(kind, role, run_graph, loras):
    graph = as_model()
    extra = MERGES[kind][2]
    models = {MERGES[kind][role]: ["asmodel", 0], MERGES[kind][1 - role]: ["ckpt", 0]}
    graph["merge"] = node(kind, **models, **extra)
    with refuses("model.refused"):
        run_graph(sampled(graph, ["merge", 0]))


@pytest.mark.parametrize("kind", ["ModelSave", "CheckpointSave"])
def test_saving_a_guarded_model_is_refused_and_writes_nothing(kind, comfy, run_graph, loras):
    graph = as_model()
    graph["save"] = node(kind, **{**REFUSED_LINKS[kind], "model": ["asmodel", 0], "filename_prefix": "refused"})
    with refuses("model.refused"):
        run_graph(graph)
    assert not list(comfy.output.rglob("refused*"))


def test_extracting_a_lora_from_a_guarded_model_is_refused(comfy, run_graph, loras):
    graph = as_model()
    graph["save"] = node(
        "LoraSave", filename_prefix="refused", rank=4, lora_type="standard", bias_diff=False, model_diff=["asmodel", 0]
    )
    with refuses("model.refused"):
        run_graph(graph)
    assert not list(comfy.output.rglob("refused*"))


def test_attention_multiply_is_refused(run_graph, loras):
    graph = as_model()
    graph["mul"] = node("UNetSelfAttentionMultiply", model=["asmodel", 0], q=1.1, k=1.0, v=1.0, out=1.0)
    with refuses("model.refused"):
        run_graph(sampled(graph, ["mul", 0]))


@pytest.mark.parametrize("kind", ["CLIPMergeSimple", "CLIPSave", "LoraLoader"])
def test_the_guarded_clip_is_not_merged_saved_or_patched(kind, comfy, run_graph, loras):
    graph = guarded_graph("safety_te.safetensors", "task_te.safetensors", clip=True)
    bad = {
        "CLIPMergeSimple": node("CLIPMergeSimple", clip1=["ckpt", 1], clip2=["guard", 1], ratio=0.5),
        "CLIPSave": node("CLIPSave", clip=["guard", 1], filename_prefix="refused"),
        "LoraLoader": node(
            "LoraLoader",
            model=["ckpt", 0],
            clip=["guard", 1],
            lora_name="task_te.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        ),
    }
    graph["bad"] = bad[kind]
    if kind != "CLIPSave":
        output = ["bad", 1 if kind == "LoraLoader" else 0]
        graph["pos"]["inputs"]["clip"] = output
    with refuses("model.refused"):
        run_graph(graph)
    assert not list(comfy.output.rglob("refused*"))


def test_a_lora_hook_on_the_conditioning_is_refused_when_it_samples(run_graph, loras):
    graph = guarded_graph()
    graph["hook"] = node("CreateHookLora", lora_name="task.safetensors", strength_model=1.0, strength_clip=1.0)
    graph["hooked"] = node(
        "ConditioningSetProperties", cond_NEW=["pos", 0], strength=1.0, set_cond_area="default", hooks=["hook", 0]
    )
    graph["sample"]["inputs"]["positive"] = ["hooked", 0]
    with refuses(("model.refused", "model.patched")):
        run_graph(graph)


def test_clip_hooks_on_the_guarded_clip_are_refused(run_graph, loras):
    graph = guarded_graph("safety_te.safetensors", None, clip=True)
    graph["hook"] = node("CreateHookLora", lora_name="task_te.safetensors", strength_model=1.0, strength_clip=1.0)
    graph["hooked"] = node(
        "SetClipHooks", clip=["guard", 1], apply_to_conds=True, schedule_clip=False, hooks=["hook", 0]
    )
    graph["pos"]["inputs"]["clip"] = ["hooked", 0]
    with refuses(("model.refused", "model.hooks")):
        run_graph(graph)


def test_easycache_before_and_after_the_guard_is_refused_by_name(run_graph, loras):
    settings = {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    before = guarded_graph()
    before["cache"] = node("EasyCache", model=["ckpt", 0], **settings)
    before["guard"]["inputs"]["model"] = ["cache", 0]
    after = as_model()
    after["cache"] = node("EasyCache", model=["asmodel", 0], **settings)
    for graph in (before, sampled(after, ["cache", 0])):
        with refuses("model.patched", "EasyCache"):
            run_graph(graph)


def test_skip_layer_guidance_stops_because_branches_did_not_run(run_graph, loras):
    graph = as_model()
    graph["skip"] = node("SkipLayers", model=["asmodel", 0])
    with refuses("run.short"):
        run_graph(sampled(graph, ["skip", 0]))


def test_a_model_merged_before_the_guard_is_refused_unless_accepted_and_then_reported(run_graph, loras):
    graph = guarded_graph()
    graph["merge"] = node("ModelMergeSimple", model1=["ckpt", 0], model2=["ckpt", 0], ratio=0.5)
    graph["guard"]["inputs"]["model"] = ["merge", 0]
    with refuses("model.merged"):
        run_graph(graph)
    graph["guard"]["inputs"]["accept_merged"] = True
    results = run_graph(graph)
    assert "the base is not W0" in results["guard"][2]
    assert "LoRAs merged before" in results["sample"][1]
    assert "\nguarded, merged base: " in results["sample"][1]


def test_guarding_twice_is_refused(run_graph, loras):
    graph = as_model()
    graph["again"] = node("ModularLoraGuardModel", model=["asmodel", 0], safety_lora=["safety", 0])
    graph["bad"] = sampler(["again", 0], "ModularLoraKSampler")
    graph["show"] = node("PreviewAny", source=["bad", 1])
    with refuses("model.guarded-already"):
        run_graph(graph)


def test_an_unguarded_model_is_refused_by_every_guarded_sampler(run_graph, loras):
    graph = guarded_graph()
    graph["sample"]["inputs"]["model"] = ["ckpt", 0]
    with refuses("model.not-guarded"):
        run_graph(graph)
    graph = guarded_graph()
    graph["guider"] = node("ModularLoraGuider", model=["ckpt", 0], positive=["pos", 0], negative=["neg", 0], cfg=1.0)
    graph["show"] = node("PreviewAny", source=["guider", 0])
    with refuses("model.not-guarded"):
        run_graph(graph)


KEEPS = {  # more of them, against the merged model, in test_conditions_sampling.py
    "ModelSamplingDiscrete": {"sampling": "v_prediction", "zsnr": False},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
}


@pytest.mark.parametrize("kind", KEEPS)
def test_model_patches_before_and_after_the_guard_keep_it(kind, run_graph, loras):
    """After the guard on the MODEL, and before it: the same image, attested, and not the unguarded one."""
    after = as_model()
    after["patch"] = node(kind, model=["asmodel", 0], **KEEPS[kind])
    got = run_graph(sampled(after, ["patch", 0]))
    before = guarded_graph()
    before["patch"] = node(kind, model=["ckpt", 0], **KEEPS[kind])
    before["guard"]["inputs"]["model"] = ["patch", 0]
    before["plain"] = sampler(["patch", 0])
    before["show"] = node("PreviewAny", source=["plain", 0])
    expected = run_graph(before)
    assert "guarded: " in got["decode"][1]
    assert "guarded: " in expected["decode"][1]
    assert not torch.equal(expected["sample"][0]["samples"], expected["plain"][0]["samples"])
    assert torch.equal(got["sample"][0]["samples"], expected["sample"][0]["samples"])
