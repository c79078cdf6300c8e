"""LoRAs that a loader before the guard left in MODEL and CLIP: task LoRAs that every check sees, or merged in words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.families import evaluate, make, named
from support.families_image import IMAGE
from support.graphs import guarded_graph, node, sampler, save_lora
from support.lora_forms import FORMS, linear, random, stock
from support.operator_graphs import required, stopped

SAFETY, TASK, OTHER = "safety.safetensors", "task.safetensors", "other.safetensors"
BOTH = {"clip": True, "safety": "safety_te.safetensors"}


def behind(*loras: tuple[str, float], safety: str = SAFETY, clip: bool = False, kind: str = "LoraLoader") -> dict:
    """Guard Model, with accept_merged on, behind stock loaders in a chain."""
    graph = guarded_graph(safety, None, clip)
    model, text = _chain(graph, "before", loras, kind)
    graph["guard"]["inputs"] |= {"model": model, "accept_merged": True} | ({"clip": text} if clip else {})
    return graph


def _chain(graph: dict, prefix: str, loras, kind: str = "LoraLoader") -> tuple[list, list]:
    model, text = ["ckpt", 0], ["ckpt", 1]
    for i, (name, strength) in enumerate(loras):
        inputs = {"model": model, "lora_name": name, "strength_model": strength}
        inputs |= {"clip": text, "strength_clip": strength} if kind == "LoraLoader" else {}
        graph[f"{prefix}{i}"] = node(kind, **inputs)
        model, text = [f"{prefix}{i}", 0], [f"{prefix}{i}", 1] if kind == "LoraLoader" else text
    return model, text


def with_merge(graph: dict, *loras: tuple[str, float], clip: bool = False) -> dict:
    """The same LoRAs merged by the stock loader and sampled by the stock KSampler, in the same graph."""
    model, text = _chain(graph, "merged", loras)
    text = text if clip else ["ckpt", 1]
    graph["mpos"], graph["mneg"] = (node("CLIPTextEncode", clip=text, text=said) for said in ("gloss, cat", ""))
    graph["plain"] = sampler(model, positive=["mpos", 0], negative=["mneg", 0])
    graph["w0"] = sampler(["ckpt", 0], positive=["mpos", 0], negative=["mneg", 0])
    graph["show"], graph["shown"] = (node("PreviewAny", source=[name, 0]) for name in ("plain", "w0"))
    return graph


def error(results: dict) -> float:
    """The largest |guarded - merged| over the largest |merged - base|."""
    ours, merged, base = (results[name][0]["samples"] for name in ("sample", "plain", "w0"))
    effect = (merged - base).abs().max()
    assert effect > 0.01
    return float((ours - merged).abs().max() / effect)


def written(comfy, loras, name: str, layers: dict | None = None, **more) -> str:
    """A LoRA file in the loras folder."""
    save_lora(loras.folder / name, layers or loras.unet, 3, **more)
    comfy.folder_paths.filename_list_cache.clear()
    return name


@pytest.mark.parametrize("kind", ["LoraLoader", "LoraLoaderModelOnly"])
def test_the_safety_lora_taken_back_before_the_guard_is_refused_by_its_values(kind, run_graph, loras):
    for strength in (-1.0, -0.3):
        with refuses("lora.both-roles"):
            run_graph(behind((SAFETY, strength), kind=kind))


def test_what_cancels_the_safety_lora_before_the_guard_is_refused_by_net_strength(comfy, run_graph, loras):
    tensors = load_file(loras.folder / SAFETY)
    save_file({k: v / 2 if "lora_up" in k else v for k, v in tensors.items()}, loras.folder / "half.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    with refuses("guard.net-strength"):
        run_graph(behind(("half.safetensors", -2.0)))
    with refuses("guard.net-strength"):
        run_graph(behind((TASK, 1.0), ("half.safetensors", -1.2)))


def test_a_lora_before_the_guard_is_counted_and_attested_and_the_image_is_the_merge(comfy, run_graph, loras):
    results = run_graph(with_merge(behind((TASK, 0.8)), (TASK, 0.8), (SAFETY, 1.0)))
    assert error(results) < 1e-4
    assert results["guard"][2].count("task pending LoRA 1 (loaded before the guard): ") == 1
    assert f"{len(loras.unet)} changes of the MODEL" in results["guard"][2]
    assert "base is not W0" not in results["guard"][2]
    assert "\nguarded: " in results["sample"][1]
    with Image.open(max(comfy.output.glob("t_*.png"))) as image:
        said = json.loads(image.text["modular_lora_attestation"])
    assert said["status"] == "guarded"
    assert not said["base_had_merged_loras"]
    (task,) = [lora for lora in said["loras"] if lora["role"] == "task"]
    assert (task["strength_model"], task["pending"], len(task["sha256"])) == (0.8, True, 64)
    (safety,) = [lora for lora in said["loras"] if lora["role"] == "safety"]
    assert not safety["pending"]


def test_a_chain_of_loaders_gives_one_task_lora_for_each_also_with_a_handle(run_graph, loras):
    graph = with_merge(behind((TASK, 0.5), (OTHER, 0.5)), (TASK, 0.5), (OTHER, 0.5), (SAFETY, 1.0))
    results = run_graph(graph)
    assert error(results) < 1e-4
    assert results["guard"][2].count("task pending LoRA") == 2
    graph = with_merge(behind((TASK, 0.5)), (TASK, 0.5), (OTHER, -0.4), (SAFETY, 1.0))
    graph["task"] = node("ModularLoraLoadTask", lora_name=OTHER, strength_model=-0.4, strength_clip=-0.4)
    graph["guard"]["inputs"]["task_lora"] = ["task", 0]
    results = run_graph(graph)
    assert error(results) < 1e-4
    lines = [line.strip() for line in results["guard"][2].splitlines()]
    assert [line.partition(":")[0] for line in lines if line.startswith("task ")][:2] == [
        "task other.safetensors",
        "task pending LoRA 1 (loaded before the guard)",
    ]


def test_the_text_encoders_half_is_taken_out_with_the_other_and_acts(run_graph, loras):
    files = (("task_te.safetensors", 0.6),)
    graph = with_merge(behind(*files, **BOTH), *files, ("safety_te.safetensors", 1.0), clip=True)
    results = run_graph(graph)
    assert error(results) < 5e-3  # the text encoder's weights are fp16, and a merge is rounded to them
    assert results["guard"][2].count("task pending LoRA 1 ") >= 2  # U-Net and text encoder
    assert "pending LoRA 2" not in results["guard"][2]
    assert f"{len(loras.text)} changes of the CLIP" in results["guard"][2]
    text_only = {"before0": {"strength_model": 0.0}}
    graph = behind(*files, **BOTH)
    graph["before0"]["inputs"] |= text_only["before0"] | {"lora_name": "safety_te.safetensors", "strength_clip": -1.0}
    with refuses("lora.both-roles"):
        run_graph(graph)


def test_a_lora_on_the_clip_alone_is_taken_out_of_the_clip(run_graph, loras):
    graph = behind(("task_te.safetensors", 0.6), clip=True)
    graph["before0"]["inputs"]["strength_model"] = 0.0
    report = run_graph(graph)["guard"][2]
    assert "strength 0.6" in report
    assert "base is not W0" not in report


def test_nothing_of_it_stays_in_the_weights_where_another_node_merges_it(comfy, loaded, run_graph, loras):
    from comfy.model_management import unload_all_models

    before = {k: v.clone() for k, v in loaded[0].model.state_dict().items()}
    graph = with_merge(behind((TASK, 0.8)), (TASK, 0.8))
    graph["guard"]["inputs"]["model"] = graph["plain"]["inputs"]["model"] = ["before0", 0]
    first = run_graph(graph)
    graph["guard"]["inputs"]["accept_merged"] = 1  # the same run again, after the merge
    second = run_graph(graph)
    assert torch.equal(first["sample"][0]["samples"], second["sample"][0]["samples"])
    unload_all_models()
    assert all(torch.equal(before[k], v.to(before[k].device)) for k, v in loaded[0].model.state_dict().items())


def test_without_accept_merged_it_is_refused_with_what_it_is(run_graph, loras):
    graph = behind((TASK, 0.8))
    graph["guard"]["inputs"]["accept_merged"] = False
    with refuses("model.merged", "LoRAs"):
        run_graph(graph)
    graph["merge"] = node("ModelMergeSimple", model1=["ckpt", 0], model2=["before0", 0], ratio=0.5)
    graph["guard"]["inputs"]["model"] = ["merge", 0]
    with refuses("model.merged", "model merge"):
        run_graph(graph)


MERGED = {
    "model": lambda g: g | {"merge": node("ModelMergeSimple", model1=["ckpt", 0], model2=["before0", 0], ratio=0.5)},
    "clip": lambda g: g | {"merge": node("CLIPMergeSimple", clip1=["ckpt", 1], clip2=["before0", 1], ratio=0.5)},
}


@pytest.mark.parametrize("what", MERGED)
def test_what_is_really_merged_keeps_its_word_wherever_the_image_is_spoken_of(what, comfy, run_graph, loras):
    graph = MERGED[what](behind(("task_te.safetensors", 0.8), clip=True))
    graph["guard"]["inputs"] |= {"model": ["ckpt", 0], "clip": ["ckpt", 1], what: ["merge", 0]}
    results = run_graph(graph)
    assert "the base is not W0" in results["guard"][2]
    assert "\nguarded, merged base: " in results["sample"][1]
    assert "LoRAs merged before" in results["sample"][1]
    assert "guarded, merged base: " in results["decode"][1]
    assert "1 of 1 images attested, 1 of them on a merged base" in comfy.server.texts["save"]
    with Image.open(max(comfy.output.glob("t_*.png"))) as image:
        said = json.loads(image.text["modular_lora_attestation"])
    assert said["status"] == "guarded, merged base"
    assert said["base_had_merged_loras"]


def test_a_lora_behind_a_merge_is_still_seen(run_graph, loras):
    graph = behind((SAFETY, -1.0))
    graph["merge"] = node("ModelMergeSimple", model1=["ckpt", 0], model2=["ckpt", 0], ratio=0.5)
    graph["before0"]["inputs"]["model"] = ["merge", 0]
    with refuses("lora.both-roles"):
        run_graph(graph)
    graph["before0"]["inputs"] |= {"lora_name": TASK, "strength_model": 0.5}
    results = run_graph(graph)
    assert "\nguarded, merged base: " in results["sample"][1]
    assert "task pending LoRA 1" in results["guard"][2]


def test_injections_of_a_bypass_loader_are_refused_with_accept_merged_too(comfy, loaded, loras):
    from comfy.model_patcher import PatcherInjection

    model = loaded[0].clone()
    model.set_injections("bypass_lora", [PatcherInjection(lambda p: None, lambda p: None)])
    with refuses("model.patched", "bypass LoRA"):
        guard(comfy, model, loras.folder / SAFETY)


def guard(comfy, model, path, clip=None, *, strength: float = 1.0):
    g = comfy.host_guard
    lora = g.SafetyLora(comfy.host_files.read_lora(path), strength)
    return comfy.host.guard(model, clip, (lora,), (), True, g.GuardLimits())


# Forms and families, in process


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_a_stock_loader_leaves_is_what_the_merge_is(form, comfy, loaded, loras, tmp_path):
    generator = torch.Generator().manual_seed(3)
    layers = [(name, spec) for name, spec in loras.unet.items() if len(spec.weight_shape) == 2][:8]
    tensors = {}
    for name, spec in layers:
        W0 = loaded[0].model.get_submodule(spec.path).weight
        tensors |= linear(name, spec, form, generator, W0)
    save_file(tensors, tmp_path / "form.safetensors")
    family = SimpleNamespace(latent=(4, 8, 8), context=(77, 768), cfg=2.0)
    model = stock(loaded[0], tmp_path / "form.safetensors", 0.7)
    handle, _ = guard(comfy, model, loras.folder / SAFETY)
    ours = evaluate(comfy.host.unwrap(handle), family, {})
    record = comfy.host.unwrap(handle).guard_state.record
    assert [lora.pending for lora in record.loras] == [False, True]
    assert not record.base_had_merged_loras
    file = comfy.host_files.read_lora(tmp_path / "form.safetensors")
    g = comfy.host_guard
    safety = g.SafetyLora(comfy.host_files.read_lora(loras.folder / SAFETY), 1.0)
    asked = comfy.host.guard(loaded[0], None, (safety,), (g.TaskLora(file, 0.7, 0.7),), False, g.GuardLimits())[0]
    assert torch.equal(ours, evaluate(comfy.host.unwrap(asked), family, {}))  # as Load Task LoRA would have it
    merged = evaluate(stock(model, loras.folder / SAFETY, 1.0), family, {})
    base = evaluate(loaded[0], family, {})
    near = 2e-2 if form in ("oft", "dora", "dora_columns") else 1e-3  # those are of W0 in the merge as well
    assert (ours - merged).abs().max() < near * (merged - base).abs().max()


FUSED = [family for family in IMAGE if family.config in ("Flux", "SD3", "AuraFlow", "Chroma")]


@pytest.mark.parametrize("family", FUSED, ids=lambda family: family.name)
def test_slices_of_fused_weights_and_rearranged_rows_are_taken_out(family, comfy, tmp_path):
    model = make(family)
    info = comfy.anatomy.model_info(model)
    for prefix in family.names:
        layers = named(info, prefix, sliced=True)
        if not layers:
            continue
        save_lora(tmp_path / "task.safetensors", layers, 2, 1, size=0.2)
        save_lora(tmp_path / "safety.safetensors", layers, 1, 2, size=0.2)
        patched = stock(model, tmp_path / "task.safetensors", 0.6)
        handle, _ = guard(comfy, patched, tmp_path / "safety.safetensors")
        ours = comfy.host.unwrap(handle)
        assert not ours.patches
        assert sum(lora.pending for lora in ours.guard_state.record.loras) == 1
        got, base = evaluate(ours, family, family.cond), evaluate(model, family, family.cond)
        merged = evaluate(stock(patched, tmp_path / "safety.safetensors", 1.0), family, family.cond)
        assert (got - merged).abs().max() < 1e-3 * (merged - base).abs().max()
        with refuses("lora.both-roles"):
            guard(comfy, stock(model, tmp_path / "safety.safetensors", -1.0), tmp_path / "safety.safetensors")


class Other:
    """What no adapter class of ComfyUI's knows."""


