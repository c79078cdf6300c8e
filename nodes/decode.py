"""Guarded VAE Decode and its tiled form: the images that they make of attested latents are attested."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy_api.latest import io

from ..comfy_host import introspection
from ..comfy_host.node_report import CATEGORY, show
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.provenance import ledger

OUTPUTS = (
    io.Image.Output("image", display_name="image", tooltip="The pictures; any edit makes them unattested."),
    io.String.Output("report", display_name="report", tooltip="Attestation of the pictures, or why there is none."),
)


class GuardedDecode(io.ComfyNode):
    """The stock VAE decode; each image of an attested latent is remembered by its hash."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraDecode",
            display_name="Guarded VAE Decode",
            category=f"{CATEGORY}/sample",
            description="VAE Decode that hands a guarded run's attestation on to the exact pixels it makes.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latent straight from a guarded run."),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into pictures."),
            ],
            outputs=list(OUTPUTS),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        return _decoded(cls, *decode(vae, samples["samples"]))


class GuardedDecodeTiled(io.ComfyNode):
    """The stock VAE Decode (Tiled), with its settings, attested as GuardedDecode is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraDecodeTiled",
            display_name="Guarded VAE Decode (Tiled)",
            category=f"{CATEGORY}/sample",
            description="VAE Decode (Tiled), for big pictures and video, that hands a guarded run's attestation on to "
            "the exact pixels it makes.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latent straight from a guarded run."),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into pictures."),
                *_tiles(),
            ],
            outputs=list(OUTPUTS),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, **tiles: int) -> io.NodeOutput:
        return _decoded(cls, *decode(vae, samples["samples"], tiles))


def _tiles() -> list:
    """The settings of VAE Decode (Tiled) (nodes.VAEDecodeTiled, 0.3.75 and 0.33.0), in pixels and frames."""
    return [
        io.Int.Input(name, default=default, min=least, max=4096, step=step, tooltip=tooltip)
        for name, default, least, step, tooltip in (
            ("tile_size", 512, 64, 32, "Width and height of a tile in pixels: smaller takes less memory."),
            ("overlap", 64, 0, 32, "How far tiles overlap, in pixels: more hides their seams."),
            ("temporal_size", 64, 8, 4, "Video VAEs only: frames that are decoded at a time."),
            ("temporal_overlap", 8, 4, 4, "Video VAEs only: frames by which these overlap."),
        )
    ]


def _decoded(node, pictures: torch.Tensor, reports: list[str]) -> io.NodeOutput:
    report = "\n".join(reports)
    show(node, report)
    return io.NodeOutput(pictures, report)


def decode(vae, latents: torch.Tensor, tiles: Mapping[str, int] | None = None) -> tuple[torch.Tensor, list[str]]:
    """Pictures (b h w c) of latents, attested where their latents are, and what is to be said of them, each once.

    ``tiles``: what the stock VAE Decode (Tiled) is given, the stock VAE Decode otherwise (nodes, 0.3.75 and 0.33.0);
    a video's frames come as a batch. Of latents of several kinds (sound beside video) the first is decoded.
    """
    import nodes  # ComfyUI's top-level module, complete only after start-up

    node = nodes.VAEDecode() if tiles is None else nodes.VAEDecodeTiled()
    (images,) = node.decode(vae=vae, samples={"samples": latents}, **(tiles or {}))
    found = ledger.attest_images(images, latents, introspection.vae_sha256(vae))
    reports = (one if isinstance(one, str) else format_attestation(one) for one in found)
    return images, list(dict.fromkeys(reports))
