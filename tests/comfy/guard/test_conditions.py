"""What ComfyUI does with conditioning, masks and control keeps the guard: guarded = merged, all branches counted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support.condition_toys import (
    SIZE,
    assert_kept,
    control_network,
    controlled,
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
from support.encoder_toys import randomise
from support.errors import refuses
from support.graphs import guarded_graph


@pytest.fixture(scope="module")
def trio(comfy, tmp_path_factory):
    return make_trio(comfy, toy_unet(), tmp_path_factory.mktemp("conditions"))


def steered(control):
    """``sample`` under ControlNetApplyAdvanced."""
    return lambda model: sample(model, *controlled(control, *prompts()))


def test_controlnet_keeps_the_guard(comfy, trio):
    from comfy.controlnet import ControlNet

    assert assert_kept(comfy, trio, steered(ControlNet(control_network(), load_device=torch.device("cpu")))) == 2


def test_control_lora_copies_w0_and_the_model_that_it_steers_keeps_its_branches(comfy, trio):
    """A ControlLora takes the base's weights without branches, so the reference is one that was copied from W0."""
    from comfy.controlnet import ControlLora, ControlNet

    own = trio.base.model.diffusion_model.state_dict()
    weights = {k: v for k, v in control_network().state_dict().items() if k not in own}
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    weights |= {f"{layer}.up": torch.randn(32, 4) * 0.1, f"{layer}.down": torch.randn(4, 32) * 0.1}
    weights["lora_controlnet"] = torch.tensor([])
    sample(trio.base)  # W0 is in place
    source = ControlLora(weights)
    source.pre_run(trio.base.model, lambda percent: 0.0)
    copied = ControlNet(copy.deepcopy(source.control_model), load_device=torch.device("cpu"))
    reference, base = steered(copied)(trio.merged), steered(copied)(trio.base)
    model = trio.guard(trio.base)
    ours = steered(ControlLora(weights))(model)
    assert (ours - reference).abs().max() < 1e-3 * (reference - base).abs().max()
    assert (reference - sample(trio.merged)).abs().max() > 1
    record = comfy.host.attestation(model)
    assert (record.status, record.firings) == ("guarded", record.layers * record.evaluations)


def test_a_difference_controlnet_is_not_loaded_from_a_guarded_model(comfy, trio):
    """DiffControlNetLoader adds the base's weights to the file's, and would ask the guarded model for them."""
    from comfy.controlnet import load_controlnet_state_dict

    file = {f"control_model.{k}": v.clone() for k, v in control_network().state_dict().items()}
    file["difference"] = torch.tensor([])
    with refuses("model.refused", "model_state_dict"):
        load_controlnet_state_dict(file, trio.guard(trio.base))


def test_t2i_adapter_keeps_the_guard(comfy, trio):
    from comfy.controlnet import T2IAdapter
    from comfy.t2i_adapter.adapter import Adapter

    class OneBlockALevel(Adapter):
        """Features for a U-Net with one residual block a level, not two."""

        def forward(self, x):
            features = super().forward(x)["input"][::-1]
            return {"input": [f for i, f in enumerate(features) if i % 3][::-1]}

    network = OneBlockALevel([32, 64], nums_rb=1, cin=192, ksize=1, sk=True, use_conv=False, xl=False)
    randomise(network)
    assert assert_kept(comfy, trio, steered(T2IAdapter(network, 3, 8, "nearest-exact"))) == 2


def test_controlnet_of_transformers_keeps_the_guard(comfy, tmp_path):
    """XLabs' for Flux, made by ComfyUI's own class."""
    from comfy import ops
    from comfy.controlnet import ControlNet
    from comfy.ldm.flux.controlnet import ControlNetFlux

    trio, run = make_flux(comfy, tmp_path)
    network = ControlNetFlux(operations=ops.manual_cast, **trio.base.model.model_config.unet_config).eval()
    randomise(network)
    extra = ["y", "guidance"]
    control = ControlNet(network, load_device=torch.device("cpu"), extra_conds=extra)
    assert_kept(comfy, trio, lambda model: run(model, lambda *conds: controlled(control, *conds, size=64)), run)


