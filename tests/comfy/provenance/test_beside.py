"""What comes in beside a run's latents: a second model, a picture as noise, in a conditioning or by a mask, a VAE."""

from __future__ import annotations

import copy
import importlib
import itertools
import shutil

import pytest
import torch
from support.drop_in import guarded, ordinary
from support.errors import refuses
from support.graphs import decode, node

SIZE = 64
OUTSIDE_START = "guarded throughout, started from an outside picture"
CONDS = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
_seeds = itertools.count(40)


def two_models() -> type:
    """A node whose guider evaluates another model for the negative prompt, as 0.33.0's Dual Model CFG Guider does."""
    management, samplers = (importlib.import_module(f"comfy.{name}") for name in ("model_management", "samplers"))

    class TwoModels(samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  # as ComfyUI has it
            conds = [self.conds["positive"], self.conds["negative"]]
            cond, _ = samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            _, other = samplers.calc_cond_batch(self.other.model, conds, x, timestep, model_options)
            return other + self.cfg * (cond - other)

    class GiveTwoModels:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"one": ("MODEL",), "other": ("MODEL",), **CONDS}})
        RETURN_TYPES, FUNCTION, CATEGORY = ("GUIDER",), "run", "test"

        def run(self, one, other, positive, negative):
            guider = TwoModels(one)
            guider.other = other
            management.load_models_gpu([other])
            other.pre_run()
            guider.set_conds(positive, negative)
            guider.set_cfg(0.0)  # nothing of the guarded model is left in what comes out
            return (guider,)

    return GiveTwoModels


class LatentAsNoise:
    """As 0.33.0's VOIDWarpedNoiseSource."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("NOISE",), "run", "test"

    def run(self, latent):
        self.latent, self.seed = latent["samples"], 0
        return (copy.copy(self),)

    def generate_noise(self, latent):
        return self.latent


class BytesMask:
    """The same mask in whole numbers."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"mask": ("MASK",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MASK",), "run", "test"

    def run(self, mask):
        return ((mask > 0.5).to(torch.uint8),)


class PaintingVae:
    """Another pack's VAE: what it decodes to is its own affair."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "run", "test"

    def run(self, vae):
        class Painting(type(vae)):
            def decode(self, latent, *args, **kwargs):
                return 1 - super().decode(latent, *args, **kwargs)

        made = copy.copy(vae)
        made.__class__ = Painting
        return (made,)


@pytest.fixture(autouse=True)
def nodes(comfy, packs, loras, monkeypatch):
    for kind in (two_models(), LatentAsNoise, BytesMask, PaintingVae):
        monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, kind.__name__, kind)


def with_guider(guider: dict, noise: dict, latent: tuple = ("latent", 0)) -> dict:
    """The ordinary graph, sampled by SamplerCustomAdvanced."""
    parts = {"euler": node("KSamplerSelect", sampler_name="euler"), "guider": guider, "noise": noise}
    parts["sigmas"] = node("KarrasScheduler", steps=2, sigma_max=0.3, sigma_min=0.03, rho=7.0)
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0]}
    return ordinary() | parts | {"sample": node("SamplerCustomAdvanced", latent_image=list(latent), **links)}


def outside(graph: dict) -> dict:
    return graph | {"outside": node("Outside", seed=next(_seeds), size=SIZE)}


def status(comfy, run_graph, graph: dict) -> str:
    return comfy.ledger.known(run_graph(graph)["decode"][0][0]).status


CFG = node("CFGGuider", model=["ckpt", 0], positive=["pos", 0], negative=["neg", 0], cfg=1.0)
RANDOM = node("RandomNoise", noise_seed=5)


def test_a_second_model_within_a_guarded_run_stops_it(comfy, run_graph):
    checkpoints = comfy.base / "models" / "checkpoints"
    shutil.copy(checkpoints / "world.safetensors", checkpoints / "second.safetensors")
    links = {"one": ["ckpt", 0], "other": ["second", 0], "positive": ["pos", 0], "negative": ["neg", 0]}
    graph = guarded(with_guider(node("GiveTwoModels", **links), RANDOM))
    graph["second"] = node("CheckpointLoaderSimple", ckpt_name="second.safetensors")
    with refuses("run.another-model"):
        run_graph(graph)
    plain = ordinary()
    plain["sample"]["inputs"]["seed"] = next(_seeds)
    assert run_graph(plain)["decode"][0].isfinite().all()  # nothing is left in front of other models


def test_a_picture_in_the_noises_place_is_a_start_from_outside(comfy, run_graph):
    assert status(comfy, run_graph, guarded(with_guider(CFG, RANDOM))) == "guarded"
    graph = outside(with_guider(CFG, node("LatentAsNoise", latent=["encoded", 0])))
    graph["encoded"] = node("VAEEncode", pixels=["outside", 0], vae=["ckpt", 2])
    assert status(comfy, run_graph, guarded(graph)) == OUTSIDE_START


def test_a_picture_in_a_conditioning_is_a_start_from_outside(comfy, run_graph):
    """What is filled in or gone on from; the latent is empty."""
    links = {"positive": ["pos", 0], "negative": ["neg", 0], "vae": ["ckpt", 2], "noise_mask": False}
    graph = outside(ordinary())
    graph["mask"] = node("SolidMask", value=1.0, width=SIZE, height=SIZE)
    graph["shown"] = node("InpaintModelConditioning", pixels=["outside", 0], mask=["mask", 0], **links)
    graph["sample"]["inputs"] |= {"positive": ["shown", 0], "negative": ["shown", 1], "seed": next(_seeds)}
    assert status(comfy, run_graph, guarded(graph)) == OUTSIDE_START


def test_a_mask_in_whole_numbers_is_a_mask(comfy, run_graph):
    graph = outside(guarded(ordinary()))
    graph["drawn"] = node("ImageToMask", image=["outside", 0], channel="red")
    graph["bytes"] = node("BytesMask", mask=["drawn", 0])
    links = {"destination": ["decode", 0], "source": ["decode", 0], "mask": ["bytes", 0]}
    graph["both"] = node("ImageCompositeMasked", x=0, y=0, resize_source=False, **links)
    graph["show"] = node("PreviewImage", images=["both", 0])
    image = run_graph(graph)["both"][0]
    assert not comfy.ledger.known(image[0]).status.startswith("guarded;")


@pytest.mark.parametrize("kind", ["VAEDecode", "ModularLoraDecode"])
def test_what_another_packs_vae_decodes_to_has_passed_through_it(kind, comfy, run_graph):
    graph = ordinary()
    graph["sample"]["inputs"]["seed"] = next(_seeds)
    graph["painting"] = node("PaintingVae", vae=["ckpt", 2])
    graph = guarded(graph)
    vae = ["guard", 2]
    if kind == "ModularLoraDecode":
        graph["painting"]["inputs"]["vae"], vae = ["ckpt", 2], ["painting", 0]
    else:  # Guard behind it
        graph["painting"]["inputs"]["vae"], graph["guard"]["inputs"]["vae"] = ["ckpt", 2], ["painting", 0]
    graph["decode"] = decode(["sample", 0], kind)
    graph["decode"]["inputs"]["vae"] = vae
    assert status(comfy, run_graph, graph) == "passed through Painting: not vouched for"