def kept() -> dict[str, tuple]:
    """Entries of ModelPatcher.patches that cannot be taken out, by what is said of them."""
    from comfy.weight_adapter import GLoRAAdapter

    some = torch.zeros(4, 4)
    return {
        "a model merge": (1.0, ("diff", (some,)), 0.5, None, None),
        "glora": (1.0, GLoRAAdapter(set(), (some, some, some, some, None, None)), 1.0, None, None),
        "model_as_lora": (1.0, ("model_as_lora", (some,)), 1.0, None, None),
        "rearranges": (1.0, ("diff", (some,)), 1.0, None, lambda a: -a),
        "widens": (1.0, ("diff", (some, {"pad_weight": True})), 1.0, None, None),
        "of the kind": (1.0, ("fooocus", (some, some)), 1.0, None, None),
        "dimension 2": (1.0, ("diff", (some,)), 1.0, (2, 0, 1), None),
        "chain of changes": (0.0, ("set", (some,)), 1.0, None, None),
        "Other": (1.0, Other(), 1.0, None, None),
    }


@pytest.mark.parametrize("said", ["a model merge", "glora", "model_as_lora", "rearranges", "widens", "of the kind"])
def test_what_cannot_be_taken_out_is_named_and_stays_merged(said, comfy, loaded, loras):
    check_kept(said, comfy, loaded, loras)


