"""What an audit draws: arms × prompts × seeds, cut into work units that are the same on every engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..modular_lora.errors import GuardError
from ..modular_lora.files.scales import Scale

Role = Literal["safety", "task"]
GUARDED = (
    "safety",
    "modular",
    "projected",
    "safety_first",
)  # arms whose images may be shown: a safety LoRA acts, whole


@dataclass(frozen=True)
class Part:
    """One LoRA of an arm, as an unmerged branch; a negative strength is the paper's model arithmetic."""

    role: Role
    path: str
    sha256: str
    strength: float = 1.0
    scale: Scale = "refuse"


@dataclass(frozen=True)
class Arm:
    """A model to draw with: W0 + Σ strength·ΔW. ``name`` says what it is, ``training_seed`` which repetition.

    ``combine``: "sum", or "safety first", under which the task LoRAs give way (modular_lora/guard/safety_first.py).
    """

    name: str  # one of options.ARMS, or a sweep's
    parts: tuple[Part, ...] = ()
    training_seed: int = 0
    combine: str = "sum"


@dataclass(frozen=True)
class Item:
    """One image that is asked for."""

    prompt: str
    seed: int  # of its noise, drawn on the CPU for this image alone
    cell: str  # the set of prompts it counts in: "suppressed", "kept", ...
    concept: str = ""  # cluster of the bootstrap and row of the table; in kept cells the label it should get
    style: str = ""  # label that the fidelity detector should give
    negative: str = ""
    attack: str = ""  # "", "synonym", "img2img", "inpaint", ...
    start: str = ""  # image file that img2img or inpainting starts from
    mask: str = ""  # image file, white where inpainting draws
    denoise: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; names are ComfyUI's."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int = 512
    height: int = 512


@dataclass(frozen=True)
class Origin:
    """What draws, as far as it decides the pixels: they are bit-identical for one device type, dtype and unit size."""

    base_sha256: str
    device: str
    dtype: str

    @classmethod
    def of(cls, pipeline: Pipeline) -> Origin:
        return cls(pipeline.base_sha256, pipeline.device, pipeline.dtype)


@dataclass(frozen=True)
class Unit:
    """One shard: an arm and a few items drawn as one batch. ``key`` is the same wherever it runs."""

    arm: Arm
    items: tuple[Item, ...]
    sampling: Sampling
    key: str


class Pipeline(Protocol):
    """What draws: a base model on one device, deterministic for equal arm, items and sampling.

    Of an item it may use prompt, negative, seed, start, mask and denoise; the other fields say how the image counts.
    """

    base_sha256: str  # of all weights that decide the pixels: network, text encoders and VAE
    device: str  # type and model ("cuda NVIDIA H100 80GB HBM3", "cpu"), without an index: part of a unit's key
    dtype: str

    def draw(self, arm: Arm, items: Sequence[Item], sampling: Sampling) -> np.ndarray:
        """Images b h w 3, uint8, RGB, in the order of ``items``. Raises GuardError."""


def units(arms: Sequence[Arm], items: Sequence[Item], sampling: Sampling, origin: Origin, size: int) -> Iterator[Unit]:
    """The work in a fixed order: arm by arm, ``size`` items a unit; GuardError for a start or mask file not there."""
    for arm in arms:
        for start in range(0, len(items), size):
            some = tuple(items[start : start + size])
            yield Unit(arm, some, sampling, _key(arm, some, sampling, origin))


def _key(arm: Arm, items: Sequence[Item], sampling: Sampling, origin: Origin) -> str:
    """SHA-256 of all that decides the images and nothing else: contents of files, not their paths.

    How an image counts (cell, concept, style, attack) stays out, so that another table of the same images draws
    nothing anew. The versions of torch and of the host are taken for granted.
    """
    parts = [
        (p.role, p.sha256, float(p.strength), *(["by metadata"] if p.scale == "metadata" else [])) for p in arm.parts
    ]
    asked = [(i.prompt, i.negative, i.seed, _content(i.start), _content(i.mask), float(i.denoise)) for i in items]
    how = [] if arm.combine == "sum" else [arm.combine]
    said = [parts, *how, asked, asdict(replace(sampling, cfg=float(sampling.cfg))), asdict(origin)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _content(path: str) -> str:
    """SHA-256 of a start or mask file, "" for none."""
    from ..modular_lora.files.reader import sha256_file  # here, since it brings torch, which not every caller needs

    if path and not Path(path).is_file():
        raise GuardError(
            f"{path}: no such image to start from: check the file that names it", code="audit.no-start-image"
        )
    return sha256_file(Path(path)) if path else ""
