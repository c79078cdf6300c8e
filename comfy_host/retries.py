"""Images drawn again, each by itself with a seed of its own, until a gate passes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..modular_lora.errors import GuardError
from ..modular_lora.provenance.attestation import Attestation
from . import patcher as host
from .gating import Gate, outcome_of, reporting
from .stock import MAX_SEED, decode


@dataclass(frozen=True)
class Drawn:
    """What came of a job with retries.

    Attributes:
        images: b h w c.
        gate: The gate that is to judge them; not always with the action that was chosen, see `_sparing`.
        tries: How often each was drawn, in words.
        attested: The attestation of the first run.
    """

    images: torch.Tensor
    gate: Gate
    tries: str
    attested: Attestation


def draw_until_clear(job: Job, seed: int, max_tries: int, gate: Gate) -> Drawn:
    """Draw a job, and what the gate flags of it again, at most ``max_tries`` times in all."""
    if max_tries > 1:
        job.check_hints()
    shots = job.draw(seed)
    attested, tries, n = host.attestation(job.patcher), [1] * len(shots), len(shots)
    pending = _flagged(shots, range(n), gate)
    for retry in range(1, max_tries):
        for i in pending:
            (shots[i],) = job.of(i).draw((seed + retry * n + i) & MAX_SEED)
            tries[i] += 1
        pending = _flagged(shots, pending, gate)
    final = _sparing(gate, some=0 < len(pending) < n)
    return Drawn(torch.cat(shots), final, _tried(tries, pending, spared=final is not gate), attested)


@dataclass(frozen=True)
class Job:
    """What is to be drawn. A shot is what one latent decodes to: f h w c, f 1, or the frames of a video."""

    patcher: Any
    vae: Any
    sampler: tuple  # steps, cfg, sampler, scheduler
    positive: list
    negative: list
    latent: dict
    denoise: float

    def draw(self, seed: int) -> list[torch.Tensor]:
        """The shots, as Guarded KSampler and Guarded VAE Decode make them, attested as there."""
        out = host.common_ksampler(
            self.patcher, seed, *self.sampler, self.positive, self.negative, self.latent, denoise=self.denoise
        )
        images, _ = decode(self.vae, out["samples"])
        return list(images.reshape(len(out["samples"]), -1, *images.shape[1:]))

    def of(self, i: int) -> Job:
        """The same for one latent of the batch alone, with what of the conditioning belongs to it."""
        n = len(self.latent["samples"])
        single = {key: value for key, value in self.latent.items() if key != "batch_index"}
        single |= {key: _row(single[key], i) for key in ("samples", "noise_mask") if key in single}
        return replace(
            self, latent=single, positive=_single(self.positive, i, n), negative=_single(self.negative, i, n)
        )

    def check_hints(self) -> None:
        """GuardError where a ControlNet has one hint per image: a retry of a single image cannot select its own."""
        most = max(
            (len(hint) for _, options in (*self.positive, *self.negative) for hint in _hints(options)), default=0
        )
        if most > 1 and len(self.latent["samples"]) > 1:
            raise GuardError(
                f"A ControlNet has {most} hint images for one batch, and retries draw single images: give it one "
                "hint, or set max_tries to 1.",
                code="retries.hints",
            )


def _hints(options: dict) -> Iterable[torch.Tensor]:
    """Hints of a conditioning's ControlNets (attributes of ControlBase)."""
    control = options.get("control")
    while control is not None:
        if (hint := getattr(control, "cond_hint_original", None)) is not None:
            yield hint
        control = getattr(control, "previous_controlnet", None)


def _single(conditioning: list, i: int, n: int) -> list:
    """Conditioning of image i of n: ComfyUI repeats a shorter batch, and takes one of n as one prompt per image."""
    own = lambda v: _row(v, i) if isinstance(v, torch.Tensor) and v.ndim > 1 and len(v) == n else v  # noqa: E731
    return [[_row(made, i), {key: own(value) for key, value in options.items()}] for made, options in conditioning]


def _row(batch: torch.Tensor, i: int) -> torch.Tensor:
    """Row i as a batch of one; a shorter batch is repeated, as ComfyUI does (repeat_to_batch_size)."""
    i %= len(batch)
    return batch[i : i + 1]


def _flagged(shots: list[torch.Tensor], asked: Iterable[int], gate: Gate) -> list[int]:
    """Which of the ``asked`` shots have a flagged image."""
    if not (asked := list(asked)):
        return []
    report = reporting(gate)
    flags = np.reshape(outcome_of(torch.cat([shots[i] for i in asked]), report).flags, (len(asked), -1))
    return [i for i, of_shot in zip(asked, flags, strict=True) if of_shot.any()]


def _sparing(gate: Gate, some: bool) -> Gate:
    """The gate, with empty in place of block where some images are flagged, and not all: it would take all for one."""
    if gate.settings.action != "block" or not some:
        return gate
    return replace(gate, settings=replace(gate.settings, action="empty"))


def _tried(tries: list[int], pending: list[int], spared: bool) -> str:
    """Tries of every image that took more than one, counted from 1; what becomes of those still flagged."""
    lines = [f"{sum(tries)} tries for {len(tries)} images"]
    for i, n in enumerate(tries):
        if n > 1:
            lines.append(f"  image {i + 1} {'still flagged' if i in pending else 'passed'} at try {n}")
    if spared:
        lines.append("  block: what is still flagged is left empty, so that the others pass")
    return "\n".join(lines)
