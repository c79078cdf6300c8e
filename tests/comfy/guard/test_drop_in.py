"""Guard: an ordinary graph with one node more gives the image of the merge, guarded and attested."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.drop_in import SAFETY, guarded, merged, ordinary
from support.errors import refuses
from support.graphs import GraphError, bits, decode, node, sampler, save_lora
from support.variants import OTHER, TASK, VARIANTS, two_loaders

pytestmark = pytest.mark.usefixtures("packs")
LEVEL = 1 / 255
BOTH = {"model": ["ckpt", 0], "clip": ["ckpt", 1]}


@pytest.fixture
def judged(comfy, run_graph):
    """Checks a graph's images with Guard in it: those of the merge, not those of the graph alone, and attested."""

    def judge(graph: dict, behind: str = "ckpt", decoder: str = "decode", near: float = LEVEL, **safety) -> list:
        ours = run_graph(guarded(graph, behind, **safety))[decoder][0].clone()
        runs = [comfy.ledger.known(image) for image in ours]
        assert all(one.guarded for one in runs)
        merge, alone = (run_graph(one)[decoder][0].clone() for one in (merged(graph, **safety), graph))
        assert (merge - alone).abs().max() > 4 * near
        assert (ours - merge).abs().max() <= near
        return [one.run for one in runs]

    return judge


def tasks(run) -> list[tuple]:
    return [(one.name, one.strength_model, one.strength_clip, one.pending) for one in run.loras if one.role == "task"]


def written(comfy, loras, name: str, layers: dict | None = None, seed: int = 7, **more) -> str:
    save_lora(loras.folder / name, layers or loras.unet, 2, seed, **more)
    comfy.folder_paths.filename_list_cache.clear()
    return name


# Where it stands, and who loads


def test_an_ordinary_graph_with_one_node_more(comfy, judged, sha256):
    (run,) = judged(ordinary((TASK, 0.7)))
    assert run.status == "guarded"
    assert tasks(run) == [(TASK, 0.7, 0.0, False)]
    assert [one.sha256 for one in run.loras] == [sha256(SAFETY), sha256(TASK)]
    assert run.firings == run.layers * run.evaluations
    assert run.vae_sha256
    shown = comfy.server.texts["guard"].split("\n\n")  # what is read on the node
    line = f"Guarded: the safety LoRA ran in all {run.evaluations} evaluations of the model. 1 task LoRA."
    assert f"{line}\ntask: {TASK} at 0.7 / 0" in shown
    assert not any("sha256" in one for one in shown), "details are in the file and at the output"


@pytest.mark.parametrize("behind", ["lora0", "lora1"])  # behind the checkpoint: among the variants below
def test_loaders_before_and_after_it_are_counted_alike(judged, behind):
    (run,) = judged(two_loaders(), behind)
    assert sorted(tasks(run)) == [(OTHER, -0.4, 0.0, False), (TASK, 0.7, 0.0, False)]
    assert run.status == "guarded"
    assert not run.base_had_merged_loras


def test_loaders_of_the_model_alone(judged):
    graph = ordinary((TASK, 0.7), (OTHER, 0.5), kind="LoraLoaderModelOnly")
    assert [one[0] for one in tasks(judged(graph)[0])] == [TASK, OTHER]


def test_a_pack_that_calls_once_a_key_gives_one_lora_with_a_strength_for_each_layer(judged, sha256):
    graph = ordinary()
    graph["block"] = node("PackBlockLoader", **BOTH, lora_name=TASK, first=0.8, others=0.2)
    graph["sample"]["inputs"]["model"] = ["block", 0]
    (run,) = judged(graph)
    (task,) = [one for one in run.loras if one.role == "task"]
    assert (task.name, task.strength_model, task.sha256) == (TASK, 0.8, sha256(TASK))
    assert task.block_weights == "by layer, 0.25 to 1 of the strength"


def test_one_file_loaded_twice_acts_twice(judged):
    assert [one[1] for one in tasks(judged(ordinary((TASK, 0.3), (TASK, 0.3)))[0])] == [0.3, 0.3]