@pytest.mark.parametrize("said", ["dimension 2", "chain of changes", "Other"])
def test_what_other_packs_write_into_patches_is_named_and_stays_merged(said, comfy, loaded, loras):
    check_kept(said, comfy, loaded, loras)


def check_kept(said: str, comfy, loaded, loras) -> None:
    model = stock(loaded[0], loras.folder / TASK, 0.5)
    key = next(iter(model.patches))
    model.patches[key] = [*model.patches[key], kept()[said]]
    g = comfy.host_guard
    safety = (g.SafetyLora(comfy.host_files.read_lora(loras.folder / SAFETY), 1.0),)
    with refuses("model.merged", said):
        comfy.host.guard(model, None, safety, (), False, g.GuardLimits())
    handle, _ = comfy.host.guard(model, None, safety, (), True, g.GuardLimits())
    patcher = comfy.host.unwrap(handle)
    assert set(patcher.patches) == {key}
    assert len(patcher.patches[key]) == 2  # with what was added before it
    assert patcher.guard_state.record.base_had_merged_loras
    assert "1 weights before the guard" in handle.report


@pytest.mark.parametrize("accept_merged", [False, True])
@pytest.mark.parametrize("place", ["weight", "module"])
def test_a_lora_that_swaps_modules_is_refused_by_name(place: str, accept_merged: bool, comfy, loaded, loras):
    """A stand-in for what ComfyUI 0.38 has: patches of the kind "config", which no version at hand applies."""
    model = stock(loaded[0], loras.folder / TASK, 0.5)
    key = next(iter(model.patches))
    named = key if place == "weight" else key.removesuffix(".weight")
    model.patches[named] = [*model.patches.get(named, []), (1.0, ("config", ({"in_features": 4},)), 1.0, None, None)]
    g = comfy.host_guard
    safety = (g.SafetyLora(comfy.host_files.read_lora(loras.folder / SAFETY), 1.0),)
    with refuses("model.swaps-modules", "'config'", named):
        comfy.host.guard(model, None, safety, (), accept_merged, g.GuardLimits())


