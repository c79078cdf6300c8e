"""The ordinary graph as people vary it: other loaders, samplers, decoders and starts, with a LoRA in front of it.

Each function gives a graph without a guard, whose images come out of "decode". The video graph is in video_toys.py.
"""

from __future__ import annotations

from typing import NamedTuple

from support.drop_in import SAFETY, ordinary
from support.graphs import node, sampler

TASK, OTHER = "task.safetensors", "other.safetensors"
LOADED = (TASK, 0.7)


def two_loaders() -> dict:
    return ordinary(LOADED, (OTHER, -0.4))


def pack_loader() -> dict:
    """Two LoRAs on one node of another pack, as rgthree's loader has them."""
    graph = ordinary()
    both = {"model": ["ckpt", 0], "clip": ["ckpt", 1]}
    graph["power"] = node("PackPowerLoader", **both, loras=f"{TASK}: 0.7, {OTHER}: 0.5")
    graph["sample"]["inputs"]["model"] = ["power", 0]
    return graph


def hires_fix() -> dict:
    graph = ordinary(LOADED)
    scale = {"upscale_method": "nearest-exact", "width": 80, "height": 80, "crop": "disabled"}
    graph["larger"] = node("LatentUpscale", samples=["sample", 0], **scale)
    graph["second"] = sampler(["lora0", 0], latent_image=["larger", 0], denoise=0.5)
    graph["decode"]["inputs"]["samples"] = ["second", 0]
    return graph


def custom_sampler() -> dict:
    graph = ordinary(LOADED)
    graph["guider"] = node("CFGGuider", model=["lora0", 0], cfg=2.0, positive=["pos", 0], negative=["neg", 0])
    graph["noise"], graph["euler"] = node("RandomNoise", noise_seed=1), node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("BasicScheduler", model=["lora0", 0], scheduler="normal", steps=2, denoise=1.0)
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0]}
    graph["sample"] = node("SamplerCustomAdvanced", **links, latent_image=["latent", 0])
    return graph


def controlnet() -> dict:
    graph = ordinary(LOADED)
    graph["hint"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)
    graph["control"] = node("PackControlNet", model=["ckpt", 0], size=0.02)
    applied = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0}
    links = {"positive": ["pos", 0], "negative": ["neg", 0], "control_net": ["control", 0], "image": ["hint", 0]}
    graph["applied"] = node("ControlNetApplyAdvanced", **links, **applied)
    graph["sample"]["inputs"] |= {"positive": ["applied", 0], "negative": ["applied", 1]}
    return graph


def _outside() -> dict:
    """With the image of a file, in a sense: a colour."""
    graph = ordinary(LOADED)
    graph["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x884422)
    return graph


def img2img() -> dict:
    graph = _outside()
    graph["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["ckpt", 2])
    graph["sample"]["inputs"] |= {"latent_image": ["encoded", 0], "denoise": 0.8, "steps": 3}
    return graph


def inpaint() -> dict:
    graph = _outside()
    graph["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    links = {"pixels": ["picture", 0], "vae": ["ckpt", 2], "mask": ["mask", 0]}
    graph["encoded"] = node("VAEEncodeForInpaint", **links, grow_mask_by=6)
    graph["sample"]["inputs"] |= {"latent_image": ["encoded", 0]}
    return graph


def tiled_decode() -> dict:
    graph = ordinary(LOADED)
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    graph["decode"] = node("VAEDecodeTiled", samples=["sample", 0], vae=["ckpt", 2], **tiles)
    return graph


def batch() -> dict:
    graph = ordinary(LOADED)
    graph["latent"]["inputs"]["batch_size"] = 3
    return graph


class Outcome(NamedTuple):
    """What a variant's guarded images are attested to be.

    Attributes:
        status: Of each.
        images: How many there are.
        tasks: Name and strength of each task LoRA.
    """

    status: str = "guarded"
    images: int = 1
    tasks: tuple[tuple[str, float], ...] = (LOADED,)

    def check(self, runs: list) -> None:
        """AssertionError where the attestations of a variant's images are others."""
        assert [run.status for run in runs] == [self.status] * self.images
        for run in runs:
            tasks = [one for one in run.loras if one.role == "task"]
            assert [(one.name, one.strength_model) for one in tasks] == list(self.tasks)
            assert not any(one.pending for one in tasks)
            assert {one.name for one in run.safety} == {SAFETY}
            assert run.vae_sha256


VARIANTS = {
    two_loaders: Outcome(tasks=(LOADED, (OTHER, -0.4))),
    pack_loader: Outcome(tasks=(LOADED, (OTHER, 0.5))),
    hires_fix: Outcome(),
    custom_sampler: Outcome(),
    controlnet: Outcome(),
    img2img: Outcome("guarded, outside start"),
    inpaint: Outcome("guarded, outside start"),
    tiled_decode: Outcome(),
    batch: Outcome(images=3),
}
