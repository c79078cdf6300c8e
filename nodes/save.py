"""Save Attested Image and Save Image (Guarded): files that say which run made exactly these pixels, and which gate."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..comfy_host.enforcement import policy as policies
from ..comfy_host.node_report import CATEGORY, show
from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import sha256_file
from ..modular_lora.provenance import keys, signing
from ..modular_lora.provenance.ledger import EDITED, Known, known
from ..modular_lora.provenance.signing import KEY
from ..modular_lora.util import atomic, plain_json

UNATTESTED, UNGATED = "unattested", "not gated"
FLAGGED = "flagged and left as they are"
OURS = frozenset((KEY, "file", "file_sha256"))  # keys in PNG texts and in the JSON beside other files
ENDINGS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class Style:
    """How pictures are written."""

    format: str = "png"
    quality: int = 95  # of jpeg and webp


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
        found = [known(image) for image in images]
        missing = sum(not k.guarded for k in found)
        if missing and unattested == "refuse":
            raise GuardError(f"{missing} of {len(found)} pictures are {EDITED}; connect Guarded VAE Decode directly.")
        results = save(cls, images, found, filename_prefix, Style())
        said = f"{len(found) - missing} of {len(found)} pictures attested{on_merged(found)}"
        show(cls, said + f"; {missing} {EDITED}" * bool(missing))
        return io.NodeOutput(ui=ui.SavedImages(results))


class SaveGatedImage(io.ComfyNode):
    """Files of pictures that a guarded run made and a gate let through, and of no others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSaveGated",
            display_name="Save Image (Guarded)",
            category=f"{CATEGORY}/gate",
            description="Saves only pictures that a guarded run made and a gate judged, with the record of both: in "
            "the text of a PNG, beside a JPEG or WebP as JSON. Such text can be forged by whoever holds the file.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures straight from Safety Gate or Guarded Sample and Gate."),
                io.String.Input("filename_prefix", default="gated", tooltip="File name prefix, as in Save Image."),
                io.Combo.Input(
                    "format",
                    list(ENDINGS),
                    default="png",
                    tooltip="png carries the record itself; jpeg and webp get a .json file of the same name.",
                ),
                io.Int.Input("quality", default=95, min=1, max=100, tooltip="Quality of jpeg and webp; png has none."),
                io.Combo.Input(
                    "unfit",
                    ["refuse", "skip and say so"],
                    default="refuse",
                    tooltip="What to do where a picture is unattested, not gated, or flagged and left as it is: refuse "
                    "saves nothing of the batch; skip saves the others.",
                ),
                io.Boolean.Input(
                    "save_flagged",
                    default=False,
                    tooltip="Also save pictures that the gate flagged and only reported.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, filename_prefix, format, quality, unfit, save_flagged) -> io.NodeOutput:
        found = [known(image) for image in images]
        problems = [_problem(k, save_flagged) for k in found]
        counts = ", ".join(f"{n} {problem}" for problem, n in Counter(filter(None, problems)).items())
        if counts and unfit == "refuse":
            raise GuardError(
                f"{counts} of {len(found)} pictures: nothing is saved; connect Safety Gate behind Guarded VAE Decode "
                "and this node behind the gate, with nothing between, and let the gate act on what it flags."
            )
        fit = [i for i, problem in enumerate(problems) if problem is None]
        results = save(cls, [images[i] for i in fit], [found[i] for i in fit], filename_prefix, Style(format, quality))
        skipped = f"; left out: {counts}" if counts else ""
        merged = on_merged(found[i] for i in fit)
        show(cls, f"{len(fit)} of {len(found)} pictures saved, attested and gated{merged}{skipped}")
        return io.NodeOutput(ui=ui.SavedImages(results))


def on_merged(found: Iterable[Known]) -> str:
    """How many of the attested pictures are of a base with merged LoRAs or models, in words; "" where none is."""
    merged = sum(k.guarded and k.run.base_had_merged_loras for k in found)
    return f", {merged} of them on a merged base" if merged else ""


def _problem(picture: Known, save_flagged: bool) -> str | None:
    """Why a picture may not be saved, or None."""
    if picture.run is None:
        return UNATTESTED
    if picture.gate is None:
        return UNGATED
    return FLAGGED if picture.gate.flagged and not (picture.gate.changed or save_flagged) else None


def save(node, images, found: list[Known], prefix: str, style: Style) -> list[ui.SavedResult]:
    """Write pictures (each h w c, 0..1) into ComfyUI's output folder, each with what is known of it."""
    if not len(images):
        return []
    height, width = images[0].shape[:2]
    target = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, target, width, height)
    graph = {} if args.disable_metadata else {"prompt": node.hidden.prompt, **_sent(node.hidden.extra_pnginfo)}
    sign = _signer()
    results = []
    for i, (image, picture) in enumerate(zip(images, found, strict=True)):
        stem = name.replace("%batch_num%", str(i))
        counter = max(counter, _next(Path(folder), stem))
        record, written = plain_json.finite(picture.record()), None
        while written is None:
            path = Path(folder) / f"{stem}_{counter:05}_.{ENDINGS[style.format]}"
            with contextlib.suppress(FileExistsError):  # another writer took the name meanwhile
                _write(path, image, dict(record), graph, style, sign)
                written = path
            counter += 1
        results.append(ui.SavedResult(written.name, subfolder, io.FolderType.output))
    return results


