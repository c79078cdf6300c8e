"""What ComfyUI does to a model and to sampling keeps the guard: guarded = merged, and every branch counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.condition_toys import (
    LATENT,
    assert_kept,
    make_flux,
    make_trio,
    node,
    noise_image,
    patch,
    prompts,
    random_cond,
    sample,
    toy_unet,
)
from support.families import make
from support.families_image import IMAGE
from support.families_video import VIDEOS


@pytest.fixture(scope="module")
def trio(comfy, tmp_path_factory):
    return make_trio(comfy, toy_unet(), tmp_path_factory.mktemp("conditions"))


PATCHES = {
    "FreeU": patch("FreeU", "nodes_freelunch", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "FreeU_V2": patch("FreeU_V2", "nodes_freelunch", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "HyperTile": patch("HyperTile", "nodes_hypertile", tile_size=32, swap_size=4, max_depth=1, scale_depth=False),
    "ToMe": patch("TomePatchModel", "nodes_tomesd", ratio=0.3),
    "PAG": patch("PerturbedAttentionGuidance", "nodes_pag", scale=3.0),
    "SAG": patch("SelfAttentionGuidance", "nodes_sag", scale=0.5, blur_sigma=2.0),
    "RescaleCFG": patch("RescaleCFG", "nodes_model_advanced", multiplier=0.7),
    "ModelSamplingDiscrete": patch("ModelSamplingDiscrete", "nodes_model_advanced", sampling="v_prediction", zsnr=True),
    "CFGZeroStar": patch("CFGZeroStar", "nodes_cfg"),
    "CFGNorm": patch("CFGNorm", "nodes_cfg", strength=1.0),
    "APG": patch("APG", "nodes_apg", eta=0.5, norm_threshold=1.0, momentum=0.3),
    "TCFG": patch("TCFG", "nodes_tcfg"),
    "Mahiro": patch("Mahiro", "nodes_mahiro"),
    "FreSca": patch("FreSca", "nodes_fresca", scale_low=0.8, scale_high=1.5, freq_cutoff=3),
    "EpsilonScaling": patch("EpsilonScaling", "nodes_eps", scaling_factor=1.1),
    "TemporalScoreRescaling": patch("TemporalScoreRescaling", "nodes_eps", tsr_k=0.5, tsr_sigma=10.0),
    "Deep Shrink": patch(
        "PatchModelAddDownscale",
        "nodes_model_downscale",
        block_number=1,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    "VideoLinearCFG": patch("VideoLinearCFGGuidance", "nodes_video_model", min_cfg=1.0),
    "VideoTriangleCFG": patch("VideoTriangleCFGGuidance", "nodes_video_model", min_cfg=1.0),
}


@pytest.mark.parametrize("name", PATCHES)
def test_model_patches_keep_the_guard_before_it_and_after_it(name, comfy, trio):
    assert_kept(comfy, trio, sample, change=PATCHES[name])


def test_tome_draws_at_random_so_two_merged_runs_differ_as_well(trio):
    """Why both sides of a comparison need one state of the global generator, which the KSampler sets by its seed."""
    from comfy import sample as comfy_sample

    latent, model = torch.zeros(LATENT), PATCHES["ToMe"](trio.merged)
    settings = {"noise": comfy_sample.prepare_noise(latent, 3), "latent_image": latent, "disable_pbar": True}
    settings |= {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    one, two = (
        comfy_sample.sample(model, positive=random_cond(1), negative=random_cond(2), **settings) for _ in range(2)
    )
    assert (one - two).abs().max() > 0.01 * one.abs().max()


def attention_patches(model):
    """What IP-Adapter, style and reference packs do: attention replaced and patched in every block, blocks patched."""
    from comfy.ldm.modules.attention import optimized_attention

    generator = torch.Generator().manual_seed(7)
    tokens = {width: torch.randn(1, 4, width, generator=generator) for width in (32, 64)}

    def replaced(q, k, v, extra_options):
        own = optimized_attention(q, k, v, extra_options["n_heads"])
        added = tokens[q.shape[-1]].expand(q.shape[0], -1, -1)
        return own + 0.5 * optimized_attention(q, added, added, extra_options["n_heads"])

    model = model.clone()
    for block in ("input", "middle", "output"):
        for number in range(6):
            model.set_model_attn2_replace(replaced, block, number)
    model.set_model_attn1_patch(lambda q, k, v, options: (q, k * 1.1, v))
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k, v * 0.9))
    model.set_model_attn1_output_patch(lambda out, options: out * 1.05)
    model.set_model_attn2_output_patch(lambda out, options: out * 0.95)
    model.set_model_input_block_patch(lambda h, options: h * 1.02)
    model.set_model_output_block_patch(lambda h, skipped, options: (h, skipped * 0.97))
    return model


def test_attention_and_block_patches_keep_the_guard(comfy, trio):
    assert_kept(comfy, trio, sample, change=attention_patches)


def test_hypernetworks_keep_the_guard(comfy, trio, tmp_path, monkeypatch):
    """Networks on keys and values of the attention, by the width of what they attend to."""
    generator = torch.Generator().manual_seed(8)

    def layer(width: int) -> dict:
        weight = torch.randn(width, width, generator=generator) / width**0.5
        return {"linear.0.weight": weight, "linear.0.bias": torch.zeros(width)}

    torch.save({width: [layer(width), layer(width)] for width in (32, 64)}, tmp_path / "net.pt")
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "hypernetworks", ([str(tmp_path)], {".pt"}))
    change = patch("HypernetworkLoader", "nodes_hypernetwork", hypernetwork_name="net.pt", strength=0.7)
    assert_kept(comfy, trio, sample, change=change)


def block_patches(model):
    """What packs do to transformers' blocks: one replaced by a wrapper of it, inputs and outputs changed."""

    def wrapped(args, extra):
        out = extra["original_block"](args)
        return out | {"img": out["img"] * 1.1}

    model = model.clone()
    model.set_model_patch_replace(wrapped, "dit", "double_block", 0)
    model.set_model_double_block_patch(lambda args: {"img": args["img"] * 0.9, "txt": args["txt"]})
    model.set_model_post_input_patch(lambda args: args | {"txt": args["txt"] * 1.2})
    return model