def test_gligen_keeps_the_guard(comfy, trio, loaded):
    from comfy import gligen, model_patcher
    from comfy.ldm.modules.attention import BasicTransformerBlock

    blocks = [m for m in trio.base.model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)]
    widths = [block.attn1.to_q.in_features for block in blocks]
    fusers = [gligen.GatedSelfAttentionDense(width, 768, 4, width // 4) for width in widths]
    network = gligen.Gligen(fusers, gligen.PositionNet(768, 768), 768).eval()
    randomise(network)
    for fuser in fusers:
        fuser.alpha_attn.data, fuser.alpha_dense.data = torch.tensor(1.0), torch.tensor(1.0)
    boxes = model_patcher.ModelPatcher(network, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    place = {"text": "a cat", "width": 64, "height": 64, "x": 32, "y": 0}

    def run(model):
        (positive,) = node(
            "GLIGENTextBoxApply", conditioning_to=prompts()[0], clip=loaded[1], gligen_textbox_model=boxes, **place
        )
        return sample(model, positive)

    assert_kept(comfy, trio, run)


def regional() -> list:
    """Areas, masks and ranges of steps, combined."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, : SIZE // 2] = 1.0
    one, two, three = (random_cond(seed) for seed in (1, 11, 12))
    (area,) = node("ConditioningSetArea", conditioning=one, width=64, height=128, x=64, y=0, strength=0.7)
    (masked,) = node("ConditioningSetMask", conditioning=two, mask=mask, set_cond_area="mask bounds", strength=1.2)
    (late,) = node("ConditioningSetTimestepRange", conditioning=three, start=0.5, end=1.0)
    (both,) = node("ConditioningCombine", conditioning_1=area, conditioning_2=masked)
    return node("ConditioningCombine", conditioning_1=both, conditioning_2=late)[0]


def test_regional_prompts_keep_the_guard(comfy, trio):
    assert assert_kept(comfy, trio, lambda model: sample(model, regional())) > 2  # areas are evaluations of their own


def test_cond_and_uncond_in_calls_of_their_own_keep_the_guard(comfy, trio, monkeypatch):
    """ComfyUI splits them where memory is short or the prompts' lengths do not fit together."""
    from comfy import model_management

    together = sample(trio.guard(trio.base))
    monkeypatch.setattr(model_management, "get_free_memory", lambda device=None, both=False: (1, 1) if both else 1)
    model = trio.guard(trio.base)
    apart = sample(model)
    assert comfy.host.attestation(model).evaluations == 4
    assert (apart - together).abs().max() < 1e-4 * together.abs().max()
    monkeypatch.undo()
    assert assert_kept(comfy, trio, lambda model: sample(model, random_cond(1, tokens=7 * 77))) == 4


@pytest.fixture
def start(loaded):
    """An image's latent and a mask over its left half, faded to the right."""
    mask = torch.linspace(1, 0, 8 * SIZE).expand(1, 8 * SIZE, 8 * SIZE).clone()
    return {"samples": loaded[2].encode(noise_image(8 * SIZE))}, mask


@pytest.mark.parametrize("change", [None, "DifferentialDiffusion"])
def test_masks_over_a_latent_keep_the_guard(change, comfy, trio, start):
    latent, mask = start
    change = change and patch("DifferentialDiffusion", "nodes_differential_diffusion")
    (masked,) = node("SetLatentNoiseMask", samples=latent, mask=mask)
    without = (lambda m: sample(m, latent=latent)) if change is None else (lambda m: sample(m, latent=masked))
    run = lambda model: sample(model, latent=masked)  # noqa: E731
    assert_kept(comfy, trio, run, without, change, status="guarded, outside start")


def test_vae_encode_for_inpaint_keeps_the_guard(comfy, trio, start, loaded):
    (latent,) = node("VAEEncodeForInpaint", pixels=noise_image(8 * SIZE), vae=loaded[2], mask=start[1], grow_mask_by=6)
    run = lambda model: sample(model, latent=latent)  # noqa: E731
    assert_kept(comfy, trio, run, status="guarded, outside start")


def test_inpaint_models_keep_the_guard(comfy, start, loaded, tmp_path):
    trio = make_trio(comfy, toy_unet(in_channels=9), tmp_path)
    conds = {"positive": prompts()[0], "negative": prompts()[1]}
    positive, negative, masked = node(
        "InpaintModelConditioning", **conds, vae=loaded[2], pixels=noise_image(8 * SIZE), mask=start[1], noise_mask=True
    )
    run = lambda model: sample(model, positive, negative, masked)  # noqa: E731
    assert_kept(comfy, trio, run, lambda m: sample(m, latent=masked), status="guarded, outside start")


def test_unclip_keeps_the_guard(comfy, tmp_path):
    changes = {"num_classes": "sequential", "adm_in_channels": 1536, "context_dim": 1024}
    trio = make_trio(comfy, toy_unet("SD21UnclipL", **changes), tmp_path)
    seen = SimpleNamespace(image_embeds=torch.randn(1, 768, generator=torch.Generator().manual_seed(4)))
    plain = random_cond(1, width=1024), random_cond(2, width=1024)
    (positive,) = node(
        "unCLIPConditioning", conditioning=plain[0], clip_vision_output=seen, strength=1.0, noise_augmentation=0.1
    )
    assert_kept(comfy, trio, lambda m: sample(m, positive, plain[1]), lambda m: sample(m, *plain))


def test_an_image_decoded_in_tiles_comes_from_a_guarded_run_and_is_not_attested(run_graph, loras):
    graph = guarded_graph()
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    graph["decode"] = {
        "class_type": "VAEDecodeTiled",
        "inputs": {"samples": ["sample", 0], "vae": ["ckpt", 2], **tiles},
    }
    graph["save"]["inputs"]["unattested"] = "save and say so"
    results = run_graph(graph)
    assert "\nguarded: " in results["sample"][1]
    assert results["decode"][0].shape == (1, 64, 64, 3)
    graph["save"]["inputs"]["unattested"] = "refuse"
    with refuses("save.unattested"):
        run_graph(graph)
