"""A model of video at toy size as nodes load one: Wan 2.1's classes, and its VAE, with random weights."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from support import drop_in
from support.families import make, named
from support.families_video import VIDEOS
from support.graphs import base_graph, node, sampler, save_lora

FRAMES, SIDE = 9, 64
SAFETY, TASK = "video_safety.safetensors", "video_task.safetensors"
EXTRAS = ("video", "hunyuan")  # of comfy_extras, where the nodes of video lie


class VideoLoader:
    """Wan 2.1, text to video, with the demo world's text encoder, as wide as which its text is."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "run", "test"
    loaded: tuple | None = None

    def run(self):
        if self.loaded is None:
            from nodes import CheckpointLoaderSimple

            clip = CheckpointLoaderSimple().load_checkpoint("world.safetensors")[1]
            wan = next(family for family in VIDEOS if family.config == "WAN21_T2V")
            type(self).loaded = make(replace(wan, unet={**wan.unet, "text_dim": 768})), clip, _vae()
        return self.loaded


def _vae():
    """ComfyUI's VAE around Wan's at a twelfth of its width, which it tells from the weights."""
    from comfy.ldm.wan.vae import WanVAE
    from comfy.sd import VAE

    return VAE(sd=_drawn(WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])))


def ltx_vae():
    """ComfyUI's VAE around LTX Video's with a seventh of its layers; the file's metadata say how it is built."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    from comfy.sd import VAE

    said = {"dims": 3, "latent_channels": 128, "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform"}
    said["blocks"] = [["compress_all", 1], ["compress_all", 1], ["compress_all", 1], ["res_x", 1]]
    small = VideoVAE(config=said)
    for name, values in small.per_channel_statistics.named_buffers():
        values.fill_(float(name == "std-of-means"))
    return VAE(sd=_drawn(small), metadata={"config": json.dumps({"vae": said})})


def _drawn(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights that keep the size of what goes through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(torch.ones_like(drawn) if "gamma" in name else drawn / max(1, weight[0].numel()) ** 0.5)
    return network.state_dict()


def write_loras(comfy) -> None:
    """A safety and a task LoRA on every layer, in ComfyUI's folder."""
    layers = named(comfy.anatomy.model_info(VideoLoader().run()[0]), "lora_unet_", sliced=False)
    for seed, name in enumerate((SAFETY, TASK)):
        save_lora(comfy.loras / name, layers, 4, seed, size=0.3)


def film(prefix: str = "film") -> dict:
    """An ordinary graph of video: loader, a LoRA, prompts, KSampler, VAE Decode, Create Video, and Save Video.

    ``prefix``: of the file's name; one that was not used before makes the node run again.
    """
    graph = base_graph() | {"ckpt": node("VideoLoader")}
    graph["latent"] = node("EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=FRAMES, batch_size=1)
    graph["lora"] = node("LoraLoaderModelOnly", model=["ckpt", 0], lora_name=TASK, strength_model=0.7)
    graph["sample"] = sampler(["lora", 0])
    graph["decode"] = node("VAEDecode", samples=["sample", 0], vae=["ckpt", 2])
    graph["film"] = node("CreateVideo", images=["decode", 0], fps=6.0)
    graph["save"] = node("SaveVideo", video=["film", 0], filename_prefix=prefix, format="auto", codec="auto")
    return graph


def guarded(graph: dict) -> dict:
    """One node more, behind the loader."""
    return drop_in.guarded(graph, safety=SAFETY)


def merged(graph: dict) -> dict:
    """The safety LoRA merged by ComfyUI's own loader in that place."""
    return drop_in.merged(graph, safety=SAFETY)
