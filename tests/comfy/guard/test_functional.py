"""Functional strength in the real ComfyUI: what cancels a safety LoRA past the weights of its layers is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modular_lora_guard.modular_lora.guard import concept
from modular_lora_guard.tools.benchmarks import cancelling
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA
from support.errors import refuses
from support.graphs import base_graph, bits, guarded_graph, sampler

PROMPTS = ("twemoji, racing car", "noto, tractor")
CKPT = "demo_functional.safetensors"
HEADS = 8  # of the demo world's attention


@pytest.fixture(scope="module")
def functional(comfy):
    module = importlib.import_module("modular_lora_guard.comfy_host.functional")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SIDE", 8)  # what the demo world draws, at half the time
        yield module


@pytest.fixture
def rows(functional, monkeypatch):
    """Counts the rows of the network that are evaluated; nothing is known at the start."""
    functional._known.clear()
    comfy_warm = importlib.import_module("modular_lora_guard.comfy_host.guard_cache")
    comfy_warm.guards.clear()
    counted = []
    predict = functional._Evaluator._predict

    def count(self, *args):
        made = predict(self, *args)
        counted.append(made.shape[0] * made.shape[1])
        return made

    monkeypatch.setattr(functional._Evaluator, "_predict", count)
    return counted


@pytest.fixture(scope="module")
def demo(comfy):
    """The demo world itself: that of the other tests has another text encoder, with which its LoRAs mean nothing."""
    path = comfy.base / "models" / "checkpoints" / CKPT
    shutil.copyfile(Path(os.environ["MODULAR_LORA_WORLD"]) / "demo_world_sd15.safetensors", path)
    yield comfy.nodes.CheckpointLoaderSimple().load_checkpoint(CKPT)
    path.unlink()


@pytest.fixture(scope="module")
def world(comfy, demo, loras) -> SimpleNamespace:
    """The demo world's safety LoRA with concept prompts, its to_v and to_q alone, its task LoRA, W0 by kohya name."""
    whole = concept.write_copy(ASSETS / SAFETY_LORA, loras.folder / "vehicles.safetensors", PROMPTS)
    shutil.copyfile(ASSETS / TASK_LORA, loras.folder / "gloss.safetensors")
    factors = cancelling.factors(whole.path)
    for ending in ("to_v", "to_q"):
        some = cancelling.only(factors, f"_{ending}")
        some = {name: (down, 3 * up) for name, (down, up) in some.items()}  # by itself each does little
        cancelling.save(loras.folder / f"{ending}.safetensors", some, {concept.PROMPTS_KEY: json.dumps(PROMPTS)})
    state = demo[0].model.state_dict()
    info = comfy.anatomy.model_info(demo[0])
    names = {n: k for n, k in info.key_map.items() if n.startswith("lora_unet_") and isinstance(k, str) and k in state}
    keys = {name: key for name, key in names.items() if state[key].dim() > 1}
    weights = {name: state[key].flatten(1) for name, key in keys.items()}
    modules = {name: demo[0].model.get_submodule(info.specs[keys[name]].path) for name in factors}
    model, clip, _ = demo
    return SimpleNamespace(
        factors=factors, weights=weights, modules=modules, sha256=whole.sha256, model=model, clip=clip
    )


def guard_graph(safety: str, task: str | None = None, strength: float = 1.0, clip: bool = True) -> dict:
    graph = guarded_graph(safety, task, clip=clip)
    graph["ckpt"]["inputs"]["ckpt_name"] = CKPT
    if task:
        graph["task"]["inputs"]["strength_model"] = strength
    return graph


def attack(kind: str, world, folder) -> tuple[str, str]:
    """(safety LoRA, task LoRA) of an attack, as file names."""
    if kind == "inputs":
        with cancelling.moments(world.modules) as moments:
            cancelling.drawn(world.model, world.clip, PROMPTS)
        made, safety = cancelling.against_inputs(world.factors, moments), "vehicles.safetensors"
    elif kind == "behind values":
        made, safety = cancelling.behind_values(world.factors, world.weights, HEADS), "to_v.safetensors"
    else:
        made, safety = cancelling.before_queries(world.factors, world.weights, HEADS), "to_q.safetensors"
    cancelling.save(folder / f"{kind}.safetensors", made)
    return safety, f"{kind}.safetensors"