def test_block_patches_of_transformers_keep_the_guard(comfy, tmp_path):
    trio, run = make_flux(comfy, tmp_path)
    assert_kept(comfy, trio, run, run, block_patches)


SAMPLERS = (
    "heun",
    "dpm_2_ancestral",
    "dpmpp_2m_sde",
    "euler_cfg_pp",
    "ddim",
    "uni_pc",
    "lcm",
    "er_sde",
    "res_multistep",
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_the_guard(name, comfy, trio):
    assert_kept(comfy, trio, lambda model: sample(model, sampler_name=name, scheduler="karras", steps=3), sample)


def guided(model, guider: str, module: str = "nodes_custom_sampler", **inputs) -> torch.Tensor:
    """Two runs of SamplerCustomAdvanced over split sigmas; the second goes on from the first's latent."""
    custom = lambda kind, **settings: node(kind, "nodes_custom_sampler", **settings)  # noqa: E731
    (sigmas,) = custom("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    parts = custom("SplitSigmas", sigmas=sigmas, step=1)
    (by,) = node(guider, module, model=model, **inputs)
    (sampler,) = custom("KSamplerSelect", sampler_name="euler")
    latent = {"samples": torch.zeros(LATENT)}
    for noise, part in zip((custom("RandomNoise", noise_seed=3), custom("DisableNoise")), parts, strict=True):
        settings = {"noise": noise[0], "guider": by, "sampler": sampler, "sigmas": part}
        latent = custom("SamplerCustomAdvanced", **settings, latent_image=latent)[0]
    return latent["samples"]


def test_guiders_over_split_sigmas_keep_the_guard(comfy, trio):
    both = {"positive": prompts()[0], "negative": prompts()[1]}
    dual = {"cond1": prompts()[0], "cond2": random_cond(11), "negative": prompts()[1], "style": "regular"}
    assert_kept(comfy, trio, lambda m: guided(m, "CFGGuider", **both, cfg=4.0), lambda m: sample(m, cfg=2.0))
    assert_kept(comfy, trio, lambda m: guided(m, "DualCFGGuider", **dual, cfg_conds=3.0, cfg_cond2_negative=5.0))
    perp = {**both, "empty_conditioning": random_cond(13), "cfg": 4.0, "neg_scale": 0.8}
    assert_kept(comfy, trio, lambda m: guided(m, "PerpNegGuider", "nodes_perpneg", **perp))


def test_perp_neg_keeps_the_guard(comfy, trio):
    """The older node, which evaluates the model once more from inside the CFG function."""
    change = patch("PerpNeg", "nodes_perpneg", empty_conditioning=random_cond(13), neg_scale=0.8)
    assert assert_kept(comfy, trio, sample, change=change) == 4


WINDOWS = patch(
    "ContextWindowsManualNode",
    "nodes_context_windows",
    context_length=2,
    context_overlap=1,
    context_schedule="standard_uniform",
    context_stride=1,
    closed_loop=False,
    freenoise=False,  # 0.33.0
    fuse_method="pyramid",
    dim=2,
)


def test_context_windows_over_video_frames_keep_the_guard(comfy, tmp_path):
    family = next(f for f in VIDEOS if f.config == "WAN21_T2V")
    trio = make_trio(comfy, make(family), tmp_path)
    frames = {"samples": torch.zeros(1, 16, 4, 8, 8)}
    conds = random_cond(1, *family.context), random_cond(2, *family.context)
    run = lambda model: sample(model, *conds, latent=frames)  # noqa: E731
    assert assert_kept(comfy, trio, run, run, WINDOWS) > 4


def test_video_models_from_an_image_keep_the_guard(comfy, loaded, tmp_path):
    """SVD's conditioning node, its frames as a batch and its rising CFG."""
    family = next(f for f in IMAGE if f.config == "SVD_img2vid")
    trio = make_trio(comfy, make(family), tmp_path)
    seen = SimpleNamespace(image_embeds=torch.randn(1, 1024, generator=torch.Generator().manual_seed(4)))
    vision = SimpleNamespace(encode_image=lambda image: seen)
    shape = {"width": 64, "height": 64, "video_frames": 3, "motion_bucket_id": 127, "fps": 6}
    positive, negative, frames = node(
        "SVD_img2vid_Conditioning",
        "nodes_video_model",
        clip_vision=vision,
        init_image=noise_image(64),
        vae=loaded[2],
        augmentation_level=0.0,
        **shape,
    )
    run = lambda model: sample(model, positive, negative, frames)  # noqa: E731
    assert_kept(comfy, trio, run, run, PATCHES["VideoLinearCFG"], status="guarded, outside start")
