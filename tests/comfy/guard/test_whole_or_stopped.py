"""A safety LoRA applies whole or the run stops; a task LoRA is counted; nothing is silent."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import GraphError, guarded_graph, node


def edited(loras, name: str, edit, source: str = "safety.safetensors") -> str:
    tensors = load_file(loras.folder / source)
    edit(tensors)
    save_file(tensors, loras.folder / name, {"ss_base_model_version": "sd_v1"})
    return name


def rename_first(tensors: dict) -> None:
    first = next(iter(tensors)).split(".")[0]
    for key in [k for k in tensors if k.startswith(first + ".")]:
        tensors[key.replace(first, "lora_unet_no_such_layer")] = tensors.pop(key)


def wrong_shape(tensors: dict) -> None:
    key = next(k for k in tensors if k.endswith("attn1_to_q.lora_down.weight"))
    tensors[key] = torch.cat([tensors[key]] * 2, dim=1)


def zero_layer(tensors: dict) -> None:
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[key] = torch.zeros_like(tensors[key])


def not_finite(tensors: dict) -> None:
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[key][0, 0] = float("nan")


PROBLEMS = {
    "rename": (rename_first, "lora.not-whole", ("no_such_layer",)),
    "shape": (wrong_shape, "lora.not-whole", ("attn1_to_q",)),
    "zero": (zero_layer, "lora.zero-layer", ()),
    "nan": (not_finite, "file.not-finite", ("nan",)),
    "norm": (lambda t: t.update(norm_layer()), "lora.not-whole", ("input_blocks_1_0_in_layers_0",)),
}


def norm_layer() -> dict:
    name = "lora_unet_input_blocks_1_0_in_layers_0"
    return {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_safety_lora_that_does_not_apply_whole_stops_the_run(problem, run_graph, loras):
    edit, code, named = PROBLEMS[problem]
    name = edited(loras, f"bad_{problem}.safetensors", edit)
    with refuses(code, *named) as error:
        run_graph(guarded_graph(name))
    assert name in str(error.value)


def test_a_safety_lora_for_another_family_says_so(run_graph, loras):
    tensors = {
        "lora_unet_input_blocks_77_attn_to_q.lora_down.weight": torch.ones(2, 640),
        "lora_unet_input_blocks_77_attn_to_q.lora_up.weight": torch.ones(640, 2),
    }
    save_file(tensors, loras.folder / "sdxl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    with refuses("lora.not-whole", "0 of", "sdxl_base_v1-0"):
        run_graph(guarded_graph("sdxl.safetensors"))


def test_unmatched_keys_of_a_task_lora_are_counted_on_the_node(run_graph, comfy, loras):
    name = edited(loras, "task_odd.safetensors", rename_first, "task.safetensors")
    results = run_graph(guarded_graph(task=name))
    assert "1 keys match no layer (first lora_unet_no_such_layer)" in results["guard"][2]
    assert "1 keys match no layer" in comfy.server.texts["guard"]


def test_a_task_lora_that_matches_nothing_is_an_error(run_graph, loras):
    save_file(
        {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 8), "lora_unet_nowhere.lora_up.weight": torch.ones(8, 2)},
        loras.folder / "nowhere.safetensors",
    )
    with refuses("lora.applies-nowhere", "nowhere.safetensors", "0 of"):
        run_graph(guarded_graph(task="nowhere.safetensors"))


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_safety_strength_of_zero_or_below_is_refused_when_queued(strength, run_graph, loras):
    graph = guarded_graph()
    graph["safety"]["inputs"]["strength"] = strength
    with pytest.raises(GraphError, match=f"strength {strength:g}") as error:
        run_graph(graph)
    assert error.value.stage == "validation"


def test_a_missing_file_is_refused_when_queued(run_graph, loras):
    graph = guarded_graph()
    graph["safety"]["inputs"]["lora_name"] = "gone.safetensors"
    with pytest.raises(GraphError, match="safety_loras or loras") as error:
        run_graph(graph)
    assert error.value.stage == "validation"


def test_another_file_than_the_expected_one_is_refused(run_graph, loras):
    graph = guarded_graph()
    graph["safety"]["inputs"]["expected_sha256"] = "0" * 64
    with refuses("file.other-sha256"):
        run_graph(graph)


def test_the_safety_file_as_a_task_lora_is_refused(run_graph, loras):
    graph = guarded_graph(task="safety.safetensors")
    graph["task"]["inputs"]["strength_model"] = -1.0
    with refuses("lora.both-roles"):
        run_graph(graph)


def test_a_task_lora_that_cancels_the_safety_lora_is_refused(run_graph, loras):
    """The same weights in another file, so that no hash gives them away."""
    name = edited(loras, "undo.safetensors", lambda t: t.update({k: -v for k, v in t.items() if "lora_up" in k}))
    graph = guarded_graph(task=name)
    graph["task"]["inputs"]["strength_model"] = 0.4
    assert "net strength 0.600" in run_graph(graph)["guard"][2]
    graph["task"]["inputs"]["strength_model"] = 1.0
    with refuses("guard.net-strength"):
        run_graph(graph)


def test_a_second_safety_lora_that_cancels_the_first_is_refused(run_graph, loras):
    name = edited(loras, "undo2.safetensors", lambda t: t.update({k: -v for k, v in t.items() if "lora_up" in k}))
    graph = guarded_graph(task=None)
    graph["second"] = node("ModularLoraLoadSafety", lora_name=name, strength=1.0, safety_lora=["safety", 0])
    graph["guard"]["inputs"]["safety_lora"] = ["second", 0]
    with refuses("guard.net-strength"):
        run_graph(graph)


def test_a_safety_lora_with_a_text_half_needs_a_clip(run_graph, loras):
    with refuses("guard.no-clip"):
        run_graph(guarded_graph("safety_te.safetensors", None))


def test_the_clip_output_without_a_clip_input_says_so(run_graph, loras):
    graph = guarded_graph()
    graph["pos"]["inputs"]["clip"] = ["guard", 1]
    with pytest.raises(GraphError, match="Guard Model gives no CLIP, because none is connected"):
        run_graph(graph)


def test_a_task_lora_with_a_text_half_and_no_clip_is_a_counted_note(run_graph, loras):
    results = run_graph(guarded_graph(task="task_te.safetensors"))
    assert f"has {len(loras.text)} text-encoder layers that do not act" in results["guard"][2]


def test_a_lora_recorded_on_another_base_is_a_counted_note(comfy, run_graph, loras):
    own = comfy.anatomy.model_sha256(run_graph(guarded_graph())["ckpt"][0])
    for name, base in (("here.safetensors", own), ("elsewhere.safetensors", "0" * 64)):
        tensors = {
            k: v * 1.01 if "lora_up" in k else v for k, v in load_file(loras.folder / "other.safetensors").items()
        }
        save_file(tensors, loras.folder / name, {"modular_lora.base_sha256": base, "modular_lora.role": "safety"})
    assert "another base" not in run_graph(guarded_graph(task="here.safetensors"))["guard"][2]
    report = run_graph(guarded_graph(task="elsewhere.safetensors"))["guard"][2]
    assert "1 of 2 LoRAs were recorded on another base of this family (elsewhere.safetensors)" in report
    assert "says that it is a safety LoRA and acts as a task LoRA" in report


@pytest.mark.parametrize("half", ["lora_unet_", "lora_te_"])
def test_a_task_lora_of_which_one_half_fits_acts_by_the_other(run_graph, loras, half):
    """As FLUX LoRAs with a CLIP-L half on Chroma, which has none: ComfyUI says so of the keys and goes on."""

    def rename(tensors):
        for key in [k for k in tensors if k.startswith(half)]:
            tensors[key.replace(half, f"{half}other_")] = tensors.pop(key)

    name = edited(loras, "half.safetensors", rename, "task_te.safetensors")
    report = run_graph(guarded_graph(task=name, clip=True))["guard"][2]
    (line,) = (line for line in report.splitlines() if "half.safetensors: 0 layers" in line)
    assert "keys match no layer" in line
    assert "net strength" in report


def test_layers_of_another_shape_are_counted_in_a_task_lora(run_graph, loras):
    """As LoRAs of text to video on an image to video model, whose first layer takes more channels."""
    report = run_graph(guarded_graph(task=edited(loras, "wide.safetensors", wrong_shape, "task.safetensors")))["guard"][
        2
    ]
    assert "; 1 layers are left out (first lora_unet_" in report
    assert "use a LoRA made for this base" in report


def test_tensors_of_no_format_are_counted_in_a_task_lora_and_stop_a_safety_lora(run_graph, loras):
    def add(tensors):
        tensors["diffusion_model.blocks.0.diff_m"] = torch.ones(1, 6, 8)

    report = run_graph(guarded_graph(task=edited(loras, "more.safetensors", add, "task.safetensors")))["guard"][2]
    assert "more.safetensors: 1 tensors are left out, as ComfyUI's own loader leaves them out" in report
    with refuses("lora.unread-tensors", "1 ", "diffusion_model"):
        run_graph(guarded_graph(edited(loras, "more_safety.safetensors", add)))


def test_the_hash_of_w0_is_w0s_whatever_was_merged_and_hooked_over_it(comfy, run_graph, loras):
    """A hook's backup is of the weight that a LoRA was merged into before: W0 is what the merge put aside."""
    import comfy.hooks as hooks
    from comfy.model_management import load_models_gpu, unload_all_models

    model = run_graph(guarded_graph())["ckpt"][0]
    anatomy, module = comfy.anatomy, model.model
    own = anatomy.model_sha256(model)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    patched, group = model.clone(), hooks.create_hook_lora(load_file(loras.folder / "task.safetensors"), 1.0, 1.0)
    W0 = anatomy.original_weight(model, key)
    patched.add_patches({key: ("diff", (torch.ones_like(W0),))}, 1.0)
    try:
        load_models_gpu([patched])
        patched.register_all_hook_patches(group, hooks.create_target_dict(hooks.EnumWeightTarget.Model), {})
        patched.patch_hooks(group)
        assert key in patched.backup
        assert key in patched.hook_backup
        anatomy._weights.pop(module)
        assert anatomy.model_sha256(patched) == own
        assert torch.equal(anatomy.original_weight(patched, key), W0)
    finally:
        patched.unpatch_hooks()
        unload_all_models()
    assert torch.equal(anatomy.original_weight(model, key), W0)


