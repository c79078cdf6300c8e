"""Guarded VAE Decode and Save Attested Image: the attestation is bound to the pixels, by content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..modular_lora.attestation import Attestation, tensor_sha256
from ..modular_lora.errors import GuardError
from ..modular_lora.report import format_attestation
from . import host
from .sockets import CATEGORY, show

PNG_KEY = "modular_lora_attestation"
EDITED = "unattested: no guarded run made exactly this; it was edited on the way, or sampled without the guard"


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
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The pictures; any edit makes them unattested."),
                io.String.Output(
                    "report", display_name="report", tooltip="Attestation of the pictures, or why there is none."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        pictures = vae.decode(samples["samples"])  # b h w c, of a video b t h w c
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
        runs = [host.latents.get(tensor_sha256(latent)) for latent in samples["samples"]]
        report = "\n".join(dict.fromkeys(_bind(pictures, runs, host.vae_sha256(vae))))
        show(cls, report)
        return io.NodeOutput(pictures, report)


def _bind(pictures: torch.Tensor, runs: list[Attestation | None], vae_sha256: str) -> list[str]:
    """Remember each picture's run under the picture's hash; a video's latent gives several pictures."""
    reports = []
    for i, picture in enumerate(pictures):
        if (run := runs[i * len(runs) // len(pictures)]) is None:
            reports.append(EDITED)
            continue
        attestation = run.of(vae_sha256=vae_sha256, image_sha256=tensor_sha256(picture))
        host.images.put(attestation.image_sha256, attestation)
        reports.append(format_attestation(attestation))
    return reports


class SaveAttestedImage(io.ComfyNode):
    """PNG files that say whether a guarded run made exactly these pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSaveImage",
            display_name="Save Attested Image",
            category=f"{CATEGORY}/sample",
            description="Saves PNG files with the attestation in their text; a picture that was edited is saved as "
            "unattested, or refused. PNG text can be forged by whoever holds the file.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures straight from Guarded VAE Decode."),
                io.String.Input("filename_prefix", default="guarded", tooltip="File name prefix, as in Save Image."),
                io.Combo.Input(
                    "unattested",
                    ["save and say so", "refuse"],
                    default="save and say so",
                    tooltip="What to do with a picture that no guarded run made.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, filename_prefix, unattested) -> io.NodeOutput:
        found = [host.images.get(tensor_sha256(image)) for image in images]
        missing = found.count(None)
        if missing and unattested == "refuse":
            raise GuardError(f"{missing} of {len(found)} pictures are {EDITED}; connect Guarded VAE Decode directly.")
        height, width = images.shape[1:3]
        place = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory(), width, height)
        results = [cls._save(image, run, place, i) for i, (image, run) in enumerate(zip(images, found, strict=True))]
        show(cls, f"{len(found) - missing} of {len(found)} pictures attested" + f"; {missing} {EDITED}" * bool(missing))
        return io.NodeOutput(ui=ui.SavedImages(results))

    @classmethod
    def _save(cls, image: torch.Tensor, run: Attestation | None, place: tuple, index: int) -> ui.SavedResult:
        folder, name, counter, subfolder, _ = place
        pixels = np.clip(image.cpu().numpy() * 255.0, 0, 255).astype(np.uint8)  # h w c, as the stock Save Image rounds
        record = {"status": "unattested"} if run is None else json.loads(run.to_json())
        record["pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        info = PngInfo()
        info.add_text(PNG_KEY, json.dumps(record, sort_keys=True))
        if not args.disable_metadata:
            for key, value in {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}.items():
                info.add_text(key, json.dumps(value))
        file = f"{name.replace('%batch_num%', str(index))}_{counter + index:05}_.png"
        part = Path(folder) / f"{file}.part"
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=info, compress_level=4)
        part.replace(Path(folder) / file)
        return ui.SavedResult(file, subfolder, io.FolderType.output)