@pytest.mark.parametrize("kind", ["inputs", "behind values", "before queries"])
def test_what_cancels_the_safety_lora_past_its_weights_is_refused(kind, world, loras, run_graph, rows):
    safety, task = attack(kind, world, loras.folder)
    graph = guard_graph(safety, task, clip=False)  # the net strength of the files sees nothing
    graph = {name: one for name, one in graph.items() if name not in ("sample", "decode", "save")}
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["guard", 2]}}
    without = run_graph(graph)
    net = next(line for line in without["guard"][2].splitlines() if "net strength" in line)
    assert float(net.partition("net strength ")[2].partition(" ")[0]) == pytest.approx(1.0, abs=0.01)
    assert "not measured: no CLIP is connected" in without["guard"][2]
    with refuses("guard.functional-strength") as error:
        run_graph(guard_graph(safety, task))
    assert error.value.node_type == "ModularLoraGuardModel"
    assert safety in str(error.value)


def test_a_benign_task_lora_passes_and_the_figure_is_in_the_record(world, demo, run_graph, rows):
    model = demo[0]
    before = bits(model.model)
    graph = guard_graph("vehicles.safetensors", "gloss.safetensors")
    graph["asmodel"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    results = run_graph(graph)
    report, record = results["guard"][2], results["sample"][1]
    figure = float(report.partition("functional strength of vehicles.safetensors: ")[2].split()[0])
    assert 0.6 < figure < 1.0
    assert f"functional strength of vehicles.safetensors: {figure:.3f}" in record
    assert "guarded: " in record
    assert sum(rows) == 4 * len(PROMPTS) * 2
    assert f"took {sum(rows)} small predictions" in report
    assert [k for k, v in bits(model.model).items() if not torch.equal(v, before[k])] == []
    assert not any("forward" in m.__dict__ for m in demo[1].cond_stage_model.modules())


def guarded(comfy, demo, loras, safety, tasks=(), clip=True):
    g = comfy.host_guard
    load = lambda name: comfy.host_files.read_lora(loras.folder / name)  # noqa: E731
    return comfy.host.guard(
        demo[0],
        demo[1] if clip else None,
        tuple(g.SafetyLora(load(name), 1.0) for name in safety),
        tuple(g.TaskLora(load(name), s, s) for name, s in tasks),
        False,
        g.GuardLimits(),
    )[0]


def record_of(comfy, handle):
    return comfy.host.unwrap(handle).guard_state.record


def test_it_is_measured_once_and_a_swap_measures_what_is_new(world, comfy, demo, loras, rows, functional):
    warm = importlib.import_module("modular_lora_guard.comfy_host.guard_cache")
    random = torch.random.get_rng_state()
    first = guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    assert len(rows) == 4  # base, safety, task, all
    assert torch.equal(torch.random.get_rng_state(), random)
    guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    warm.guards.clear()  # built anew, measured no more
    second = guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    assert len(rows) == 4
    assert record_of(comfy, first).functional_strength == record_of(comfy, second).functional_strength
    assert record_of(comfy, first).functional_strength.keys() == {world.sha256}
    guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 0.5)])
    assert len(rows) == 6
    guarded(comfy, demo, loras, ["vehicles.safetensors"])
    assert len(rows) == 6  # base and safety are known


def test_the_figure_is_that_of_explicit_merges(world, comfy, demo, loras, rows, functional):
    """Independently: ComfyUI's own merges, one row at a time, by CFGGuider's own function for a step."""
    import comfy.samplers as samplers
    from comfy.model_management import load_models_gpu
    from comfy.sampler_helpers import convert_cond
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    handle = guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    (ours,) = record_of(comfy, handle).functional_strength.values()
    model, clip, _ = demo

    def predictions(*names):
        patcher = model
        for name in names:
            patcher = load_lora_for_models(patcher, None, load_torch_file(str(loras.folder / name)), 1.0, 0.0)[0]
        load_models_gpu([patcher])
        patcher.pre_run()
        noise, found = functional._noise(patcher), []
        for prompt in PROMPTS:
            conds = {"positive": convert_cond(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))}
            conds = samplers.process_conds(patcher.model, noise[:1], conds, patcher.load_device)["positive"]
            rows = []
            for level, one in zip(functional.LEVELS, noise, strict=True):
                sigma = torch.tensor([float(patcher.model.model_sampling.percent_to_sigma(level))])
                x = one[None] * sigma
                denoised = samplers.calc_cond_batch(patcher.model, [conds], x, sigma, {"transformer_options": {}})[0]
                rows.append((x - denoised) / sigma)  # the demo world predicts the noise
            found.append(torch.cat(rows).double())
        patcher.cleanup()
        return found

    with torch.inference_mode():
        arms = (), ("vehicles.safetensors",), ("gloss.safetensors",), ("vehicles.safetensors", "gloss.safetensors")
        base, alone, task, both = (predictions(*arm) for arm in arms)
    each = [
        float(((a - t) * (s - b)).sum() / ((s - b) ** 2).sum())
        for b, s, t, a in zip(base, alone, task, both, strict=True)
    ]
    assert ours == pytest.approx(min(each), abs=2e-3)