def test_a_lora_that_swaps_modules_is_not_taken_by_a_guarded_model(comfy, loaded, loras):
    handle, _ = guard(comfy, loaded[0], loras.folder / SAFETY)
    patcher = comfy.host.unwrap(handle)
    with refuses("model.refused", "add_patches"):
        patcher.add_patches({"diffusion_model.input_blocks.0.0": ("config", ({},))}, 1.0)
    patcher.patches["diffusion_model.input_blocks.0.0"] = [(1.0, ("config", ({},)), 1.0, None, None)]
    with refuses("model.patched"):
        patcher.guard_begin()


def test_a_change_of_what_takes_no_branch_stays_merged(comfy, loaded, loras):
    clip = loaded[1].clone()
    name = next(key for key in clip.cond_stage_model.state_dict() if key.endswith("position_embedding.weight"))
    clip.add_patches({name: ("diff", (torch.zeros_like(clip.cond_stage_model.state_dict()[name]),))}, 1.0)
    handle, out = guard(comfy, loaded[0], loras.folder / SAFETY, clip)
    assert set(out.patcher.patches) == {name}
    assert comfy.host.unwrap(handle).guard_state.record.base_had_merged_loras


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, comfy, loaded, loras):
    model = loaded[0].clone()
    key, spec = next((k, s) for k, s in comfy.anatomy.model_info(model).specs.items() if not s.problem)
    model.add_patches({key: ("diff", (torch.full(spec.weight_shape, value),))}, 1.0)
    with refuses("file.not-finite"):
        guard(comfy, model, loras.folder / SAFETY)
    model = loaded[0].clone()
    model.add_patches({key: ("diff", (torch.ones(spec.weight_shape),))}, value)
    with refuses("lora.strength"):
        guard(comfy, model, loras.folder / SAFETY)


