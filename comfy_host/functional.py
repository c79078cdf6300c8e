"""Functional strength (modular_lora/guard/functional.py) of a MODEL and CLIP with LoRAs, on small latents.

A bare clone of the MODEL is evaluated: nothing that a node put on the model or its options acts or can choose what is
measured. Noise and noise levels are fixed. Predictions are cached by the hash of the base and of the LoRAs that acted,
so a swap of the task LoRA costs two arms of four, and a combination that was measured before costs nothing.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ..modular_lora.branches.attachment import ALL_ROLES, Attachment
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import functional
from ..modular_lora.guard.build import GuardedPart, GuardLimits, Safety, Tasks, on_each
from ..modular_lora.guard.functional import Arm, Functional, Request
from ..modular_lora.util.cache import Cache
from .introspection import clip_info, model_info
from .memory import compute_dtype
from .run import forget

LEVELS = (0.3, 0.6)  # shares of the schedule, 0 being pure noise
SIDE = 16  # of the latent; that many numbers where it has one dimension, one frame where it has three
SEED = 0x5AFE
LIMIT = 64 * 2**20  # bytes of predictions
BROKEN = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)

measuring: ContextVar[nn.Module | None] = ContextVar("measuring", default=None)  # the model; nothing of it leaves
_known: Cache[Hashable, Tensor] = Cache(LIMIT, lambda rows: rows.nbytes)
_tokens: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # loaded module -> what stands for it in keys


class _CannotEvaluateError(GuardError):
    """The base by itself gives no prediction for a prompt and a small latent."""

    code = "functional.no-prediction"


def measured(model, clip, parts: Sequence[GuardedPart], safety: Safety, tasks: Tasks, base_sha256: str) -> Functional:
    """The functional strength of every safety LoRA in a guard that was just built, or why there is none.

    ``parts``: what `build_parts` made of ``model`` and, where there is one, ``clip``. Raises LoraFileError for
    malformed concept prompts and GuardError where a prediction is not finite.
    """
    files = [s.lora for s in safety]
    if clip is None:
        return functional.unmeasured(files, "no CLIP is connected to the guard")
    if any(part.branches.wide for part in parts):
        return functional.unmeasured(files, "a LoRA gives the model inputs that a prompt does not fill")
    evaluator = _Evaluator(model, clip, parts, safety, tasks, base_sha256)
    try:
        found = functional.measure(files, [t.lora for t in tasks], evaluator)
    except _CannotEvaluateError as error:
        return functional.unmeasured(files, str(error))
    return Functional(found.figures, found.unmeasured, evaluator.rows, evaluator.seconds)


class _Evaluator:
    """See functional.Evaluate."""

    def __init__(self, model, clip, parts: Sequence[GuardedPart], safety: Safety, tasks: Tasks, base_sha256: str):
        self._model, self._clip = _bare(model), _bare_clip(clip)
        self._parts, self._safety, self._tasks = tuple(parts), safety, tasks
        # merged LoRAs are no part of W0's hash
        merged = [patcher.patches_uuid for patcher in (model, clip.patcher) if patcher.patches]
        self._base = (base_sha256, _token(clip.cond_stage_model), *merged)
        self._encoded: dict[Hashable, list] = {}
        self.rows, self.seconds = 0, 0.0

    def __call__(self, requests: Sequence[Request]) -> list[Tensor]:
        keys = {request: self._key(request) for request in requests}
        found = {request: rows for request, key in keys.items() if (rows := _known.get(key)) is not None}
        if missing := sorted((r for r in keys if r not in found), key=lambda request: len(request[0])):
            start = time.monotonic()
            with torch.inference_mode(), torch.random.fork_rng(_devices(self._model)):
                found |= {request: _known.put(keys[request], rows) for request, rows in self._evaluated(missing)}
            self.seconds = time.monotonic() - start
        return [found[request] for request in requests]

    def _key(self, request: Request) -> Hashable:
        """All that a prediction depends on."""
        arm, prompts = request
        loras = [(s.lora.sha256, s.lora.acts_as, s.strength, s.strength, "") for s in self._safety]
        loras += [
            (t.lora.sha256, t.lora.acts_as, t.strength_model, t.strength_clip, t.block_weights) for t in self._tasks
        ]
        acting = Counter(entry for entry in loras if entry[0] in arm)  # one file may have been loaded twice
        return self._base, frozenset(acting.items()), prompts

    def _evaluated(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Tensor]]:
        """Every request's rows; all texts first, so that text encoder and network need not be loaded in turn."""
        arms = dict.fromkeys(arm for arm, _ in requests)
        made = {arm: self._built(arm) for arm in arms}
        conds = {}
        for arm, prompts in requests:
            with _base_alone(arm):
                conds[arm, prompts] = self._conds(arm, made[arm], prompts)
        try:
            for arm, prompts in requests:
                comfy.model_management.throw_exception_if_processing_interrupted()
                with _base_alone(arm):
                    yield (arm, prompts), self._predict(made[arm], conds[arm, prompts])
        finally:
            for part in {id(part): part for parts, _ in made.values() for part in parts}.values():
                part.branches.free()  # what single roles took beside what a run needs

    def _built(self, arm: Arm) -> tuple[tuple[GuardedPart, ...], frozenset[str]]:
        """The parts and the roles in them that are this arm; only one safety LoRA of several needs parts of its own."""
        safety, tasks = (frozenset(item.lora.sha256 for item in items) for items in (self._safety, self._tasks))
        none: Arm = frozenset()
        roles = {tasks: frozenset(("task",)), safety: frozenset(("safety",)), safety | tasks: ALL_ROLES, none: none}
        if arm in roles:
            return self._parts, roles[arm]
        some = tuple(item for item in self._safety if item.lora.sha256 in arm)
        others = tuple(item for item in self._tasks if item.lora.sha256 in arm)
        infos = model_info(self._model), clip_info(self._clip)
        return on_each(*infos, some, others, GuardLimits(), enforce=False), ALL_ROLES

    def _conds(self, arm: Arm, built: tuple, prompts: tuple[str, ...]) -> list:
        """CONDITIONING of each prompt as CLIPTextEncode makes it, by the text encoder that this arm has."""
        parts, roles = built
        text = parts[1] if len(parts) > 1 and parts[1].branches.layers else None
        key = (prompts, arm if text else None)
        if key not in self._encoded:
            clip = self._clip
            comfy.model_management.load_models_gpu([clip.patcher])
            with _acting(clip.patcher, clip.cond_stage_model, text, roles):
                encode = clip.encode_from_tokens_scheduled
                self._encoded[key] = [encode(clip.tokenize(prompt))[0] for prompt in prompts]
        return self._encoded[key]

    def _predict(self, built: tuple, conds: list) -> Tensor:
        """The network's predictions, prompts levels c ..., float32 on the CPU.

        What CFGGuider does for one step, without guidance (comfy.samplers.process_conds and calc_cond_batch).
        """
        parts, roles = built
        patcher, device = self._model, self._model.load_device
        noise = _noise(patcher).to(device)
        entries = {"positive": comfy.sampler_helpers.convert_cond(conds)}
        options: dict[str, dict] = {"transformer_options": {}}
        network, entries, _ = comfy.sampler_helpers.prepare_sampling(patcher, noise.shape, entries, options)
        sampling = network.model_sampling
        sigmas = torch.tensor([float(sampling.percent_to_sigma(level)) for level in LEVELS], device=device)
        empty = torch.zeros_like(noise)
        with _acting(patcher, network, parts[0], roles):
            patcher.pre_run()
            token = measuring.set(network)
            try:
                forget(network)
                known = {"latent_image": empty, "seed": SEED, "latent_shapes": [noise.shape]}
                entries = comfy.samplers.process_conds(network, noise, entries, device, **known)["positive"]
                x = sampling.noise_scaling(sigmas, noise.clone(), empty)
                each = comfy.samplers.calc_cond_batch(network, [[entry] for entry in entries], x, sigmas, options)
            finally:
                measuring.reset(token)
                forget(network)
                patcher.cleanup()
        self.rows += len(each) * len(LEVELS)
        return torch.stack([_raw(sampling, sigmas, x, denoised) for denoised in each]).float().cpu()