def _next(folder: Path, stem: str) -> int:
    """The first number that no file of this name has, nor any later one.

    ComfyUI counts files by the prefix as it was written, which is not their name where it is empty, ends in a slash or
    holds %batch_num% (folder_paths.get_save_image_path, 0.3.75 and 0.33.0).
    """
    taken = re.compile(rf"{re.escape(os.path.normcase(stem))}_([0-9]+)_\.")
    found = (taken.match(os.path.normcase(name)) for name in os.listdir(folder))
    return max((int(match[1]) for match in found if match), default=0) + 1


def _sent(extra: dict | None) -> dict:
    """What the front end sent along, without what would pass for a record of ours; in a PNG a key ends at a NUL."""
    return {key: value for key, value in (extra or {}).items() if key.partition("\0")[0] not in OURS}


def _signer() -> Callable[[dict], dict]:
    """Signs records with the policy's key; leaves them as they are where there is none."""
    policy = policies.current()
    if policy is None or policy.signing_key is None:
        return lambda record: record
    key = keys.private_key(policy.signing_key)
    return lambda record: signing.sign_attestation(record, key)


def _write(path: Path, image: torch.Tensor, record: dict, graph: dict, style: Style, sign) -> None:
    pixels = np.clip(image.cpu().numpy() * 255.0, 0, 255).astype(np.uint8)  # h w c, as the stock Save Image rounds
    record |= signing.pixels(pixels)  # of a lossy file: before it is encoded
    picture = Image.fromarray(pixels)
    if style.format == "png":
        info = PngInfo()
        info.add_text(KEY, plain_json.dumps(sign(record), sort_keys=True))
        for key, value in graph.items():
            info.add_text(key, plain_json.dumps(value))
        with atomic.creating(path) as part:
            picture.save(part, format="PNG", pnginfo=info, compress_level=4)
        return

    with contextlib.ExitStack() as undo:  # a record without its picture does not stay either
        with atomic.creating(path) as part:  # the picture takes its name last: it never lies there without its record
            picture.save(part, format=style.format, quality=style.quality)
            digest = sha256_file(part)
            beside = {KEY: sign(record | {"file_sha256": digest}), "file": path.name, "file_sha256": digest, **graph}
            side = path.with_suffix(".json")
            with atomic.creating(side) as side_part:
                side_part.write_text(plain_json.dumps(beside, sort_keys=True, indent=1), encoding="utf-8")
            undo.callback(side.unlink)
        undo.pop_all()