def test_a_loader_that_gives_each_block_its_own_strength_is_what_the_merge_is(comfy, loaded, loras):
    """As block-weight loaders do: one file, one call of add_patches for every weight."""
    from comfy.lora import load_lora, model_lora_keys_unet
    from comfy.utils import load_torch_file

    model = loaded[0].clone()
    names = model_lora_keys_unet(model.model, {})
    patches = load_lora(load_torch_file(str(loras.folder / TASK)), names)
    for i, (key, value) in enumerate(patches.items()):
        model.add_patches({key: value}, (0.2, 0.9)[i % 2])
    handle, _ = guard(comfy, model, loras.folder / SAFETY)
    record = comfy.host.unwrap(handle).guard_state.record
    assert sorted(lora.strength_model for lora in record.loras if lora.pending) == [0.2, 0.9]
    family = SimpleNamespace(latent=(4, 8, 8), context=(77, 768), cfg=2.0)
    ours = evaluate(comfy.host.unwrap(handle), family, {})
    merged, base = evaluate(stock(model, loras.folder / SAFETY, 1.0), family, {}), evaluate(loaded[0], family, {})
    assert (ours - merged).abs().max() < 1e-4 * (merged - base).abs().max()


def test_one_file_of_every_part_is_one_task_lora(comfy, loaded, loras, tmp_path):
    """Adapters, differences of biases and of norms: what one file gave is counted once."""
    generator = torch.Generator().manual_seed(0)
    name, spec = next((n, s) for n, s in loras.unet.items() if len(s.weight_shape) == 2 and s.bias)
    tensors = load_file(loras.folder / TASK) | {f"{name}.diff_b": random(generator, spec.outputs)}
    save_file(tensors, tmp_path / "biased.safetensors")
    handle, _ = guard(comfy, stock(loaded[0], tmp_path / "biased.safetensors", 0.4), loras.folder / SAFETY)
    assert sum(lora.pending for lora in comfy.host.unwrap(handle).guard_state.record.loras) == 1


