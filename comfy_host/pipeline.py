"""Samples the arms of an audit with ComfyUI's own parts.

An arm's LoRAs act as the guard's unmerged branches on U-Net and text encoder, at any strength, for the time of one
call; W0 is never touched. A LoRA acts whole or the call stops: nobody should measure half of one. Nothing of a model
that another node guards is on while an image is sampled, and no image reaches a preview.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..audit.plan import Arm, Item, Part, Sampling
from ..modular_lora.branches.attachment import Attachment
from ..modular_lora.errors import GuardError
from ..modular_lora.files.images import ImageError, decode, decode_mask
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import (
    GuardedPart,
    GuardLimits,
    ModelInfo,
    SafetyLora,
    TaskLora,
    check_coverage,
    on_each,
)
from ..modular_lora.provenance.attestation import SUM, Run
from ..modular_lora.tensor_hashing import weights_sha256
from ..modular_lora.util.cache import Cache
from . import introspection, trainer_model
from . import patcher as host
from .memory import compute_dtype

KEPT_ARMS = 4  # whose branches stay built
KEPT_PROMPTS = 512  # whose embeddings stay, some 0.2 MB each for SD 1.5 and 0.6 MB for SDXL
STEADY = frozenset((  # samplers that draw no noise of their own: their images can share a batch
    "euler", "euler_cfg_pp", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm", "ipndm_v",
    "deis", "res_multistep", "res_multistep_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "uni_pc",
    "uni_pc_bh2",
))  # fmt: skip
# SD 1 and SDXL checkpoints lack it and read nothing of what it makes: it holds what was in memory
UNREAD = ("clip_l.transformer.text_projection.weight",)
PIXELS = 8  # of a side for one of a latent
PLAIN = {  # remedies of an audit
    "merged": "give the LoRA by name, and connect the checkpoint loader's own",
    "beside": "beside its own weights: connect the checkpoint loader's own",
}
Cond = tuple[Tensor, Mapping[str, Any]]  # 1 tokens channels, and what goes with it (pooled_output: 1 channels)


@dataclass(frozen=True)
class _Built:
    """An arm's branches on both models."""

    unet: GuardedPart
    text: GuardedPart
    encodes_as: Hashable  # equal for arms whose text encoders are the same


@dataclass(frozen=True)
class _Guarded:
    """An arm in which task LoRAs give way: what Guard Model makes of it, with no floor."""

    model: Any  # a guarded ModelPatcher
    clip: Any
    encodes_as: Hashable


