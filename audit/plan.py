"""What an audit draws: arms × prompts × seeds, cut into work units that are the same on every engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np

Role = Literal["safety", "task"]
GUARDED = ("safety", "modular", "projected")  # arms whose pictures may be shown: a safety LoRA acts, whole


@dataclass(frozen=True)
class Part:
    """One LoRA of an arm, as an unmerged branch; a negative strength is the paper's model arithmetic."""

    role: Role
    path: str
    sha256: str
    strength: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A model to draw with: W0 + Σ strength·ΔW. ``name`` says what it is, ``training_seed`` which repetition."""

    name: str  # base, safety, task, sequential, modular, projected, minus_safety, safety_minus_sequential, ...
    parts: tuple[Part, ...] = ()
    training_seed: int = 0


@dataclass(frozen=True)
class Item:
    """One picture that is asked for."""

    prompt: str
    seed: int  # of its noise, drawn on the CPU for this picture alone
    cell: str  # the set of prompts it counts in: "suppressed", "kept", ...
    concept: str = ""  # cluster of the bootstrap and row of the table; in kept cells the label it should get
    style: str = ""  # label that the fidelity detector should give
    negative: str = ""
    attack: str = ""  # "", "synonym", "img2img", "inpaint", ...
    start: str = ""  # picture file that img2img or inpainting starts from
    mask: str = ""  # picture file, white where inpainting draws
    denoise: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; names are ComfyUI's."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int = 512
    height: int = 512


@dataclass(frozen=True)
class Unit:
    """One shard: an arm and a few items drawn as one batch. ``key`` is the same wherever it runs."""

    arm: Arm
    items: tuple[Item, ...]
    key: str


class Painter(Protocol):
    """What draws: a base model on one device, deterministic for equal arm, items and sampling."""

    base_sha256: str
    device: str  # type and name, as the report says it
    dtype: str

    def draw(self, arm: Arm, items: Sequence[Item], sampling: Sampling) -> np.ndarray:
        """Pictures b h w 3, uint8, RGB, in the order of ``items``. Raises GuardError."""


def units(
    arms: Sequence[Arm], items: Sequence[Item], sampling: Sampling, base_sha256: str, size: int
) -> Iterator[Unit]:
    """The work in a fixed order: arm by arm, ``size`` items a unit."""
    for arm in arms:
        for start in range(0, len(items), size):
            some = tuple(items[start : start + size])
            yield Unit(arm, some, _key(arm, some, sampling, base_sha256))


def _key(arm: Arm, items: Sequence[Item], sampling: Sampling, base_sha256: str) -> str:
    """SHA-256 of all that decides the pictures: contents of LoRA files, not their paths."""
    parts = [(p.role, p.sha256, p.strength) for p in arm.parts]
    said = [parts, [asdict(item) for item in items], asdict(sampling), base_sha256]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