def test_values_that_a_pack_changed_are_of_no_file(judged, sha256):
    graph = ordinary()
    graph["scaled"] = node("PackScalingLoader", model=["ckpt", 0], lora_name=TASK, factor=0.5)
    graph["sample"]["inputs"]["model"] = ["scaled", 0]
    (run,) = judged(graph)
    (task,) = [one for one in run.loras if one.role == "task"]
    assert task.pending
    assert task.sha256 != sha256(TASK)


def test_the_text_encoders_half_is_kept_beside_its_weights_too(judged, loras):
    graph = ordinary(("task_te.safetensors", 0.6))
    (run,) = judged(graph, safety="safety_te.safetensors", near=2 * LEVEL)  # a merge rounds the encoder's fp16 weights
    assert tasks(run) == [("task_te.safetensors", 0.6, 0.6, False)]
    assert run.text_encoder == f"guarded, {len(loras.text)} layers"


# What samples and decodes


def test_a_second_safety_lora_comes_through_its_socket(comfy, run_graph):
    graph = guarded(ordinary((TASK, 0.7)))
    graph["more"] = node("ModularLoraLoadSafety", lora_name=OTHER, strength=0.8)
    graph["guard"]["inputs"]["safety_lora"] = ["more", 0]
    ours = run_graph(graph)["decode"][0].clone()
    (run,) = [comfy.ledger.known(image).run for image in ours]
    assert {(one.name, one.strength_model) for one in run.safety} == {(SAFETY, 1.0), (OTHER, 0.8)}
    merge = run_graph(merged(ordinary((TASK, 0.7), (OTHER, 0.8))))["decode"][0]
    assert (ours - merge).abs().max() <= LEVEL


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_the_ordinary_graph_varied(judged, variant):
    VARIANTS[variant].check(judged(variant()))


def idle_first(noise: float) -> dict:
    graph = ordinary((TASK, 0.7))
    given = {"model": ["lora0", 0], "positive": ["pos", 0], "negative": ["neg", 0]}
    graph["sample"] = node("PackIdleFirst", **given, noise=noise)
    return graph


def test_a_pack_that_first_samples_nothing_at_all(judged):
    (run,) = judged(idle_first(0.0))
    assert (run.status, run.evaluations > 0) == ("guarded", True)


def test_what_the_guarded_model_had_no_part_in_is_refused_where_an_image_may_be_in_it(run_graph):
    refused(run_graph, guarded(idle_first(1.0)), "run.never-evaluated", "PackIdleFirst")


@pytest.mark.parametrize("tiled", [False, True])
def test_a_node_that_samples_and_decodes_by_itself(judged, tiled):
    graph = ordinary((TASK, 0.7))
    links = {"model": ["lora0", 0], "clip": ["lora0", 1], "vae": ["ckpt", 2]}
    graph["one"] = node("PackOneNode", **links, text="gloss, cat", tiled=tiled)
    graph["shown"] = node("SaveImage", images=["one", 0], filename_prefix="d")
    assert judged(graph, decoder="one")[0].status == "guarded"


def test_our_own_nodes_take_it_as_well(comfy, run_graph):
    graph = guarded(ordinary((TASK, 0.7)))
    graph["sample"]["class_type"], graph["decode"] = "ModularLoraKSampler", decode(["sample", 0])
    graph["save"] = node("ModularLoraSaveImage", images=["decode", 0], filename_prefix="d", unattested="refuse")
    results = run_graph(graph)
    assert "\nguarded: " in results["sample"][1]
    assert comfy.ledger.known(results["decode"][0][0]).guarded


# What is refused, and where


def refused(run_graph, graph: dict, code: str | tuple[str, ...], where: str, *named: str) -> None:
    with refuses(code, *named) as caught:
        run_graph(graph)
    assert caught.value.node_type == where


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.5])
@pytest.mark.parametrize("kind", ["LoraLoader", "LoraLoaderModelOnly"])
def test_the_safety_lora_by_another_loader_is_refused_there(run_graph, kind, strength):
    refused(run_graph, guarded(ordinary((SAFETY, strength), kind=kind)), "lora.both-roles", kind)