class ComfyPipeline:
    """See audit.plan.Pipeline. Raises GuardError for a MODEL or CLIP that is not a checkpoint's own."""

    def __init__(self, model, clip, vae):
        _check(model, clip)
        if getattr(model, "is_dynamic", lambda: False)():
            model = model.clone(disable_dynamic=True)  # 0.33.0 on a GPU: weights that are only paged in
        self._model, self._clip, self._vae = model, clip, vae
        self.base_sha256 = _base_sha256(model, clip, vae)
        self.device, self.dtype = _device_name(model.load_device), str(compute_dtype(model)).removeprefix("torch.")
        self._infos = introspection.model_info(model), introspection.clip_info(clip)
        self._arms: Cache[Hashable, _Built | _Guarded] = Cache(KEPT_ARMS)
        self._prompts: Cache[Hashable, Cond] = Cache(KEPT_PROMPTS)

    def draw(self, arm: Arm, items: Sequence[Item], sampling: Sampling) -> np.ndarray:
        """Images b h w 3, uint8, RGB, in the order of ``items``; equal to the stock nodes' at one item."""
        _check_sampling(sampling)
        images = np.zeros((len(items), sampling.height, sampling.width, 3), np.uint8)
        with torch.inference_mode():  # as ComfyUI's executor runs nodes
            key = arm.parts, arm.combine
            built = self._arms.get(key) or self._arms.put(key, self._build(arm))
            conds = self._encode(built, items)
            for group in _groups(items, conds, sampling.sampler):
                some = [items[i] for i in group]
                latent = self._latent(some, sampling)
                samples = self._sample(built, some, [conds[i] for i in group], latent, sampling)
                images[group] = _pixels(self._vae.decode(samples), sampling)
        return images

    def _build(self, arm: Arm) -> _Built | _Guarded:
        if arm.combine == SUM:
            return _build(arm, self._infos)
        loras = [(part, _lora(part)) for part in arm.parts]
        safety = tuple(SafetyLora(one.lora, part.strength) for part, one in loras if part.role == "safety")
        tasks = tuple(one for part, one in loras if part.role == "task")
        limits = GuardLimits(-math.inf, -math.inf, -math.inf, arm.combine)
        made, clip = host.guard(self._model, self._clip, safety, tasks, False, limits)
        return _Guarded(host.unwrap(made), clip, (arm.combine, *((s.lora.sha256, s.strength) for s in safety)))

    def _encode(self, built: _Built | _Guarded, items: Sequence[Item]) -> list[tuple[Cond, Cond]]:
        """(positive, negative) an item, each prompt alone and once, as CLIPTextEncode does."""
        wanted = dict.fromkeys(text for item in items for text in (item.prompt, item.negative))
        made = {text: cond for text in wanted if (cond := self._prompts.get((built.encodes_as, text))) is not None}
        if new := [text for text in wanted if text not in made]:
            clip = built.clip if isinstance(built, _Guarded) else self._clip
            text_part = None if isinstance(built, _Guarded) else built.text
            with self._acting(self._clip.patcher, self._clip.cond_stage_model, text_part):
                made |= {text: self._prompts.put((built.encodes_as, text), _cond(clip, text)) for text in new}
        return [(made[item.prompt], made[item.negative]) for item in items]

    def _latent(self, items: Sequence[Item], sampling: Sampling) -> Tensor:
        """b c h w: zeros (EmptyLatentImage), or the start images' latents, each encoded alone."""
        if items[0].start:
            starts = [_image(item.start, sampling) for item in items]
            return torch.cat([self._vae.encode(start[None]) for start in starts])
        empty = torch.zeros(len(items), 4, sampling.height // PIXELS, sampling.width // PIXELS)
        return comfy.sample.fix_empty_latent_channels(self._model, empty)

    def _sample(
        self,
        built: _Built | _Guarded,
        items: Sequence[Item],
        conds: list[tuple[Cond, Cond]],
        latent: Tensor,
        by: Sampling,
    ) -> Tensor:
        """Latents of one group: comfy.sample.sample as nodes.common_ksampler calls it."""
        masks = [_image(item.mask, by, mask=True) for item in items if item.mask]
        model, part = (built.model, None) if isinstance(built, _Guarded) else (self._model, built.unet)
        with (
            self._acting(self._model, self._model.model, part),
            torch.random.fork_rng(_devices(self._model)),
        ):  # prepare_noise seeds PyTorch's own generator
            noise = torch.cat([comfy.sample.prepare_noise(latent[:1], item.seed) for item in items])
            return comfy.sample.sample(
                model,
                noise,
                by.steps,
                by.cfg,
                by.sampler,
                by.scheduler,
                _stacked([positive for positive, _ in conds]),
                _stacked([negative for _, negative in conds]),
                latent,
                denoise=items[0].denoise,
                noise_mask=torch.stack(masks) if masks else None,
                callback=_interruptible,
                disable_pbar=True,
                seed=items[0].seed,
            )

    @contextmanager
    def _acting(self, patcher, module: nn.Module, part: GuardedPart | None) -> Iterator[None]:
        """A part's branches on a loaded model; GuardError unless every one of them ran in every evaluation.

        None: a guarded model looks after its own.
        """
        if part is None:
            yield
            return
        comfy.model_management.load_models_gpu([patcher])  # takes off what a guarded clone has on it
        part.branches.to(patcher.load_device, compute_dtype(patcher))
        attachment = Attachment(module, part.branches)
        attachment.attach()  # without LoRAs too: nobody else's branches act on the base's images
        try:
            run = Run(part.branches)
            yield
            run.finish(may_be_empty=False)
            attachment.verify()
        finally:
            attachment.detach()


def _check(model, clip) -> None:
    """GuardError for what the pipeline's ``base_sha256`` would not describe."""
    host._check_types(model, clip, "Audit")
    if clip is None:
        raise GuardError("The audit got no CLIP: connect the checkpoint's CLIP.", code="audit.no-clip")
    if isinstance(model, host.GuardMixin) or isinstance(clip, host.GuardedClipMixin):
        raise GuardError(
            "The MODEL or CLIP is guarded, and an audit draws W0 too: connect the checkpoint loader's own.",
            code="audit.guarded-model",
        )
    host._check_incoming(model, False, "The MODEL", **PLAIN)
    host._check_incoming(clip.patcher, False, "The CLIP", **PLAIN)
    trainer_model.check_pair(model, clip, "Audit")
    options = {name for name, value in model.model_options.items() if value}
    if options or model.object_patches or clip.layer_idx is not None:
        what = ", ".join(sorted(options | set(model.object_patches))) or "another CLIP layer"
        raise GuardError(
            f"The MODEL or CLIP was changed by a node after it was loaded ({what}), which the record of an audit could "
            "not tell from the checkpoint: connect the checkpoint loader's own.",
            code="audit.changed-model",
        )


def _base_sha256(model, clip, vae) -> str:
    """SHA-256 over those of the three models that decide the pixels, W0's as attestations have it first."""
    comfy.model_management.load_models_gpu([clip.patcher])  # takes out what another clone's LoRAs merged
    text = ((name, w) for name, w in clip.cond_stage_model.state_dict().items() if name not in UNREAD)
    digests = introspection.model_sha256(model), weights_sha256(text), introspection.vae_sha256(vae)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _check_sampling(sampling: Sampling) -> None:
    """GuardError where ComfyUI would quietly take something else (KSampler.__init__)."""
    known = comfy.samplers.KSampler
    for name, what, names in (
        (sampling.sampler, "Sampler", known.SAMPLERS),
        (sampling.scheduler, "Scheduler", known.SCHEDULERS),
    ):
        if name not in names:
            raise GuardError(
                f"{what} {name!r} is not one of this ComfyUI: choose of {', '.join(names)}.", code="audit.sampling"
            )
    for side in (sampling.width, sampling.height):
        if side <= 0 or side % PIXELS:
            raise GuardError(
                f"Images of {sampling.width}×{sampling.height}: give multiples of {PIXELS}.", code="audit.sampling"
            )
    if sampling.steps < 1:
        raise GuardError(f"{sampling.steps} steps: give 1 or more.", code="audit.sampling")


def _build(arm: Arm, infos: tuple[ModelInfo, ModelInfo]) -> _Built:
    """Branches of an arm, safety LoRAs first as the guard fuses them; GuardError where a LoRA does not apply whole."""
    ordered = sorted(arm.parts, key=lambda part: part.role != "safety")
    loras = tuple(_lora(part) for part in ordered)
    unet, text = parts = on_each(*infos, (), loras, GuardLimits(), enforce=False)
    check_coverage(parts, True)
    for line in (line for part in parts for line in part.lines):
        if idle := (*line.unmatched, *(name for name, _ in line.left)):
            raise GuardError(
                f"{line.name}: {len(idle)} of its layers fit nothing in this base, first {idle[0]!r}; "
                "an audit measures whole LoRAs only: use a LoRA made for this base.",
                code="audit.not-whole",
            )
    encodes_as = tuple((line.sha256, line.strength) for line in text.lines if line.matched)
    return _Built(unet, text, encodes_as)


def _cond(clip, text: str) -> Cond:
    cross, extra = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    return cross, extra


def _lora(part: Part) -> TaskLora:
    """A LoRA of either role as the guard's class that takes any strength; a safety LoRA must be without dead layers."""
    lora = read_lora(Path(part.path), expected_sha256=part.sha256, scale=part.scale)
    if part.role == "safety" and lora.zero_layers:
        raise GuardError(
            f"Safety LoRA {lora.name}: layer {lora.zero_layers[0]} ({len(lora.zero_layers)} in all) is all zero and "
            "would do nothing; train or export the file again.",
            code="lora.zero-layer",
        )
    return TaskLora(lora, part.strength, part.strength)


def _groups(items: Sequence[Item], conds: Sequence[tuple[Cond, Cond]], sampler: str) -> list[list[int]]:
    """Indices of the items that are drawn in one batch, in the order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for i, (item, pair) in enumerate(zip(items, conds, strict=True)):
        if item.mask and not item.start:
            raise GuardError(
                f"Item {item.prompt[:60]!r} has a mask and no start image: inpainting needs both.", code="audit.item"
            )
        if not 0 < item.denoise <= 1:
            raise GuardError(
                f"Item {item.prompt[:60]!r} has denoise {item.denoise}: give more than 0, at most 1.", code="audit.item"
            )
        plain = all(_plain(extra) for _, extra in pair)
        alone = () if plain and sampler in STEADY else (i,)
        lengths = tuple(cross.shape[1] for cross, _ in pair)
        groups.setdefault((lengths, item.denoise, bool(item.start), bool(item.mask), alone), []).append(i)
    return list(groups.values())


def _plain(extra: Mapping[str, Any]) -> bool:
    """Whether a conditioning holds nothing but what can be stacked."""
    return all(value is None or (name == "pooled_output" and value.shape[0] == 1) for name, value in extra.items())


def _stacked(conds: Sequence[Cond]) -> list[list]:
    """CONDITIONING with one row an image; one image's as it is."""
    cross, extra = conds[0]
    if len(conds) == 1:
        return [[cross, dict(extra)]]
    pooled = None if extra.get("pooled_output") is None else torch.cat([e["pooled_output"] for _, e in conds])
    return [[torch.cat([c for c, _ in conds]), {"pooled_output": pooled}]]


def _image(path: str, sampling: Sampling, mask: bool = False) -> Tensor:
    """h w 3 or, of a mask, h w; float32 0..1; another size is scaled and cut to the sampling's."""
    size = sampling.width, sampling.height
    try:
        data = Path(path).read_bytes()
        image = decode_mask(data).image if mask else decode(data).image
    except (OSError, ImageError) as error:
        raise GuardError(
            f"{path}: cannot be read as an image ({error}); give a PNG or JPEG file.", code="audit.image-unreadable"
        ) from error
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255)


def _pixels(images: Tensor, sampling: Sampling) -> np.ndarray:
    """b h w 3 of 0..1 as uint8, rounded as Save Image rounds."""
    if images.shape[1:] != (sampling.height, sampling.width, 3):
        raise GuardError(
            f"The VAE gives {tuple(images.shape[1:])} for images of {sampling.width}×{sampling.height}: an audit "
            f"draws with models of still images whose latents stand for {PIXELS} pixels each.",
            code="audit.vae",
        )
    return np.clip(255.0 * images.cpu().numpy(), 0, 255).astype(np.uint8)


def _interruptible(*_) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _devices(patcher) -> list[int]:
    return [patcher.load_device.index or 0] if patcher.load_device.type == "cuda" else []


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {name}"


def device() -> torch.device:
    """Where ComfyUI draws in this process."""
    return comfy.model_management.get_torch_device()


def load(checkpoint: Path) -> tuple:
    """(MODEL, CLIP, VAE) of a file in ComfyUI's own precision."""
    return trainer_model.load_checkpoint(checkpoint, None, None)


def unload() -> None:
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
