"""Function and W0 in the real ComfyUI: guarded = merged within rounding, weights bitwise untouched, stock output."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from support.errors import refuses
from support.graphs import base_graph, bits, decode, guarded_graph, sampler


def weights(patcher) -> dict[str, torch.Tensor]:
    return bits(patcher.model)


def assert_same_bits(patcher, before: dict[str, torch.Tensor]) -> None:
    now = weights(patcher)
    assert now.keys() == before.keys()
    assert [k for k, v in before.items() if not torch.equal(v, now[k])] == []


def evaluate(patcher, seed: int = 3) -> torch.Tensor:
    """One evaluation of the diffusion model through ComfyUI's own sampling function (one euler step's denoised)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    cond = [[torch.randn(1, 77, 768, generator=generator), {}]]
    from comfy.sample import sample_custom
    from comfy.samplers import ksampler

    return sample_custom(
        patcher,
        noise,
        1.0,
        ksampler("euler"),
        torch.tensor([5.0, 0.0]),
        cond,
        cond,
        torch.zeros(2, 4, 8, 8),
        disable_pbar=True,
    )


def merged(model, clip, *loras):
    """The explicit merge, by ComfyUI's own LoRA loader on clones: (patcher, clip)."""
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    for path, strength in loras:
        model, clip = load_lora_for_models(model, clip, load_torch_file(str(path)), strength, strength)
    return model, clip


@pytest.fixture
def guarded(comfy, loaded, loras):
    """Guard the demo world with LoRA files given as (name, strength): (patcher, clip)."""

    def make(safety, *tasks, clip=None, **options):
        load = lambda name: comfy.host_files.read_lora(loras.folder / name)  # noqa: E731
        g = comfy.host_guard
        handle, guarded_clip = comfy.host.guard(
            loaded[0],
            clip,
            (g.SafetyLora(load(safety[0]), safety[1]),),
            tuple(g.TaskLora(load(name), s, s) for name, s in tasks),
            options.get("accept_merged", False),
            g.GuardLimits(),
        )
        return comfy.host.unwrap(handle), guarded_clip

    return make


def test_guarded_equals_the_explicit_merge_for_one_evaluation(comfy, loaded, loras, guarded):
    model, clip, _ = loaded
    tasks = (("task.safetensors", 0.7), ("other.safetensors", -0.4))
    patcher, _ = guarded(("safety.safetensors", 1.0), *tasks)
    ours = evaluate(patcher)
    files = [(loras.folder / n, s) for n, s in (("safety.safetensors", 1.0), *tasks)]
    reference = evaluate(merged(model, clip, *files)[0])
    base = evaluate(model)
    effect = (reference - base).abs().max()
    assert effect > 0.1
    assert (ours - reference).abs().max() < 1e-4 * effect


def test_every_layer_of_the_file_is_guarded(loras, guarded):
    patcher, _ = guarded(("safety.safetensors", 1.0))
    assert len(patcher.guard_state.part.branches.layers) == len(loras.unet)


def test_w0_is_bitwise_untouched_before_during_and_after(comfy, loaded, guarded):
    model = loaded[0]
    before, base = weights(model), evaluate(model)
    patcher, _ = guarded(("safety.safetensors", 1.0), ("task.safetensors", 0.7))
    seen = []
    patcher.add_callback("on_cleanup", lambda p: seen.append(assert_same_bits(p, before)))
    evaluate(patcher)
    assert seen
    assert_same_bits(model, before)
    assert torch.equal(evaluate(model), base)
    del patcher
    gc.collect()
    assert torch.equal(evaluate(model), base)
    assert not any("forward" in m.__dict__ for m in model.model.modules())


def test_an_error_in_the_middle_leaves_w0_and_the_stock_output_alone(comfy, loaded, guarded):
    model = loaded[0]
    before, base = weights(model), evaluate(model)
    patcher, _ = guarded(("safety.safetensors", 1.0))

    def fail(args):
        raise KeyboardInterrupt

    patcher.set_model_unet_function_wrapper(lambda apply, args: fail(args))
    with pytest.raises(KeyboardInterrupt):
        evaluate(patcher)
    assert patcher.guard_run.counts is None
    assert_same_bits(model, before)
    assert torch.equal(evaluate(model), base)


