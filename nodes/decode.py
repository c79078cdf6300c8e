"""Guarded VAE Decode, and what is known of a picture: attestation and gate's record are bound to pixels, by content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from comfy_api.latest import io

from ..comfy_host import introspection, patcher
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.provenance.attestation import Attestation, GateRecord, tensor_sha256
from ..modular_lora.util.cache import Cache
from .sockets import CATEGORY, show

EDITED = (
    "unattested: no guarded run made exactly this; it was edited on the way, sampled without the guard, or not sampled"
)
UNSAMPLED = "unattested: nothing was sampled (denoise 0, or no step to do), so the latent is what went into the sampler"

gated: Cache[str, GateRecord] = Cache(4096)  # content of one image of a batch -> what the last gate that saw it decided


@dataclass(frozen=True)
class Known:
    """What is known of exactly these pixels; None: no guarded run made them, no gate judged them."""

    run: Attestation | None
    gate: GateRecord | None

    @property
    def guarded(self) -> bool:
        """Whether a guarded run made this picture, apart from what a gate covered of it."""
        return self.run is not None and self.run.status.startswith("guarded")

    def record(self) -> dict:
        """Goes into files."""
        if self.run is None:
            return {"status": "unattested", "gate": asdict(self.gate) if self.gate else None}
        return json.loads(self.run.of(gate=self.gate).to_json())


def known(picture: torch.Tensor) -> Known:
    """Of one picture, h w c."""
    digest = tensor_sha256(picture)
    return Known(patcher.images.get(digest), gated.get(digest))


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
    """The settings of VAE Decode (Tiled) (nodes.VAEDecodeTiled, 0.3.75 and 0.33.0), in pixels and frames."""
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


def decode(vae, latents: torch.Tensor, tiles: Mapping[str, int] | None = None) -> tuple[torch.Tensor, list[str]]:
    """Pictures (b h w c) of latents, attested where their latents are, and what is to be said of them, each once.

    ``tiles``: what the stock VAE Decode (Tiled) is given, the stock VAE Decode otherwise (nodes, 0.3.75 and 0.33.0);
    a video's frames come as a batch. Of latents of several kinds (sound beside video) the first is decoded.
    """
    import nodes  # ComfyUI's top-level module, complete only after start-up

    node = nodes.VAEDecode() if tiles is None else nodes.VAEDecodeTiled()
    (pictures,) = node.decode(vae=vae, samples={"samples": latents}, **(tiles or {}))
    latents = latents.unbind()[0] if getattr(latents, "is_nested", False) else latents
    runs = [patcher.latents.get(tensor_sha256(latent)) for latent in latents]
    why = [UNSAMPLED if patcher.unsampled.get(tensor_sha256(latent)) else EDITED for latent in latents]
    return pictures, list(dict.fromkeys(_bind(pictures, runs, why, introspection.vae_sha256(vae))))


def _bind(pictures: torch.Tensor, runs: list[Attestation | None], why: list[str], vae_sha256: str) -> list[str]:
    """Remember each picture's run under the picture's hash; a video's latent gives several pictures.

    ``why``: what to say of each latent that has no run.
    """
    reports = []
    for i, picture in enumerate(pictures):
        place = i * len(runs) // len(pictures)
        if (run := runs[place]) is None:
            reports.append(why[place])
            continue
        attestation = run.of(vae_sha256=vae_sha256, image_sha256=tensor_sha256(picture))
        patcher.images.put(attestation.image_sha256, attestation)
        reports.append(format_attestation(attestation))
    return reports
