"""The denoising loss of captioned images: latents and text-encoder outputs made once, noise drawn by step.

L = E w(t) |F − F_θ(x_t, t, c)|², F the model's own target (model.py): ε (arXiv 2006.11239, eq. 14), v, or the velocity
ε − x_0 (arXiv 2210.02747, eq. 23); θ the adapters alone. Other errors, and w(t): losses.py; ε: noise.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modular_lora.errors import GuardError
from ...modular_lora.util.cache import Cache
from ..data import dataset, images
from ..data.batches import Draw, Plan
from ..loop import Watch
from ..model import Cond, HostModel, per_row
from ..options import TaskOptions
from ..seeds import step_generator
from . import kept, losses, noise, timesteps

LATENT, REFERENCE = "latent", "reference"  # the first is its name in a file, too
CACHE_BYTES = 2**30  # of conditioning


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of a batch as the network sees them."""

    latents: Tensor  # b c [f] h w
    mask: Tensor | None  # b 1 [1] h w; None: whole images count
    sizes: Tensor  # b 6
    references: tuple[Tensor | None, ...]  # 1 c ... each


class Latents:
    """Latents, masks, sizes and reference images of all images, those held out behind the others, made once.

    They are float32 on the CPU, or on ``disk`` and read for each batch.
    """

    def __init__(
        self, host_model: HostModel, report: dataset.DatasetReport, watch: Watch, disk: kept.Kept | None = None
    ):
        self.disk = disk
        self._keys: dict[tuple[str, int, bool], bytes] = {}  # of what is on disk
        found = (*report.images, *report.held_out)
        wanted = [(i, flip) for i, p in enumerate(report.images) for flip in range(1 + p.subset.flip_aug)]
        wanted += [(i, 0) for i in range(len(report.images), len(found))]
        self._made: dict[tuple[str, int, bool], Tensor] = {}  # LATENT or REFERENCE, image, mirrored; without ``disk``
        self.masks: dict[tuple[int, bool], Tensor | None] = {}
        self.sizes: dict[tuple[int, bool], Tensor] = {}
        for done, (i, flipped) in enumerate(wanted, 1):
            flip = bool(flipped)
            image = found[i]
            pixels, self.masks[i, flip] = dataset.load(image, flip, host_model.downscale)
            self._encode((LATENT, i, flip), pixels, lambda image: host_model.encode_images(image[None])[0])
            if (reference := dataset.load_reference(image, flip)) is not None:
                self._encode((REFERENCE, i, flip), reference, host_model.encode_reference)
            self.sizes[i, flip] = images.sizes(image.size, image.fit, flip)
            watch.stage("caching latents", done, len(wanted))
        there = self._made if disk is None else self._keys
        if first := next((key for key in there if key[0] == REFERENCE), None):
            host_model.ask_reference(self._read(first))

    def _encode(self, key: tuple[str, int, bool], pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> None:
        if self.disk is None:
            self._made[key] = encode(pixels).cpu()
        else:
            content = (b"" if key[0] == LATENT else key[0].encode()) + kept.pixels_key(pixels)
            self._keys[key] = hashlib.sha256(content).digest()
            self.disk.get(self._keys[key], lambda: {LATENT: encode(pixels)})

    def of(self, draws: Sequence[Draw]) -> Batch:
        keys = [(draw.image, draw.flipped) for draw in draws]
        z = torch.stack([self._read((LATENT, *key)) for key in keys])
        masks = [self.masks[key] for key in keys]
        mask = None
        if any(m is not None for m in masks):
            mask = torch.stack([torch.ones(z.shape[-2:]) if m is None else m for m in masks])
            mask = mask.view(len(z), *[1] * (z.dim() - 3), *mask.shape[-2:])
        there = self._made if self.disk is None else self._keys
        references = (self._read((REFERENCE, *key)) if (REFERENCE, *key) in there else None for key in keys)
        return Batch(z, mask, torch.stack([self.sizes[key] for key in keys]), tuple(references))

    def _read(self, key: tuple[str, int, bool]) -> Tensor:
        if self.disk is None:
            return self._made[key]
        read = self.disk.read(self._keys[key])
        if read is None:
            raise GuardError(
                f"{self.disk.folder.name}: a file was removed or damaged while the training ran: start it again.",
                code="train.cache-gone",
            )
        return read[LATENT]


class Captions:
    """Conditioning by caption, so that shuffling and dropout keep the cache, which is bounded by `CACHE_BYTES`.

    With ``disk`` every caption's is kept there as well, so that none is encoded twice.
    """

    def __init__(self, host_model: HostModel, disk: kept.Kept | None = None):
        self.host_model, self.disk = host_model, disk
        self._kept: Cache[str, Cond] = Cache(CACHE_BYTES, lambda cond: cond.nbytes)

    @torch.no_grad()
    def of(self, captions: Sequence[str]) -> Cond:
        return Cond.cat([self._one(caption) for caption in captions])

    def _one(self, caption: str) -> Cond:
        return self._kept.get(caption) or self._kept.put(caption, self._made(caption))

    def _made(self, caption: str) -> Cond:
        if self.disk is None:
            return self.host_model.encode([caption])
        made = self.disk.get(caption.encode(), lambda: kept.as_tensors(self.host_model.encode([caption]).rows[0]))
        return kept.as_cond({name: part.to(self.host_model.device) for name, part in made.items()})


@dataclass(frozen=True, eq=False)
class Denoising:
    """The loss of a step's micro-batch."""

    host_model: HostModel
    options: TaskOptions
    plan: Plan
    latents: Latents
    captions: Captions

    def loss(self, step: int, micro: int) -> Tensor:
        """Mean over the batch of w · error; scalar."""
        return self._drawn(self.plan.batch(step, micro), step_generator(self.options.seed, "noise", step, micro))

    def largest(self) -> Tensor:
        """The loss of the micro-batch that takes most memory, with noise of its own."""
        return self._drawn(self.plan.largest(), step_generator(self.options.seed, "largest", 0))

    def _drawn(self, draws: Sequence[Draw], generator: torch.Generator) -> Tensor:
        t = timesteps.drawn(self.host_model.schedule, self.options, len(draws), generator)
        return self.at(draws, t, generator)

    def at(self, draws: Sequence[Draw], t: Tensor, generator: torch.Generator) -> Tensor:
        """The same of given images at timesteps t (b), with noise from a CPU generator."""
        host_model, options, schedule = self.host_model, self.options, self.host_model.schedule
        batch = self.latents.of(draws)
        z, mask = batch.latents.to(host_model.device), batch.mask
        cond = self._conditioning([draw.caption for draw in draws])
        cond = cond.of_images(batch.sizes.to(host_model.device), batch.references)
        t = t.to(z.device)
        eps = noise.drawn(z.shape, options, generator).to(z.device)
        prediction = host_model.predict(schedule.add_noise(z, t, eps), t, cond)
        error = losses.errors(prediction, schedule.target(z, t, eps), t, schedule, options)  # b c ...
        error = per_row(error if mask is None else error * mask.to(host_model.device))  # b
        weight = torch.tensor([draw.weight for draw in draws], device=z.device)
        return (weight * losses.weights(schedule, t, options) * error).mean()

    def _conditioning(self, captions: list[str]) -> Cond:
        return (
            self.host_model.encode(captions) if self.options.network_train_text_encoder else self.captions.of(captions)
        )