@pytest.mark.parametrize(
    ("rest", "rule"),
    [
        ('[tasks]\ndeny = ["{}"]\n', "tasks.deny"),
        ('[tasks]\nallow = ["{}"]\n', "tasks.allow"),
        ("contamination_is_error = true\n", "guard.contamination_is_error"),
    ],
)
def test_a_policy_that_asks_for_the_file_of_a_task_lora_takes_no_pending_one(rest, rule, operator, sha256):
    graph = behind((TASK, 0.8), kind="LoraLoaderModelOnly")
    graph["on"] = node("PrimitiveBoolean", value=True)
    graph["guard"]["inputs"]["accept_merged"] = ["on", 0]
    named = '[nodes]\npatching = ["LoraLoaderModelOnly"]\n'
    operator.write(required(sha256(SAFETY)) + rest.format(sha256(OTHER)) + named)
    stopped(operator, graph, f"refused.{rule}")
    operator.write(required(sha256(SAFETY)) + named)
    assert "\nguarded: " in operator.run(graph)["sample"][1]
    graph["before0"]["inputs"] |= {"lora_name": SAFETY, "strength_model": -1.0}
    stopped(operator, graph, "lora.both-roles")


@pytest.mark.parametrize("what", MERGED)
def test_under_a_policy_a_merge_is_not_guarded_though_the_graph_accepts_it(what, operator, sha256):
    graph = MERGED[what](behind(("task_te.safetensors", 0.8), clip=True))
    graph["on"] = node("PrimitiveBoolean", value=True)
    graph["guard"]["inputs"] |= {"model": ["ckpt", 0], "clip": ["ckpt", 1], what: ["merge", 0]}
    graph["guard"]["inputs"]["accept_merged"] = ["on", 0]
    operator.write(required(sha256(SAFETY)) + '[nodes]\npatching = ["LoraLoader", "ModelMergeSimple"]\n')
    stopped(operator, graph, "refused.guard.required")