def test_of_two_safety_loras_each_is_measured_beside_the_other(world, comfy, demo, loras, rows):
    """A task LoRA that cancels, brought in as a safety LoRA."""
    safety, task = attack("behind values", world, loras.folder)
    with refuses("guard.functional-strength"):
        guarded(comfy, demo, loras, [safety, task])


def test_without_prompts_nothing_is_evaluated_and_it_is_said(loras, run_graph, rows):
    results = run_graph(guarded_graph("safety.safetensors", clip=True))
    assert rows == []
    for text in (results["guard"][2], results["sample"][1]):
        assert "functional strength of safety.safetensors: not measured: its file has no concept prompts" in text


def test_the_base_draws_as_stock_after_it(world, comfy, loras, run_graph, rows):
    graph = base_graph()
    graph["ckpt"]["inputs"]["ckpt_name"] = CKPT
    graph["draw"] = sampler(["ckpt", 0], seed=7)
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["draw", 0]}}
    results = run_graph(graph)
    before = results["draw"][0]["samples"]
    guarded(comfy, results["ckpt"], loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    assert rows
    graph["draw"]["inputs"]["cfg"] = 2.5  # not from the cache
    run_graph(graph)
    graph["draw"]["inputs"]["cfg"] = 2.0
    assert torch.equal(run_graph(graph)["draw"][0]["samples"], before)


def test_what_nodes_put_on_the_model_cannot_choose_what_is_measured(world, comfy, demo, loras, rows, functional):
    handle = guarded(comfy, demo, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    expected = record_of(comfy, handle).functional_strength
    functional._known.clear()
    importlib.import_module("modular_lora_guard.comfy_host.guard_cache").guards.clear()
    model = demo[0].clone()
    model.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    model.add_object_patch("model_sampling", None)
    patched = (model, demo[1])
    handle = guarded(comfy, patched, loras, ["vehicles.safetensors"], [("gloss.safetensors", 1.0)])
    assert record_of(comfy, handle).functional_strength == expected


def test_a_base_that_cannot_be_evaluated_is_not_measured_and_says_so(world, comfy, demo, loras, rows, functional):
    def fail(*args, **kwargs):
        raise RuntimeError("this model needs an image")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional.comfy.samplers, "process_conds", fail)
        record = record_of(comfy, guarded(comfy, demo, loras, ["vehicles.safetensors"]))
    assert record.functional_strength == {}
    assert "this model needs an image" in record.functional_not_measured[world.sha256]
    importlib.import_module("modular_lora_guard.comfy_host.guard_cache").guards.clear()


def test_a_policy_can_ask_for_it(world, comfy, demo, loras, operator, run_graph, rows):
    line = f'{{sha256 = "{world.sha256}", min_net_strength = 0.9, min_functional_strength = 0.5}}'
    operator.write(f"[guard]\nrequired = [{line}]\n")
    graph = guard_graph("vehicles.safetensors", "gloss.safetensors")
    del graph["save"], graph["decode"]
    graph["show"] = {"class_type": "ModularLoraDecode", "inputs": {"samples": ["sample", 0], "vae": ["ckpt", 2]}}
    graph["save"] = {
        "class_type": "ModularLoraSaveImage",
        "inputs": {"images": ["show", 0], "filename_prefix": "f", "unattested": "refuse"},
    }
    assert "functional strength" in run_graph(graph)["sample"][1]
    graph["guard"]["inputs"].pop("clip")
    graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = ["ckpt", 1]
    with refuses("refused.guard.required", "functional strength"):
        run_graph(graph)


def test_the_node_writes_a_copy_that_guard_model_measures(world, comfy, loras, run_graph, rows):
    shutil.copyfile(ASSETS / SAFETY_LORA, loras.folder / "plain.safetensors")
    graph = guard_graph("plain.safetensors")
    graph["write"] = {
        "class_type": "ModularLoraConceptPrompts",
        "inputs": {"safety_lora": ["safety", 0], "prompts": "\n".join(PROMPTS), "output_name": "written"},
    }
    graph["guard"]["inputs"]["safety_lora"] = ["write", 0]
    results = run_graph(graph)
    assert "functional strength of written.safetensors: 1.000" in results["guard"][2]
    said = "A copy with 2 concept prompts was written.\nsaved as written.safetensors in safety_loras"
    assert comfy.server.texts["write"] == said
    made = comfy.base / "models" / "safety_loras" / "written.safetensors"
    assert concept.read(comfy.host_files.read_lora(made)) == PROMPTS
    graph["write"]["inputs"]["prompts"] = "another"
    with refuses("concept.name-taken", "written.safetensors"):
        run_graph(graph)
