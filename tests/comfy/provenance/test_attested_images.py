"""The attestation is bound to the run and to the pixels."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from PIL import Image
from support.errors import refuses
from support.families import GENERIC, latents, make, named
from support.families_newer_video import NEWER
from support.graphs import decode, guarded_graph, node, sampler
from support.pairs import Pair


def saved(comfy, prefix: str) -> list[dict]:
    """Attestations in the PNG files of this prefix, in order."""
    files = sorted(comfy.output.glob(f"{prefix}_*.png"))
    return [json.loads(Image.open(f).text["modular_lora_attestation"]) for f in files]


def with_prefix(graph: dict, prefix: str, unattested: str = "save and say so") -> dict:
    graph["save"]["inputs"] |= {"filename_prefix": prefix, "unattested": unattested}
    return graph


def test_a_guarded_image_is_saved_with_what_made_it(comfy, run_graph, loras):
    run_graph(with_prefix(guarded_graph(), "whole"))
    (record,) = saved(comfy, "whole")
    assert record["status"] == "guarded"
    assert record["evaluations"] == 2
    assert record["firings"] == record["layers"] * 2
    assert [lora["role"] for lora in record["loras"]] == ["safety", "task"]
    assert all(len(record[k]) == 64 for k in ("base_sha256", "vae_sha256", "image_sha256", "pixels_sha256"))
    assert len(record["embeddings_sha256"]) == 2
    assert record["net_strength"][record["loras"][0]["sha256"]] == pytest.approx(1.0, abs=0.2)


TILES = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}


def test_an_image_decoded_in_tiles_is_attested_and_core_decodes_the_same_pixels(comfy, run_graph, loras):
    graph = with_prefix(guarded_graph(), "tiled", "refuse")
    graph["latent"]["inputs"] |= {"width": 128, "height": 128, "batch_size": 2}
    graph["decode"] = decode(["sample", 0], "ModularLoraDecodeTiled")
    graph["core"] = decode(["sample", 0], "VAEDecodeTiled")
    for tiled in ("decode", "core"):
        graph[tiled]["inputs"] |= TILES
    graph["whole"] = decode(["sample", 0])
    graph["show"] = node("PreviewImage", images=["core", 0])
    graph["show2"] = node("PreviewImage", images=["whole", 0])
    results = run_graph(graph)
    assert torch.equal(results["decode"][0], results["core"][0])
    assert not torch.equal(results["decode"][0], results["whole"][0])  # tiles have seams
    assert "\nguarded: " in results["decode"][1]
    records = saved(comfy, "tiled")
    assert [r["status"] for r in records] == ["guarded"] * 2
    assert len({r["image_sha256"] for r in records}) == 2


def test_an_edited_latent_decoded_in_tiles_is_unattested(run_graph, loras):
    graph = guarded_graph()
    graph["edit"] = node("LatentFlip", samples=["sample", 0], flip_method="x-axis: vertically")
    graph["decode"] = decode(["edit", 0], "ModularLoraDecodeTiled")
    graph["decode"]["inputs"] |= TILES
    graph["save"]["inputs"]["unattested"] = "save and say so"
    assert "\nunattested" in run_graph(graph)["decode"][1]


def vae_with(**parts):
    """ComfyUI's VAE with these parts alone, and a module."""
    kind = importlib.import_module("comfy.sd").VAE
    vae = kind.__new__(kind)
    vars(vae).update(first_stage_model=torch.nn.Linear(1, 1), **parts)
    return vae