def test_conditioning_of_the_unguarded_clip_is_refused_where_safety_has_a_text_half(run_graph, loras):
    graph = guarded_graph("safety_te.safetensors", None, clip=True)
    assert "text encoder: guarded" in run_graph(graph)["sample"][1]
    graph["pos"]["inputs"]["clip"] = ["ckpt", 1]
    with refuses("conditioning.not-guarded", "positive"):
        run_graph(graph)


@pytest.mark.parametrize(
    "kind",
    [
        "ConditioningCombine",
        "ConditioningConcat",
        "ConditioningAverage",
        "ConditioningZeroOut",
        "ConditioningSetArea",
        "ConditioningSetTimestepRange",
    ],
)
def test_core_conditioning_nodes_keep_the_guarded_clips_mark(kind, run_graph, loras):
    graph = guarded_graph("safety_te.safetensors", None, clip=True)
    graph["more"] = node("CLIPTextEncode", clip=["guard", 1], text="on a table")
    inputs = {
        "ConditioningCombine": {"conditioning_1": ["pos", 0], "conditioning_2": ["more", 0]},
        "ConditioningConcat": {"conditioning_to": ["pos", 0], "conditioning_from": ["more", 0]},
        "ConditioningAverage": {"conditioning_to": ["pos", 0], "conditioning_from": ["more", 0]}
        | {"conditioning_to_strength": 0.5},
        "ConditioningZeroOut": {"conditioning": ["pos", 0]},
        "ConditioningSetArea": {"conditioning": ["pos", 0], "width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0},
        "ConditioningSetTimestepRange": {"conditioning": ["pos", 0], "start": 0.0, "end": 1.0},
    }
    graph["made"] = node(kind, **inputs[kind])
    graph["sample"]["inputs"]["positive"] = ["made", 0]
    assert "guarded: " in run_graph(graph)["sample"][1]


def test_concat_and_average_with_unguarded_rows_are_refused(run_graph, loras):
    graph = guarded_graph("safety_te.safetensors", None, clip=True)
    graph["plain"] = node("CLIPTextEncode", clip=["ckpt", 1], text="on a table")
    graph["made"] = node("ConditioningConcat", conditioning_to=["pos", 0], conditioning_from=["plain", 0])
    graph["sample"]["inputs"]["positive"] = ["made", 0]
    with refuses("conditioning.not-guarded"):
        run_graph(graph)
    graph["made"] = node(
        "ConditioningAverage", conditioning_to=["pos", 0], conditioning_from=["plain", 0], conditioning_to_strength=0.5
    )
    with refuses("conditioning.not-guarded"):
        run_graph(graph)


def test_a_changed_file_is_read_again(run_graph, loras):
    name = edited(loras, "changing.safetensors", lambda t: None)
    first = run_graph(guarded_graph(name, None))["sample"][0]["samples"]
    edited(loras, name, lambda t: t.update({k: 2 * v for k, v in t.items() if "lora_up" in k}))
    assert not torch.equal(first, run_graph(guarded_graph(name, None))["sample"][0]["samples"])


def test_lora_stack_comes_in_and_goes_out_unchanged_and_without_the_safety_lora(comfy, run_graph, loras):
    load = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraLoadTask"]
    stack = [("other.safetensors", 0.5, 0.5), ("None", 1.0, 1.0)]
    tasks, out = load.execute("task.safetensors", 0.7, 0.6, lora_stack=stack).args
    assert stack == [("other.safetensors", 0.5, 0.5), ("None", 1.0, 1.0)]
    assert out == [("other.safetensors", 0.5, 0.5), ("task.safetensors", 0.7, 0.6)]
    _, chained = load.execute("other.safetensors", 1.0, 1.0, task_lora=tasks[1:]).args
    assert chained == [("task.safetensors", 0.7, 0.6), ("other.safetensors", 1.0, 1.0)]
    assert [t.lora.name for t in tasks] == ["other.safetensors", "task.safetensors"]


def test_loading_one_task_file_twice_is_refused(run_graph, loras):
    graph = guarded_graph()
    graph["guard"]["inputs"]["lora_stack"] = ["task", 1]
    with refuses("lora.twice"):
        run_graph(graph)


def test_block_weights_switch_blocks_off(run_graph, loras):
    graph = guarded_graph()
    graph["task"]["inputs"]["block_weights"] = "BASE:0, M00:0" + "".join(f", IN{i:02d}:0" for i in (1,))
    changed = run_graph(graph)["sample"][0]["samples"]
    graph["task"]["inputs"]["block_weights"] = "X77:0"
    with refuses("blocks.unknown", "X77"):
        run_graph(graph)
    assert not torch.equal(changed, run_graph(guarded_graph())["sample"][0]["samples"])


def test_interference_names_a_task_lora_trained_on_top_of_safety(run_graph, loras):
    """A task LoRA that contains a part of -ΔW_safe has a negative cosine on every layer: the paper's mark."""
    safety = load_file(loras.folder / "safety.safetensors")
    task = load_file(loras.folder / "other.safetensors")
    for key in [k for k in task if "lora_down" in k]:
        up, alpha = key.replace("lora_down", "lora_up"), key.replace("lora_down.weight", "alpha")
        task[key] = torch.cat([task[key], safety[key]])
        task[up] = torch.cat([task[up], -0.2 * safety[up]], dim=1)
        task[alpha] = torch.tensor(float(task[key].shape[0]))
    save_file(task, loras.folder / "on_top.safetensors")
    graph = guarded_graph(task="on_top.safetensors")
    graph["table"] = node(
        "ModularLoraInterference", model=["ckpt", 0], safety_lora=["safety", 0], task_lora=["task", 0]
    )
    graph["show"] = node("PreviewImage", images=["table", 1])
    results = run_graph(graph)
    table, image = results["table"]
    assert "2412.00357" in table
    assert "2412.00357" in results["guard"][2]
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    clean = run_graph({**guarded_graph(), "table": graph["table"], "show": graph["show"]})
    assert "2412.00357" not in clean["table"][0]


def test_peft_and_diffusers_names_apply_like_kohya_names(comfy, run_graph, loras):
    """The same weights under diffusers/PEFT names give the same latent, bit for bit."""
    tensors, renamed = load_file(loras.folder / "safety.safetensors"), {}
    info = comfy.anatomy.model_info(run_graph(guarded_graph())["ckpt"][0])
    dotted = {}
    for name, key in info.key_map.items():
        if name.startswith("unet.") and isinstance(key, str):
            dotted[key] = name.replace(".processor.", ".")
    for key, tensor in tensors.items():
        layer, suffix = key.split(".", 1)
        target = dotted.get(info.key_map[layer])
        if target is None:
            renamed[key] = tensor
        elif suffix != "alpha":
            renamed[f"{target}.{'lora_A' if 'down' in suffix else 'lora_B'}.weight"] = tensor
    save_file(renamed, loras.folder / "peft.safetensors")
    assert sum(k.endswith("lora_A.weight") for k in renamed) > 20
    ours = run_graph(guarded_graph("peft.safetensors", None))["sample"][0]["samples"]
    assert torch.equal(ours, run_graph(guarded_graph("safety.safetensors", None))["sample"][0]["samples"])


def test_conv_layers_with_kernel_and_stride_are_guarded(comfy, loras):
    assert any(spec.weight_shape[2:] == (3, 3) for spec in loras.unet.values())
    assert any(spec.conv and spec.conv[0] == (2, 2) for spec in loras.unet.values())
