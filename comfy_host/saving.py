"""Image files in ComfyUI's output folder, each with what is known of exactly its pixels in it."""

from __future__ import annotations

import contextlib
import io as streams
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..modular_lora.provenance import attested, credentials, keys, lossy, marking
from ..modular_lora.provenance.attested import KEY
from ..modular_lora.provenance.credentials import Claim, Input, Signer
from ..modular_lora.provenance.ledger import Known
from ..modular_lora.util import atomic, plain_json
from ..operators.policy import OperatorPolicy
from ..version import VERSION
from . import inputs
from .enforcement import policy as policies
from .model_folders import save_place

OURS = frozenset((KEY, marking.KEYWORD, "file"))  # keys in PNG texts and in the JSON beside other files
ENDINGS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True)
class Style:
    """How images are written."""

    format: str = "png"
    quality: int = 95  # of jpeg and webp


@dataclass(frozen=True)
class Saved:
    """What was written: ComfyUI's entry of each file, and in words which of them have Content Credentials."""

    files: list[ui.SavedResult]
    credentials: str = ""


@dataclass(frozen=True)
class _Seals:
    """What the policy puts on files.

    Attributes:
        record: Signs a record, or leaves it as it is.
        signer: Of Content Credentials; None: files get none.
        inputs: Image files that went into what is saved.
    """

    record: Callable[[dict], dict]
    signer: Signer | None = None
    inputs: tuple[Input, ...] = ()


def save(node, images, found: list[Known], prefix: str, style: Style) -> Saved:
    """Write images (each h w c, 0..1) into ComfyUI's output folder, each with what is known of it."""
    if not len(images):
        return Saved([])
    height, width = images[0].shape[:2]
    folder, name, counter, subfolder = save_place(prefix, width, height)
    graph = {} if args.disable_metadata else {"prompt": node.hidden.prompt, **_sent(node.hidden.extra_pnginfo)}
    seals = _seals(node, found)
    results = []
    for i, (image, known) in enumerate(zip(images, found, strict=True)):
        stem = name.replace("%batch_num%", str(i))
        counter = max(counter, _next(folder, stem))
        content, written = _content(image, known, graph, style, seals), None
        while written is None:
            path = folder / f"{stem}_{counter:05}_.{ENDINGS[style.format]}"
            with contextlib.suppress(FileExistsError):  # another writer took the name meanwhile
                _write(path, content, {} if style.format == "png" else graph)
                written = path
            counter += 1
        results.append(ui.SavedResult(written.name, subfolder, io.FolderType.output))
    return Saved(results, _in_words(seals.signer, found))


def _in_words(signer: Signer | None, found: Sequence[Known]) -> str:
    if signer is None:
        return ""
    return f"; Content Credentials of {signer.name} in {sum(bool(one.source_type) for one in found)} of {len(found)}"


def write(path: Path, image: torch.Tensor, known: Known) -> None:
    """Write one image (h w c, 0..1) as PNG with its record, signed where the policy has a key, and with no graph."""
    _write(path, _content(image, known, {}, Style(), _Seals(_record_seal(policies.current()))), {})


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


def _seals(node, found: Sequence[Known]) -> _Seals:
    """Those of the policy in force; none of either where there is none. GuardError where one cannot be made."""
    policy = policies.current()
    if policy is None:
        return _Seals(_record_seal(None))
    record = _record_seal(policy)
    if policy.credential_files is None:
        return _Seals(record)
    signer = credentials.signer(*policy.credential_files)
    marked = any(one.source_type for one in found)
    went_in = inputs.behind(node.hidden.prompt, node.hidden.unique_id) if marked else ()
    return _Seals(record, signer, went_in)


def _record_seal(policy: OperatorPolicy | None) -> Callable[[dict], dict]:
    """Signs records with the policy's key; leaves them as they are where there is none."""
    if policy is None or policy.signing_key is None:
        return lambda record: record
    key = keys.private_key(policy.signing_key)
    return lambda record: attested.signed(record, key)


def _content(image: torch.Tensor, known: Known, graph: Mapping[str, Any], style: Style, seals: _Seals) -> bytes:
    """An image file with what is known of the image in it: the record, what made it, and over all of it credentials."""
    pixels = np.clip(image.cpu().numpy() * 255.0, 0, 255).astype(np.uint8)  # h w c, as the stock Save Image rounds
    source = known.source_type
    record = plain_json.finite(known.record(policies.records_activity())) | attested.pixels(pixels)
    record |= {marking.SOURCE_TYPE: source} if source else {}
    file_image = Image.fromarray(pixels)
    if style.format == "png":
        text = plain_json.dumps(seals.record(record), sort_keys=True)
        raw = _png(file_image, text, source, graph)
    else:
        raw = _encoded(file_image, style.format, quality=style.quality)
        empty = lossy.with_packet(raw, b"", file_image.size)
        record |= {attested.DATA: lossy.read("image", empty).data_sha256}
        text = plain_json.dumps(seals.record(record), sort_keys=True)
        raw = lossy.with_packet(raw, marking.packet(source, text), file_image.size)
    if seals.signer is None or not source:
        return raw
    edits = (*known.edits, *((f"gate: {known.gate.action}",) if known.gate and known.gate.changed else ()))
    claim = Claim(source, text, VERSION, edits, seals.inputs)
    return credentials.sign(raw, attested.MIMES[f".{ENDINGS[style.format]}"], claim, seals.signer)


def _png(image: Image.Image, text: str, source: str, graph: Mapping[str, Any]) -> bytes:
    info = PngInfo()
    info.add_text(KEY, text)
    if source:
        info.add_itxt(marking.KEYWORD, marking.packet(source).decode())
    for key, value in graph.items():
        info.add_text(key, plain_json.dumps(value))
    return _encoded(image, "png", pnginfo=info, compress_level=4)


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = streams.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _write(path: Path, content: bytes, graph: Mapping[str, Any]) -> None:
    """Put a file in its place, with the graph beside it where there is one. FileExistsError where a name is taken."""
    with contextlib.ExitStack() as undo:  # the graph without its image does not stay either
        with atomic.creating(path) as part:
            part.write_bytes(content)
            if graph:
                side = path.with_suffix(".json")
                with atomic.creating(side) as side_part:
                    beside = {"file": path.name, **graph}
                    side_part.write_text(plain_json.dumps(beside, sort_keys=True, indent=1), encoding="utf-8")
                undo.callback(side.unlink)
        undo.pop_all()
