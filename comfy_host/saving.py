"""Image files in ComfyUI's output folder, each with what is known of exactly its pixels."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..modular_lora.files.reader import sha256_file
from ..modular_lora.provenance import keys, signing
from ..modular_lora.provenance.ledger import Known
from ..modular_lora.provenance.signing import KEY
from ..modular_lora.util import atomic, plain_json
from .enforcement import policy as policies
from .model_folders import save_place

OURS = frozenset((KEY, "file", "file_sha256"))  # keys in PNG texts and in the JSON beside other files
ENDINGS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class Style:
    """How pictures are written."""

    format: str = "png"
    quality: int = 95  # of jpeg and webp


def save(node, images, found: list[Known], prefix: str, style: Style) -> list[ui.SavedResult]:
    """Write pictures (each h w c, 0..1) into ComfyUI's output folder, each with what is known of it."""
    if not len(images):
        return []
    height, width = images[0].shape[:2]
    folder, name, counter, subfolder = save_place(prefix, width, height)
    graph = {} if args.disable_metadata else {"prompt": node.hidden.prompt, **_sent(node.hidden.extra_pnginfo)}
    sign = _signer()
    results = []
    for i, (image, picture) in enumerate(zip(images, found, strict=True)):
        stem = name.replace("%batch_num%", str(i))
        counter = max(counter, _next(folder, stem))
        record, written = plain_json.finite(picture.record(policies.records_activity())), None
        while written is None:
            path = folder / f"{stem}_{counter:05}_.{ENDINGS[style.format]}"
            with contextlib.suppress(FileExistsError):  # another writer took the name meanwhile
                _write(path, image, dict(record), graph, style, sign)
                written = path
            counter += 1
        results.append(ui.SavedResult(written.name, subfolder, io.FolderType.output))
    return results


def write(path: Path, image: torch.Tensor, record: dict) -> None:
    """Write one picture (h w c, 0..1) as PNG with its record, signed where the policy has a key, and no graph."""
    _write(path, image, dict(record), {}, Style(), _signer())


def _next(folder: Path, stem: str) -> int:
    """The first number that no file of this name has, nor any later one.

    ComfyUI counts files by the prefix as it was written, which is not their name where it is empty, ends in a slash or
    holds %batch_num% (folder_paths.get_save_image_path).
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