def _bare(patcher):
    """A clone of a ModelPatcher without anything that nodes put on it beside merged weights."""
    bare = patcher.clone()
    bare.model_options = {"transformer_options": {}}
    bare.object_patches, bare.wrappers, bare.callbacks = {}, {}, {}
    bare.attachments, bare.additional_models = {}, {}
    bare.forced_hooks = None
    return bare


def _bare_clip(clip):
    """The same of a CLIP: its last layer, whatever CLIPSetLastLayer says."""
    bare = clip.clone()
    bare.patcher = _bare(bare.patcher)
    bare.layer_idx, bare.apply_hooks_to_conds, bare.use_clip_schedule, bare.tokenizer_options = None, None, False, {}
    return bare


@contextmanager
def _acting(patcher, module: nn.Module, part: GuardedPart | None, roles: frozenset[str]) -> Iterator[None]:
    """These roles of a part on a loaded model, nobody else's; none at all where ``part`` is None."""
    if part is None:
        yield
        return
    branches = part.branches
    attachment = Attachment(module, branches)
    with branches.only(*roles):
        branches.to(patcher.load_device, compute_dtype(patcher))
        attachment.attach()
        try:
            yield
            attachment.verify()
        finally:
            attachment.detach()


@contextmanager
def _base_alone(arm: Arm) -> Iterator[None]:
    """What goes wrong without any LoRA is the model's own: it says why nothing is measured, and stops nothing."""
    try:
        yield
    except (GuardError, comfy.model_management.OOM_EXCEPTION):
        raise
    except BROKEN as error:
        if arm:
            raise
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise _CannotEvaluateError(f"the base gives no prediction for a text and a small latent ({said})") from error


def _noise(patcher) -> Tensor:
    """The same for every model of a latent's shape: levels c [1] [side] side."""
    form = patcher.model.latent_format
    dimensions = getattr(form, "latent_dimensions", 2)
    shape = {1: (SIDE,), 2: (SIDE, SIDE), 3: (1, SIDE, SIDE)}[dimensions]
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(len(LEVELS), form.latent_channels, *shape, generator=generator)


def _raw(sampling, sigmas: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
    """What the network itself said: calculate_denoised is affine in it, for every model_sampling."""
    none = sampling.calculate_denoised(sigmas, torch.zeros_like(x), x)
    one = sampling.calculate_denoised(sigmas, torch.ones_like(x), x)
    return (denoised - none) / (one - none)


def _token(module: nn.Module) -> object:
    """Stands for a loaded module, and for no other after it."""
    return _tokens.setdefault(module, object())


def _devices(patcher) -> list[int]:
    return [patcher.load_device.index or 0] if patcher.load_device.type == "cuda" else []