def test_the_safety_lora_before_it_is_refused_at_the_node(run_graph):
    refused(run_graph, guarded(ordinary((SAFETY, -0.3)), behind="lora0"), "lora.both-roles", "ModularLoraGuard")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("what", ["scaled", "half of the layers", "fp8", "lower rank"])
def test_the_safety_lora_in_disguise_is_known_by_its_direction(comfy, run_graph, loras, what, sign):
    tensors = load_file(loras.folder / SAFETY)
    if what == "scaled":
        tensors = {k: v * 0.37 if "lora_up" in k else v for k, v in tensors.items()}
    elif what == "half of the layers":
        kept = sorted({k.partition(".")[0] for k in tensors})[::2]
        tensors = {k: v * 0.37 if "lora_up" in k else v for k, v in tensors.items() if k.partition(".")[0] in kept}
    elif what == "fp8":
        tensors = {k: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for k, v in tensors.items()}
    else:
        tensors = {k: v[:3] if "lora_down" in k else v[:, :3] if "lora_up" in k else v for k, v in tensors.items()}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, loras.folder / "disguise.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    graph = guarded(ordinary(("disguise.safetensors", 0.2 * sign)))
    refused(run_graph, graph, "lora.both-roles", "LoraLoader")


def test_what_cancels_it_together_is_refused_when_it_samples(comfy, run_graph, loras):
    """A LoRA with the safety LoRA in it under noise of twice its size: once enough of it is left, twice not."""
    tensors, noise = load_file(loras.folder / SAFETY), load_file(loras.folder / TASK)
    mixed = {}
    for name in sorted({k.partition(".")[0] for k in tensors}):
        up, down = (f"{name}.lora_{half}.weight" for half in ("up", "down"))
        mixed[up] = torch.cat([-tensors[up], 2 * noise[up]], 1)
        mixed[down] = torch.cat([tensors[down], noise[down]])
    save_file(mixed, loras.folder / "mixed.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    one = ("mixed.safetensors", 0.3)
    run_graph(guarded(ordinary(one)))
    refused(run_graph, guarded(ordinary(one, one)), "guard.net-strength", "KSampler")


def test_merges_behind_and_before_it_are_refused_by_name(run_graph, loras):
    graph = guarded(ordinary((TASK, 0.7)))
    graph["merge"] = node("ModelMergeSimple", model1=["lora0", 0], model2=["ckpt", 0], ratio=0.5)
    graph["sample"]["inputs"]["model"] = ["merge", 0]
    refused(run_graph, graph, "model.not-kept", "ModelMergeSimple", "model merge")
    graph["merge"]["inputs"] |= {"model1": ["ckpt", 0], "model2": ["lora0", 0]}
    refused(run_graph, graph, "model.refused", "ModelMergeSimple", "get_key_patches")
    graph = ordinary((TASK, 0.7))
    graph["second"] = node("LoraLoader", **BOTH, lora_name=OTHER, strength_model=1.0, strength_clip=0.0)
    graph["merge"] = node("ModelMergeSimple", model1=["lora0", 0], model2=["second", 0], ratio=0.5)
    graph["sample"]["inputs"]["model"] = ["merge", 0]
    graph["guard"] = node("ModularLoraGuard", model=["merge", 0], lora_name=SAFETY, strength=1.0)
    graph["sample"]["inputs"]["model"] = ["guard", 0]
    refused(run_graph, graph, "model.not-kept", "ModularLoraGuard", "model merge")


def test_whole_weights_and_saving_are_refused(run_graph):
    graph = guarded(ordinary())
    graph["light"] = node("PackWholeWeights", model=["guard", 0], strength=1.0)
    graph["sample"]["inputs"]["model"] = ["light", 0]
    refused(run_graph, graph, "model.not-kept", "PackWholeWeights")
    graph = guarded(ordinary())
    graph["weights"] = node("ModelSave", model=["guard", 0], filename_prefix="w")
    refused(run_graph, graph, "model.refused", "ModelSave")


def test_a_clone_that_drops_the_guard_is_refused_when_it_samples(run_graph):
    graph = guarded(ordinary())
    graph["own"] = node("PackOwnClone", model=["guard", 0])
    graph["sample"]["inputs"]["model"] = ["own", 0]
    refused(run_graph, graph, "model.guard-taken-off", "KSampler")


def test_values_that_are_not_finite_are_refused_at_their_loader(comfy, run_graph, loras):
    tensors = load_file(loras.folder / TASK)
    first = next(k for k in tensors if "lora_up" in k)
    tensors[first][0, 0] = float("nan")
    save_file(tensors, loras.folder / "broken.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    refused(run_graph, guarded(ordinary(("broken.safetensors", 0.5))), "file.not-finite", "LoraLoader")


def test_a_safety_lora_with_a_text_encoder_half_needs_the_clip(run_graph):
    graph = guarded(ordinary(), safety="safety_te.safetensors")
    del graph["guard"]["inputs"]["clip"]
    for name in ("pos", "neg"):
        graph[name]["inputs"]["clip"] = ["ckpt", 1]
    refused(run_graph, graph, "guard.no-clip", "ModularLoraGuard")
    graph["guard"]["inputs"]["clip"] = ["ckpt", 1]
    refused(run_graph, graph, "conditioning.not-guarded", "KSampler")


def test_two_guards_in_a_row_are_refused(run_graph):
    graph = guarded(ordinary())
    graph["again"] = node("ModularLoraGuard", model=["guard", 0], lora_name=SAFETY, strength=1.0)
    graph["sample"]["inputs"]["model"] = ["again", 0]
    refused(run_graph, graph, "model.guarded-already", "ModularLoraGuard")


def test_what_is_not_connected_is_not_given(run_graph):
    graph = guarded(ordinary())
    del graph["guard"]["inputs"]["vae"]
    with pytest.raises(GraphError, match="Guard gives no VAE"):
        run_graph(graph)


# LoRA hooks


def hooked(
    lora: str = TASK, strength: float = 0.8, keyframes: tuple[tuple[float, float], ...] = (), both: bool = False
):
    """An ordinary graph with a LoRA hook on its positive conditioning, or on both; keyframes are (strength, start)."""
    graph = ordinary((OTHER, 0.4))
    graph["hook"] = node("CreateHookLora", lora_name=lora, strength_model=strength, strength_clip=0.0)
    last = ["hook", 0]
    for i, (factor, start) in enumerate(keyframes):
        before = {"prev_hook_kf": [f"key{i - 1}", 0]} if i else {}
        graph[f"key{i}"] = node("CreateHookKeyframe", strength_mult=factor, start_percent=start, **before)
    if keyframes:
        graph["keyed"] = node("SetHookKeyframes", hooks=last, hook_kf=[f"key{len(keyframes) - 1}", 0])
        last = ["keyed", 0]
    for name in ("pos", "neg") if both else ("pos",):
        properties = {"strength": 1.0, "set_cond_area": "default", "hooks": last}
        graph[f"{name}_hooked"] = node("ConditioningSetProperties", cond_NEW=[name, 0], **properties)
        graph["sample"]["inputs"]["positive" if name == "pos" else "negative"] = [f"{name}_hooked", 0]
    graph["sample"]["inputs"]["steps"] = 4
    return graph


@pytest.mark.parametrize("both", [False, True])
def test_a_lora_hook_is_kept_beside_the_weights_for_its_conditioning(judged, sha256, both):
    (run,) = judged(hooked(both=both))
    assert run.status == "guarded"
    assert tasks(run) == [(OTHER, 0.4, 0.0, False), (TASK, 0.8, 0.0, False)]
    assert run.loras[-1].sha256 == sha256(TASK)
    assert run.loras[-1].block_weights == "by a hook, 0.8 to 0.8 where it acts"
    assert run.evaluations in ((4, 8) if both else (8,))  # four steps, with the hook and without it apart


def test_a_hooks_keyframes_give_a_strength_by_step(judged):
    (run,) = judged(hooked(keyframes=((1.0, 0.0), (0.25, 0.5))))
    assert run.loras[-1].block_weights == "by a hook, 0.2 to 0.8 where it acts"
    assert run.measured_evaluations > 0


def test_the_worst_step_of_a_hook_decides(comfy, run_graph, loras):
    tensors, noise = load_file(loras.folder / SAFETY), load_file(loras.folder / TASK)
    mixed = {}
    for name in sorted({k.partition(".")[0] for k in tensors}):
        up, down = (f"{name}.lora_{half}.weight" for half in ("up", "down"))
        mixed[up] = torch.cat([-tensors[up], 2 * noise[up]], 1)
        mixed[down] = torch.cat([tensors[down], noise[down]])
    save_file(mixed, loras.folder / "hooked.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    safe = hooked("hooked.safetensors", 1.0, ((0.1, 0.0), (0.3, 0.6)))
    results = run_graph(guarded(safe))
    (run,) = [comfy.ledger.known(image).run for image in results["decode"][0]]
    assert 0.65 < min(run.net_strength.values()) < 0.75
    worst = hooked("hooked.safetensors", 1.0, ((0.1, 0.0), (0.8, 0.6)))
    refused(run_graph, guarded(worst), "guard.net-strength", "KSampler")
    refused(run_graph, guarded(hooked(SAFETY, -0.2)), "lora.both-roles", "KSampler")
    assert run_graph(guarded(ordinary()))["decode"][0] is not None  # nothing of it is left on the layers


def on_clip(graph: dict, schedule: bool, lora: str, strength_clip: float) -> dict:
    """The same hook by Set CLIP Hooks, as prompt-control's scheduled LoRAs are."""
    graph["hook"]["inputs"] |= {"lora_name": lora, "strength_clip": strength_clip}
    hooks = graph["pos_hooked"]["inputs"]["hooks"]
    given = {"clip": ["lora0", 1], "hooks": hooks, "apply_to_conds": True, "schedule_clip": schedule}
    graph["clip_hooks"] = node("SetClipHooks", **given)
    graph["pos"]["inputs"]["clip"] = ["clip_hooks", 0]
    graph["sample"]["inputs"]["positive"] = ["pos", 0]
    return graph


@pytest.mark.parametrize(("lora", "strength_clip"), [(TASK, 0.8), ("task_te.safetensors", 0.0)])
def test_a_hook_on_the_clip_that_leaves_the_text_encoder_alone_acts_on_the_model(judged, lora, strength_clip):
    (run,) = judged(on_clip(hooked(keyframes=((1.0, 0.0), (0.25, 0.5))), True, lora, strength_clip))
    assert run.status == "guarded"
    assert run.loras[-1].block_weights == "by a hook, 0.2 to 0.8 where it acts"


@pytest.mark.parametrize("schedule", [False, True])
def test_a_hook_on_the_clip_encodes_the_prompt_with_its_lora(judged, sha256, schedule):
    (run,) = judged(on_clip(hooked(keyframes=((1.0, 0.0), (0.25, 0.5))), schedule, "task_te.safetensors", 0.5))
    assert run.status == "guarded"
    assert run.loras[-1].block_weights == "by a hook, 0.2 to 0.8 where it acts"
    text = [lora.strength_clip for lora in run.loras[2:-1]]
    assert text == ([0.5, 0.125] if schedule else [0.5])
    assert {lora.sha256 for lora in run.loras[2:]} == {sha256("task_te.safetensors")}


def registered(lora: str) -> dict:
    graph = hooked()
    both = {"model": ["lora0", 0], "clip": ["lora0", 1]}
    graph["hook"] = node("PackRegisteredHook", **both, lora_name=lora, strength=0.8)
    graph["pos_hooked"]["inputs"]["hooks"] = ["hook", 2]
    graph["pos"]["inputs"]["clip"] = ["hook", 1]
    graph["sample"]["inputs"]["model"] = ["hook", 0]
    return graph


def test_a_pack_that_registers_a_hook_on_the_model_itself(judged, run_graph):
    (run,) = judged(registered(TASK))
    assert tasks(run) == [(OTHER, 0.4, 0.0, False), (TASK, 0.8, 0.0, False)]
    (run,) = judged(registered("task_te.safetensors"))  # nothing encodes under it
    assert [strength_clip for _, _, strength_clip, _ in tasks(run)] == [0.0, 0.0]


def test_a_model_as_a_lora_hook_is_refused_by_name(run_graph):
    graph = guarded(hooked())
    graph["hook"] = node("CreateHookModelAsLora", ckpt_name="world.safetensors", strength_model=1.0, strength_clip=0.0)
    refused(run_graph, graph, "model.not-kept", "KSampler")
    graph = guarded(on_clip(hooked(), False, "task_te.safetensors", 0.5))
    graph["hook"] = node("CreateHookModelAsLora", ckpt_name="world.safetensors", strength_model=0.0, strength_clip=1.0)
    refused(run_graph, graph, "model.not-kept", "SetClipHooks")


# What it costs, and what stays


def test_a_chain_of_six_is_worked_out_once_a_lora_and_built_once(comfy, run_graph, loras, monkeypatch):
    from modular_lora_guard.comfy_host import drop_in, lifting

    names = [written(comfy, loras, f"six{i}.safetensors", seed=20 + i) for i in range(6)]
    run_graph(guarded(ordinary()))
    counts = {"applied": [], "built": 0}
    apply_task, build_part = lifting.apply_task, drop_in.build_part

    def applying(task, *rest):
        counts["applied"].append(task.lora.name)
        return apply_task(task, *rest)

    def building(*args, **kwargs):
        counts["built"] += 1
        return build_part(*args, **kwargs)

    monkeypatch.setattr(lifting, "apply_task", applying)
    monkeypatch.setattr(drop_in, "build_part", building)
    monkeypatch.setattr("modular_lora_guard.modular_lora.guard.build.apply_task", applying)
    graph = guarded(ordinary(*((name, 0.2) for name in names)))
    graph["second"] = sampler(["lora5", 0], latent_image=["sample", 0], denoise=0.5)
    graph["decode"]["inputs"]["samples"] = ["second", 0]
    run_graph(graph)
    assert counts == {"applied": names, "built": 1}


def test_w0_is_what_it_was(comfy, loaded, run_graph, loras):
    from comfy.model_management import unload_all_models

    model, clip, vae = loaded
    from modular_lora_guard.comfy_host import drop_in

    g = comfy.host_guard
    before = bits(model.model), bits(clip.cond_stage_model)
    safety = (g.SafetyLora(comfy.host_files.read_lora(loras.folder / SAFETY), 1.0),)
    made = drop_in.attach(model, clip, vae, safety)
    patched, text = comfy.nodes.LoraLoader().load_lora(made.model, made.clip, "task_te.safetensors", 0.7, 0.7)
    conds = [text.encode_from_tokens_scheduled(text.tokenize(said)) for said in ("gloss, cat", "")]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    comfy.nodes.KSampler().sample(patched, 1, 2, 2.0, "euler", "normal", *conds, latent)
    unload_all_models()
    for module, bytes_ in zip((model.model, clip.cond_stage_model), before, strict=True):
        now = bits(module)
        assert all(torch.equal(now[name], value) for name, value in bytes_.items())
    assert not made.model.guard_added  # a clone has what was put onto it, and no other


def test_the_report_on_the_node_names_what_waited_in_front(run_graph):
    report = run_graph(guarded(ordinary((TASK, 0.7)), behind="lora0"))["guard"][3]
    assert f"task {TASK}: " in report
    assert "handed over by another loader" in report
    json.dumps(report)
