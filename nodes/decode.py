"""Guarded VAE Decode and its tiled form: the images that they make of attested latents are attested."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..comfy_host.node_report import CATEGORY, show
from ..comfy_host.stock import decode
from .search_words import found_by

OUTPUTS = (
    io.Image.Output("image", display_name="image", tooltip="The decoded images. Any edit makes them unattested."),
    io.String.Output("report", display_name="report", tooltip="Attestation of the images, or why there is none."),
)


class GuardedDecode(io.ComfyNode):
    """The stock VAE decode; each image of an attested latent is remembered by its hash."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraDecode",
            **found_by("vae decode", "decode latent", "attestation"),
            display_name="Guarded VAE Decode",
            category=f"{CATEGORY}/sample",
            description="VAE Decode that binds a guarded run's attestation to the exact pixels that it decodes.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latent straight from a guarded run."),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into images."),
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
            **found_by("vae decode tiled", "video decode", "attestation"),
            display_name="Guarded VAE Decode (Tiled)",
            category=f"{CATEGORY}/sample",
            description="VAE Decode (Tiled), for large images and video, that binds a guarded run's attestation to the "
            "exact pixels that it decodes.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latent straight from a guarded run."),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into images."),
                *_tiles(),
            ],
            outputs=list(OUTPUTS),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, **tiles: int) -> io.NodeOutput:
        return _decoded(cls, *decode(vae, samples["samples"], tiles))


def _tiles() -> list:
    """The settings of VAE Decode (Tiled) (nodes.VAEDecodeTiled), in pixels and frames."""
    return [
        io.Int.Input(name, default=default, min=least, max=4096, step=step, tooltip=tooltip)
        for name, default, least, step, tooltip in (
            ("tile_size", 512, 64, 32, "Width and height of a tile in pixels. A smaller tile needs less memory."),
            ("overlap", 64, 0, 32, "How far tiles overlap, in pixels. More overlap hides the seams."),
            ("temporal_size", 64, 8, 4, "Video VAEs only: number of frames decoded at a time."),
            ("temporal_overlap", 8, 4, 4, "Video VAEs only: number of frames by which these overlap."),
        )
    ]


def _decoded(node, pictures: torch.Tensor, reports: list[str]) -> io.NodeOutput:
    report = "\n".join(reports)
    show(node, report)
    return io.NodeOutput(pictures, report)
