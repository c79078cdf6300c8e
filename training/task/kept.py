"""Latents and text-encoder outputs kept on disk, for data sets that do not fit into memory and trainings begun again.

A file is named by all that it follows from: the image's pixels as they are encoded, or the caption, and the weights
of what encodes them. A changed image, caption, size, autoencoder or text encoder therefore never meets an old file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ...modular_lora.errors import writing
from ...modular_lora.util import atomic
from ..model import Cond, HostModel, Text
from ..options import TaskOptions

CROSS, NOTHING = "cross", "nothing"  # names in a file of a text; NOTHING.NAME: an encoder gave None as NAME


class Kept:
    """Named tensors in a folder, a file for each key."""

    def __init__(self, folder: Path, made_by: str):
        """``made_by``: what all keys begin with, as the weights that make the tensors."""
        self.folder, self._made_by = folder, made_by
        self.found = self.made = 0

    def get(self, key: bytes, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What is in the key's file, which is made first where there is none or where it cannot be read."""
        if (there := self.read(key)) is not None:
            self.found += 1
            return there
        path, made = self._path(key), {name: tensor.cpu().contiguous() for name, tensor in make().items()}
        with writing(path), atomic.replacing(path, parents=True) as part:
            safetensors.torch.save_file(made, part)
        self.made += 1
        return made

    def read(self, key: bytes) -> dict[str, Tensor] | None:
        """What is in the key's file; None where there is none, or one that is cut off."""
        try:
            return safetensors.torch.load_file(self._path(key))
        except (OSError, SafetensorError):
            return None

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{hashlib.sha256(self._made_by.encode() + key).hexdigest()}.safetensors"

    @property
    def line(self) -> str:
        """For the report."""
        return f"{self.folder.name}: {self.found} found on disk, {self.made} made"


def wanted(host_model: HostModel, options: TaskOptions) -> tuple[Kept | None, Kept | None]:
    """Where latents and captions' encodings are kept; None of what stays in memory."""
    folder, images, captions = Path(options.output_dir), None, None
    if options.cache_latents_to_disk:
        images = Kept(folder / "cache_latents", host_model.autoencoder_identity())
    if options.cache_text_encoder_outputs_to_disk:
        captions = Kept(folder / "cache_text_encoder_outputs", host_model.text_identity())
    return images, captions


def pixels_key(pixels: Tensor) -> bytes:
    """Of an image (h w 3) or clip (t h w 3) as it goes to the autoencoder."""
    return f"{tuple(pixels.shape)}{pixels.dtype}".encode() + pixels.contiguous().numpy().tobytes()


def as_tensors(text: Text) -> dict[str, Tensor]:
    """A text's conditioning without its size, as a file has it."""
    found = {CROSS: text.cross}
    for name, part in text.further.items():
        found[name if part is not None else f"{NOTHING}.{name}"] = text.cross[:0] if part is None else part
    return found


def as_cond(tensors: Mapping[str, Tensor]) -> Cond:
    """The reverse of `as_tensors`, of one text."""
    further = {
        name.removeprefix(f"{NOTHING}."): None if name.startswith(f"{NOTHING}.") else part
        for name, part in tensors.items()
        if name != CROSS
    }
    return Cond((Text(tensors[CROSS], further),))
