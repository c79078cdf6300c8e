"""Guarded VAE Decode and its tiled form: the images that they make of attested latents are attested."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.stock import decode
from ..modular_lora.guard.activity import in_words
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.guard.summary import once, per_image, run_line
from ..modular_lora.provenance.attestation import Attestation
from ..modular_lora.provenance.ledger import Known, known_of
from ..modular_lora.provenance.verdict import verdict
from .search_words import found_by
from .sockets import rarely

OUTPUTS = (
    io.Image.Output(
        "image",
        display_name="image",
        tooltip="The decoded images. Edits by ComfyUI's own nodes are named in what an image says; other nodes make it "
        "unattested.",
    ),
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
        return _decoded(*decode(vae, samples["samples"]))


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
                *rarely(_tiles(), "temporal_size", "temporal_overlap"),
            ],
            outputs=list(OUTPUTS),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, **tiles: int) -> io.NodeOutput:
        return _decoded(*decode(vae, samples["samples"], tiles))


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


def _decoded(images: torch.Tensor, found: list[Attestation | str]) -> io.NodeOutput:
    """``found``: for each image its attestation, or why there is none."""
    lines = per_image([one[:1].upper() + one[1:] if isinstance(one, str) else run_line(one) for one in found])
    details = once([one if isinstance(one, str) else format_attestation(one) for one in found])
    activity = in_words([None if isinstance(one, str) else one for one in found])
    shown = answer(lines, activity, verdicts=list(map(_verdict, range(len(found)), found)))
    return io.NodeOutput(images, "\n".join(filter(None, (lines, details, activity))), ui=shown)


def _verdict(image: int, found: Attestation | str) -> dict:
    if isinstance(found, str):
        return verdict(image, Known(None, None), why=found)
    return verdict(image, known_of(found.image_sha256))
