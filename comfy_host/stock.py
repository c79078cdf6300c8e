"""ComfyUI's own samplers, guider and decode, called as its nodes call them."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.samplers
import torch

from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.attestation import Attestation
from . import bound_vae, introspection

MAX_SEED = 0xFFFFFFFFFFFFFFFF  # of the stock samplers


def sampler_names() -> list[str]:
    """What the stock samplers' drop-down offers."""
    return comfy.samplers.KSampler.SAMPLERS


def scheduler_names() -> list[str]:
    """What the stock samplers' drop-down of schedulers offers."""
    return comfy.samplers.KSampler.SCHEDULERS


def cfg_guider(patcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    """The stock guider of classifier-free guidance on a model."""
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def decode(
    vae, latents: torch.Tensor, tiles: Mapping[str, int] | None = None
) -> tuple[torch.Tensor, list[Attestation | str]]:
    """Images (b h w c) of latents, attested where their latents are; of each its attestation, or why it has none.

    ``tiles``: what the stock VAE Decode (Tiled) is given, the stock VAE Decode otherwise (nodes);
    a video's frames come as a batch. Of latents of several kinds (sound beside video) the first is decoded.
    """
    import nodes  # ComfyUI's top-level module, complete only after start-up

    node = nodes.VAEDecode() if tiles is None else nodes.VAEDecodeTiled()
    (images,) = node.decode(vae=vae, samples={"samples": latents}, **(tiles or {}))
    return images, ledger.attest_images(images, latents, introspection.vae_sha256(vae), bound_vae.stranger(vae))