def test_every_frame_of_a_video_decoded_in_tiles_is_attested(comfy, run_graph, loras):
    """With a stand-in for a video VAE, as core asks one."""
    asked = {}
    frames = torch.rand(1, 5, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    vae = vae_with(
        temporal_compression_decode=lambda: 4,
        spacial_compression_decode=lambda: 8,
        decode_tiled=lambda latent, **tiles: asked.update(tiles) or frames,
    )
    latent = run_graph(guarded_graph())["sample"][0]["samples"]
    image = importlib.import_module("modular_lora_guard.comfy_host.stock")
    made, reports = image.decode(vae, latent, TILES)
    assert asked == {"tile_x": 8, "tile_y": 8, "overlap": 2, "tile_t": 16, "overlap_t": 2}
    assert torch.equal(made, frames[0])
    assert len(reports) == 5  # each names its own pixels
    assert all(comfy.ledger.known(frame).guarded for frame in made)


def test_each_of_several_latents_that_are_sampled_as_one_is_attested(comfy, tmp_path):
    """Video and sound of LTX Video: they leave the sampler in one latent, and nodes take them apart."""
    from comfy import supported_models

    if not hasattr(supported_models, "LTXAV"):
        pytest.skip("this ComfyUI has no LTXAV, nor another model of several latents")
    family = next(f for f in NEWER if f.config == "LTXAV")
    model = make(family)
    guarded = Pair(comfy, model, tmp_path, named(comfy.anatomy.model_info(model), GENERIC, sliced=False)).guarded
    cond = [[torch.randn(1, *family.context, generator=torch.Generator().manual_seed(1)), {}]]
    _, start = latents(family, torch.Generator().manual_seed(2))
    settings = (1, 1, 1.0, "euler", "normal", cond, cond)
    made = comfy.host.common_ksampler(guarded, *settings, {"samples": start})["samples"]
    frames = torch.rand(1, 3, 8, 8, 3, generator=torch.Generator().manual_seed(3))
    vae = vae_with(decode=lambda latent: frames)
    image = importlib.import_module("modular_lora_guard.comfy_host.stock")
    digest = comfy.ledger.tensor_sha256
    for latent in (made, made.unbind()[0]):
        images, reports = image.decode(vae, latent)
        assert images.shape == (3, 8, 8, 3)
        assert [report.status for report in reports] == ["guarded"] * 3
    assert comfy.ledger.latents.get(digest(made.unbind()[1][0])).status == "guarded"
    comfy.host.common_ksampler(guarded, *settings, {"samples": made}, denoise=0.5)
    assert comfy.host.attestation(guarded).status == "guarded"
    edited = type(made)([made.unbind()[0] * 2, made.unbind()[1]])
    assert set(image.decode(vae, edited)[1]) == {comfy.ledger.EDITED}
    comfy.host.common_ksampler(guarded, *settings, {"samples": edited}, denoise=0.5)
    assert comfy.host.attestation(guarded).status == "guarded, outside start"


def test_an_edited_image_is_unattested_and_can_be_refused(comfy, run_graph, loras):
    graph = with_prefix(guarded_graph(), "edited")
    graph["edit"] = node("ImageInvert", image=["decode", 0])
    graph["save"]["inputs"]["images"] = ["edit", 0]
    run_graph(graph)
    (record,) = saved(comfy, "edited")
    assert record["status"] == "unattested"
    with refuses("save.unattested"):
        run_graph(with_prefix(graph, "refused", "refuse"))
    assert not saved(comfy, "refused")


def test_an_edited_latent_is_unattested(run_graph, loras):
    graph = guarded_graph()
    graph["edit"] = node("LatentFlip", samples=["sample", 0], flip_method="x-axis: vertically")
    graph["decode"] = decode(["edit", 0])
    graph["save"]["inputs"]["unattested"] = "save and say so"
    assert "\nunattested" in run_graph(graph)["decode"][1]


def test_an_image_of_the_unguarded_model_is_unattested_in_one_batch_with_a_guarded_one(comfy, run_graph, loras):
    graph = with_prefix(guarded_graph(), "mixed")
    graph["plain"] = sampler(["ckpt", 0])
    graph["plainpic"] = decode(["plain", 0])
    graph["both"] = node("ImageBatch", image1=["decode", 0], image2=["plainpic", 0])
    graph["save"]["inputs"]["images"] = ["both", 0]
    run_graph(graph)
    assert [r["status"] for r in saved(comfy, "mixed")] == ["guarded", "unattested"]


def test_every_image_of_a_batch_is_attested_and_a_single_one_of_it_too(comfy, run_graph, loras):
    graph = with_prefix(guarded_graph(), "batch")
    graph["latent"]["inputs"]["batch_size"] = 3
    graph["one"] = node("LatentFromBatch", samples=["sample", 0], batch_index=1, length=1)
    graph["onepic"] = decode(["one", 0])
    graph["show"] = node("PreviewAny", source=["onepic", 1])
    results = run_graph(graph)
    assert [r["status"] for r in saved(comfy, "batch")] == ["guarded"] * 3
    assert "\nguarded: " in results["onepic"][1]


def test_a_run_that_starts_from_an_outside_latent_says_so(run_graph, loras):
    graph = guarded_graph()
    graph["plain"] = sampler(["ckpt", 0])
    graph["sample"]["inputs"] |= {"latent_image": ["plain", 0], "denoise": 0.5}
    assert "\nguarded, outside start: " in run_graph(graph)["sample"][1]
    graph["first"] = sampler(["guard", 0], "ModularLoraKSampler", seed=9)
    graph["sample"]["inputs"]["latent_image"] = ["first", 0]
    assert "\nguarded: " in run_graph(graph)["sample"][1]
    graph["weaker"] = node("ModularLoraLoadSafety", lora_name="other.safetensors", strength=1.0)
    graph["weak"] = node("ModularLoraGuardModel", model=["ckpt", 0], safety_lora=["weaker", 0])
    graph["first"]["inputs"]["model"] = ["weak", 0]
    assert "\nguarded, outside start: " in run_graph(graph)["sample"][1]


def test_no_step_at_all_reads_not_sampled(run_graph, loras):
    graph = guarded_graph()
    graph["sample"]["inputs"]["denoise"] = 0.0
    graph["save"]["inputs"]["unattested"] = "save and say so"
    results = run_graph(graph)
    assert "\nnot sampled: " in results["sample"][1]
    assert "\nunattested" in results["decode"][1]


def test_the_base_hash_is_of_w0_whatever_is_merged_at_the_moment(comfy, loaded, run_graph, loras):
    graph = guarded_graph()
    graph["lora"] = node("LoraLoaderModelOnly", model=["ckpt", 0], lora_name="other.safetensors", strength_model=1.0)
    graph["merged"] = sampler(["lora", 0])
    graph["show"] = node("PreviewAny", source=["merged", 0])
    first = run_graph(graph)["guard"][2].splitlines()[0]
    comfy.anatomy._weights.clear()
    graph["sample"]["inputs"]["seed"] = graph["merged"]["inputs"]["seed"] = 7
    graph["guard"]["inputs"]["accept_merged"] = True  # a changed input, so that the guard is built again
    assert run_graph(graph)["guard"][2].splitlines()[0] == first


def test_live_previews_of_guarded_runs_are_off_where_the_prompt_holds_a_gate(previews, run_graph, loras, monkeypatch):
    import latent_preview

    seen = []
    decode_preview = latent_preview.Latent2RGBPreviewer.decode_latent_to_preview
    monkeypatch.setattr(
        latent_preview.Latent2RGBPreviewer,
        "decode_latent_to_preview",
        lambda self, x0: seen.append(x0) or decode_preview(self, x0),
    )
    graph = guarded_graph()
    graph["sample"]["inputs"]["seed"] = 77
    graph["asmodel"] = node("ModularLoraGuardedAsModel", guarded_model=["guard", 0])
    graph["stock"] = sampler(["asmodel", 0], seed=77)
    graph["show"] = node("PreviewAny", source=["stock", 0])
    graph["gate"] = node("ModularLoraGate", images=["decode", 0])  # in the graph, and no output asks for it
    run_graph(graph)
    assert not seen
    del graph["gate"]
    graph["sample"]["inputs"]["seed"] = graph["stock"]["inputs"]["seed"] = 79
    run_graph(graph)
    assert len(seen) == 4  # two steps of two samplers
    seen.clear()
    graph["plain"] = sampler(["ckpt", 0], seed=78)
    graph["show2"] = node("PreviewAny", source=["plain", 0])
    run_graph(graph)
    assert seen


def test_an_interrupted_run_is_not_attested_and_the_next_one_is(comfy, run_graph, loras):
    from comfy.model_management import InterruptProcessingException

    graph = guarded_graph()
    patcher = comfy.host.unwrap(run_graph(graph)["guard"][0])
    calls = []

    def stop(apply_model, args):
        calls.append(1)
        if len(calls) == 2:
            raise InterruptProcessingException
        return apply_model(args["input"], args["timestep"], **args["c"])

    patcher.set_model_unet_function_wrapper(stop)
    cond = [[torch.randn(1, 77, 768), {}]]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(InterruptProcessingException):
        comfy.host.common_ksampler(patcher, 1, 3, 1.0, "euler", "normal", cond, cond, latent)
    assert comfy.host.attestation(patcher).status == "not sampled"
    comfy.host.common_ksampler(patcher, 1, 3, 1.0, "euler", "normal", cond, cond, latent)
    assert comfy.host.attestation(patcher).status == "guarded"


def test_torch_compile_keeps_the_guard_and_the_counts(comfy, run_graph, loras):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = comfy.host.unwrap(run_graph(guarded_graph())["guard"][0])
    cond = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0)), {}]]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    settings = (1, 2, 1.0, "euler", "normal", cond, cond, latent)
    eager = comfy.host.common_ksampler(patcher, *settings)["samples"]
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    result = comfy.host.common_ksampler(compiled, *settings)["samples"]
    assert torch.allclose(eager, result, atol=1e-4)
    assert comfy.host.attestation(compiled).status == "guarded"