def test_a_run_whose_error_another_wrapper_hides_is_not_attested(comfy, guarded):
    patcher, _ = guarded(("safety.safetensors", 1.0))
    latent = torch.full((2, 4, 8, 8), 0.25)

    def hide(executor, *args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            executor(*args, **kwargs)
        return latent

    def fail_at_the_end(args):
        raise KeyboardInterrupt

    evaluate(patcher)
    assert comfy.host.attestation(patcher).status == "guarded"
    patcher.add_wrapper("outer_sample", hide)
    patcher.set_model_sampler_post_cfg_function(fail_at_the_end)
    assert evaluate(patcher) is latent  # every branch ran in every evaluation that there was
    assert comfy.host.attestation(patcher).status == "not sampled"
    assert all(comfy.ledger.latents.get(comfy.ledger.tensor_sha256(one)) is None for one in latent)


def test_a_run_within_an_error_handler_is_attested(comfy, guarded):
    patcher, _ = guarded(("safety.safetensors", 1.0))
    try:
        raise MemoryError
    except MemoryError:
        evaluate(patcher)
    assert comfy.host.attestation(patcher).status == "guarded"


def test_a_sampler_that_starts_a_run_by_itself_is_refused_after_one_that_was_checked(comfy, guarded):
    patcher, _ = guarded(("safety.safetensors", 1.0))
    evaluate(patcher)
    with refuses("run.unchecked"):
        patcher.pre_run()


def test_unloading_between_runs_changes_nothing(comfy, loaded, guarded):
    from comfy.model_management import unload_all_models

    patcher, _ = guarded(("safety.safetensors", 1.0))
    first = evaluate(patcher)
    unload_all_models()
    assert not any("forward" in m.__dict__ for m in loaded[0].model.modules())
    assert torch.equal(evaluate(patcher), first)


def test_two_guarded_models_of_one_base_keep_apart(comfy, loaded, guarded):
    one, _ = guarded(("safety.safetensors", 1.0))
    two, _ = guarded(("other.safetensors", 1.0), ("task.safetensors", 1.0))
    a, b, base = evaluate(one), evaluate(two), evaluate(loaded[0])
    for _ in range(2):
        assert torch.equal(evaluate(two), b)
        assert torch.equal(evaluate(one), a)
        assert torch.equal(evaluate(loaded[0]), base)
    assert not torch.equal(a, b)


def test_clones_and_their_garbage_collection_keep_the_guard(comfy, guarded):
    patcher, _ = guarded(("safety.safetensors", 1.0))
    expected = evaluate(patcher)
    clone = patcher.clone()
    for _ in range(3):
        unused = clone.clone()
        del unused
        gc.collect()
    assert torch.equal(evaluate(clone), expected)
    assert torch.equal(evaluate(patcher), expected)


def test_guarded_ksampler_is_bit_identical_to_the_stock_one_on_the_same_model(run_graph, loras):
    graph = guarded_graph()
    graph["asmodel"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    graph["stock"] = sampler(["asmodel", 0])
    graph["stockdecode"] = decode(["stock", 0])
    graph["stocksave"] = {
        "class_type": "ModularLoraSaveImage",
        "inputs": {"images": ["stockdecode", 0], "filename_prefix": "s", "unattested": "refuse"},
    }
    results = run_graph(graph)
    assert torch.equal(results["sample"][0]["samples"], results["stock"][0]["samples"])
    assert "guarded: " in results["stockdecode"][1]


def test_advanced_sampler_and_guider_agree_with_their_stock_twins(run_graph, loras):
    graph = guarded_graph()
    graph["asmodel"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    for name, kind, model in (("a", "ModularLoraKSamplerAdvanced", "guard"), ("b", "KSamplerAdvanced", "asmodel")):
        node = sampler([model, 0], kind)
        node["inputs"] |= {
            "add_noise": "enable",
            "noise_seed": node["inputs"].pop("seed"),
            "start_at_step": 1,
            "end_at_step": 10,
            "return_with_leftover_noise": "disable",
        }
        node["inputs"].pop("denoise")
        graph[name] = node
    graph["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}}
    graph["ksel"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    schedule = {"model": ["asmodel", 0], "scheduler": "normal", "steps": 2, "denoise": 1.0}
    graph["sigmas"] = {"class_type": "BasicScheduler", "inputs": schedule}
    for name, kind, model in (("c", "ModularLoraGuider", "guard"), ("d", "CFGGuider", "asmodel")):
        conds = {"positive": ["pos", 0], "negative": ["neg", 0], "cfg": 2.0}
        graph[f"g{name}"] = {"class_type": kind, "inputs": {"model": [model, 0], **conds}}
        custom = {"noise": ["noise", 0], "guider": [f"g{name}", 0], "sampler": ["ksel", 0], "sigmas": ["sigmas", 0]}
        graph[name] = {"class_type": "SamplerCustomAdvanced", "inputs": {**custom, "latent_image": ["latent", 0]}}
    for name in "abcd":
        graph[f"d{name}"] = decode([name, 0])
        graph[f"s{name}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"d{name}", 1]}}
    results = run_graph(graph)
    for one, two in ("ab", "cd"):
        assert torch.equal(results[one][0]["samples"], results[two][0]["samples"])
    assert all("guarded: " in results[f"d{name}"][1] for name in "abcd")


def test_text_encoder_half_is_guarded_and_equals_the_merge(comfy, loras, guarded):
    from comfy.sd import load_checkpoint_guess_config

    path = comfy.folder_paths.get_full_path("checkpoints", "world.safetensors")
    fp32 = {"dtype": torch.float32}  # an fp16 merge would round, and be the worse of the two
    model, clip, *_ = load_checkpoint_guess_config(path, output_vae=False, te_model_options=fp32)
    tasks = (("task_te.safetensors", 0.7),)
    _, guarded_clip = guarded(("safety_te.safetensors", 1.0), *tasks, clip=clip)
    tokens = clip.tokenize("a cat on a table")
    ours = guarded_clip.encode_from_tokens(tokens)
    files = [(loras.folder / n, s) for n, s in (("safety_te.safetensors", 1.0), *tasks)]
    reference = merged(model, clip, *files)[1].encode_from_tokens(tokens)
    plain = clip.encode_from_tokens(tokens)
    effect = (reference - plain).abs().max()
    assert effect > 0.1
    assert (ours - reference).abs().max() < 1e-4 * effect
    assert torch.equal(plain, clip.encode_from_tokens(tokens))


def test_unguarded_and_guarded_samplers_in_one_graph_each_get_their_model(comfy, loaded, run_graph, loras):
    graph = guarded_graph()
    graph["plain"] = sampler(["ckpt", 0])
    graph["plaindecode"] = decode(["plain", 0])
    graph["plainsave"] = {"class_type": "PreviewAny", "inputs": {"source": ["plaindecode", 1]}}
    results = run_graph(graph)
    alone = run_graph(
        {
            **base_graph(),
            "plain": sampler(["ckpt", 0]),
            "d": decode(["plain", 0], "VAEDecode"),
            "p": {"class_type": "PreviewAny", "inputs": {"source": ["d", 0]}},
        }
    )
    assert torch.equal(results["plain"][0]["samples"], alone["plain"][0]["samples"])
    assert not torch.equal(results["plain"][0]["samples"], results["sample"][0]["samples"])
    assert "\nunattested" in results["plaindecode"][1]


def test_guarded_models_that_die_together_leave_nothing_dead_behind(comfy, loaded, guarded):
    """ComfyUI collects garbage at every load while a loaded model's patcher is gone, and warns of a leak."""
    from comfy.model_management import current_loaded_models

    handle, _ = guarded(("safety.safetensors", 1.0))
    clone = handle.clone()
    evaluate(clone)
    cycle = [clone, handle]
    cycle.append(cycle)  # as an exception's traceback holds them, together with the frame that holds the exception
    del clone, handle, cycle
    gc.collect()
    assert not any(entry.is_dead() for entry in current_loaded_models)
    evaluate(loaded[0])
