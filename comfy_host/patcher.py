"""Guarded MODEL and CLIP: ComfyUI's own ModelPatcher and CLIP with a mixin in front of their classes.

The branches sit on the layers while the model is loaded (``inject_model``/``eject_model``) and are checked and counted
between ``pre_run`` and ``cleanup``, which every guider calls around a run. What would merge, save or drop them raises
GuardError. It guards against graphs and accidents, not against arbitrary Python in another pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import torch

from ..modular_lora.branches.attachment import ALL_ROLES, Attachment
from ..modular_lora.errors import GuardError, HandleError, shown
from ..modular_lora.guard import activity, safety_first
from ..modular_lora.guard.build import (
    GuardedPart,
    GuardLimits,
    Safety,
    Tasks,
    build_parts,
    make_record,
    notes,
    text_digest,
)
from ..modular_lora.guard.functional import check
from ..modular_lora.guard.report import format_functional, format_guard, format_memory
from ..modular_lora.guard.summary import guard_summary
from ..modular_lora.provenance import attestation as attest
from ..modular_lora.provenance import edits, ledger
from ..modular_lora.provenance.attestation import SAFETY_FIRST, Attestation
from ..modular_lora.tensor_hashing import tensor_sha256
from ..version import VERSION
from . import guard_cache, pending, running
from .control_inputs import widen
from .functional import measured
from .guarded_run import GuardedRun
from .image_values import ENCODED, pictures
from .introspection import clip_info, family, is_current, model_info, model_sha256
from .measurement import level, measured_eagerly, prompt_of
from .memory import MemoryMixin, compute_dtype
from .run import GenerateMixin, KeptMixin, given_out, streams, watch
from .safety_first import at_their_shares, found_first

PACK = f"modular-lora-guard {VERSION}"
KEY = "modular_lora"
SKIPPING_WRAPPERS = ("easycache", "lazycache")  # wrapper keys of core nodes that skip evaluations
OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
SAMPLER_SAMPLE = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE


@dataclass(frozen=True)
class GuardState:
    """What a guarded model and all its clones share."""

    part: GuardedPart
    record: Attestation  # the run's attestation, counts still empty
    patches: frozenset[str]  # weights that a merged LoRA may change ("accept merged"), else empty
    text_digest: str  # digest of the safety LoRAs' text-encoder half; "" where they have none


class GuardedModel:
    """What a GUARDED_MODEL socket carries: opaque, so that a detour into a MODEL input fails with a clear error."""

    __slots__ = ("_patcher", "report", "summary")

    def __init__(self, patcher, report: str, summary: str):
        self._patcher, self.report, self.summary = patcher, report, summary

    def __deepcopy__(self, memo):
        return self  # a switch that copies its inputs must not copy the model

    def __getattr__(self, name: str):
        raise HandleError(
            f"A guarded model has no {name!r}: it was wired into a node made for MODEL; sample it with a Guarded "
            "KSampler or Guarded Guider, or make it a MODEL with Guarded Model as MODEL."
        )


def unwrap(value: object):
    """A fresh clone of the guarded patcher in a GUARDED_MODEL or in a MODEL that is guarded; GuardError otherwise."""
    patcher = value._patcher if isinstance(value, GuardedModel) else value
    if not isinstance(patcher, GuardMixin):
        raise GuardError(
            f"The model ({type(value).__name__}) is not guarded, or a node on the way dropped the guard: connect the "
            "output of Guard or Guard Model.",
            code="model.not-guarded",
        )
    return patcher.clone()


def _refused(name: str, what: str, remedy: str) -> Callable:
    def refuse(self, *args, **kwargs):
        raise GuardError(
            f"A guarded model cannot {what} ({name}): its LoRAs stay out of the weights; {remedy}.",
            code="model.refused",
        )

    return refuse


_LORA = "use Load Task LoRA instead of that node"  # before Guard Model it is refused as well
_BEFORE = "do this before Guard Model"
_BASE = "connect the unguarded checkpoint to that node instead"
_BESIDE = "beside the guard: remove that node, or use Load Task LoRA"


class GuardMixin(KeptMixin, MemoryMixin):
    """In front of a ModelPatcher's class: attaches, checks and counts the branches; refuses what would lose them."""

    guard_state: GuardState
    guard_attachment: Attachment
    guard_run: GuardedRun | None  # the latest; clones have runs of their own
    is_injected: bool  # ModelPatcher's: whether the branches are on the layers
    guard_beside = _BESIDE  # remedy for what a node put beside the guard
    branches = property(lambda self: self.guard_state.part.branches)

    add_patches = _refused("add_patches", "take a LoRA or a merge into its weights", _LORA)
    get_key_patches = _refused("get_key_patches", "be merged into another model", _BASE)
    model_state_dict = _refused("model_state_dict", "give its weights away", _BASE)
    state_dict_for_saving = _refused("state_dict_for_saving", "be saved as a checkpoint", _BASE)  # 0.33.0
    model_state_dict_for_saving = _refused("model_state_dict_for_saving", "be saved", _BASE)  # 0.33.0, text encoders
    add_hook_patches = _refused("add_hook_patches", "take a LoRA hook", _LORA)
    set_injections = _refused("set_injections", "take another loader's injections", _LORA)
    add_weight_wrapper = _refused("add_weight_wrapper", "take a weight wrapper", _LORA)

    def clone(self, *args, **kwargs):
        """A guarded clone; ComfyUI may make it of another class (0.33.0, disable_dynamic), so it is wrapped again."""
        self.guard_cloning = True
        try:
            clone = super().clone(*args, **kwargs)
        finally:
            del self.guard_cloning
        self.guard_on(clone)
        clone.size = self.size  # what it was made with has the branches in it
        clone.parent = self.parent  # the unguarded model: LoadedModel follows one dead clone's parent, not a chain
        return clone

    def guard_on(self, clone) -> None:
        """Put the same guard on a fresh clone."""
        _wrap(clone, self.guard_state)

    def guard_record(self, conds: dict[str, list[dict]]) -> Attestation:
        """The attestation of a run with these conditionings, its counts still empty."""
        return self.guard_state.record

    def guard_acted(self, record: Attestation) -> Attestation:
        """The same after the run, with what acted in parts of it alone."""
        return record

    def guard_ended(self, result: Attestation) -> None:
        """A run has ended well."""

    def add_object_patch(self, name, obj):
        if name.startswith("diffusion_model"):
            raise GuardError(
                f"A guarded model cannot take a replaced {name}: its branches would be lost: remove that node.",
                code="model.replaced",
            )
        super().add_object_patch(name, obj)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False, **kwargs):
        if force_patch_weights:  # what 0.3.75 asks for just before it saves a model
            raise GuardError(
                f"A guarded model cannot be saved or extracted: LoRAs stay out of the weights; {_BASE}.",
                code="model.refused",
            )
        return super().partially_load(device_to, extra_memory, force_patch_weights=False, **kwargs)

    def inject_model(self):
        if self.is_injected or self.skip_injection:
            return
        super().inject_model()
        self.guard_attachment.attach()
        self.is_injected = True

    def eject_model(self):
        if self.is_injected:
            self.guard_attachment.detach()
        super().eject_model()

    def pre_run(self):
        if self.guard_run is None or not self.guard_run.can_start:
            raise GuardError(
                "This sampler left out the guard's own check, or samples a second model beside the guarded one: sample "
                "one guarded model with a node that uses a guider.",
                code="run.unchecked",
            )
        self.guard_begin(self.guard_run)
        super().pre_run()
        if self.guard_state.text_digest:
            watch(self.model, lambda entry: _check_conditioning({"extra": [entry]}, self.guard_state))

    def cleanup(self):
        if self.guard_run is not None:
            self.guard_run.stop()  # first: ModelPatcher.cleanup takes the branches off and puts them back
        super().cleanup()

    def guard_begin(self, run: GuardedRun | None = None) -> GuardedRun:
        """Verify that nothing was put beside the guard, attach the branches, start a run. Raises GuardError."""
        self.guard_run = run = run or GuardedRun(self.guard_attachment)
        run.can_start = False
        _check_clean(self, self.guard_state.patches, "The guarded model", self.guard_beside)
        self.guard_attachment.attach()
        self.guard_attachment.verify()
        self.branches.to(self.load_device, compute_dtype(self))
        run.start()
        return run


def guarded_class(base: type, mixin: type) -> type:
    """The class of a guarded MODEL, CLIP or VAE: ComfyUI's own, or another pack's, with a mixin in front."""
    return _guarded_class(base, mixin)


@cache
def _guarded_class(base: type, mixin: type) -> type:
    return type(f"Guarded{base.__name__}", (mixin, base), {})


def _wrap(patcher, state: GuardState):
    """Put the guard in front of a patcher that nobody else holds (a fresh clone)."""
    patcher.guard_state, patcher.guard_attachment = state, Attachment(patcher.model, state.part.branches)
    return dress(patcher, GuardMixin)


def dress(patcher, mixin: type[GuardMixin]):
    """The class and the wrappers of a guarded patcher."""
    if not isinstance(patcher, GuardMixin):
        patcher.__class__ = guarded_class(type(patcher), mixin)
    patcher.guard_run = None
    patcher.is_injected = False  # ModelPatcher.clone copies the flag, and a clone's __del__ would eject for the owner
    if not patcher.get_wrappers(OUTER_SAMPLE, KEY):
        patcher.add_wrapper_with_key(OUTER_SAMPLE, KEY, _outer_sample)
        patcher.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, found_first)
        patcher.add_wrapper_with_key(APPLY_MODEL, KEY, at_their_shares)
        patcher.add_wrapper_with_key(APPLY_MODEL, KEY, measured_eagerly)
    return patcher


def _outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
    """Around every run of a guarded model, whichever node samples it (wrapper OUTER_SAMPLE)."""
    patcher = executor.class_obj.model_patcher
    if not isinstance(patcher, GuardMixin):
        raise GuardError(
            "A node on the way took the guard off this model: remove it; sample what the guard gives.",
            code="model.guard-taken-off",
        )
    state = patcher.guard_state
    hashes = _check_conditioning(executor.class_obj.conds, state)
    record = patcher.guard_record(executor.class_obj.conds)
    weighted = _weighted(executor.class_obj.conds)
    if not running.shows_previews():
        _silence_previews(callback)
    kept = _Denoised(callback)
    run = patcher.guard_run = GuardedRun(
        patcher.guard_attachment,
        steps=max(1, sigmas.shape[-1] - 1),
        images=len(noise),
        content=tensor_sha256(noise).encode(),
        may_be_empty=sigmas.shape[-1] <= 1,
        prompt=prompt_of(executor.class_obj.conds),
        level=level(patcher.model, sigmas[0]) if len(sigmas) else None,
    )
    inside = running.inside.get()
    start = inside.start(record) if inside else edits.start(streams(latent_image, **kwargs), denoise_mask, record)
    if edits.pictured(streams(noise, **kwargs), pictures(executor.class_obj.conds), record):
        start = start._replace(outside=True)
    executor.original = run.around(executor.original)
    output = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback and kept, *args, **kwargs)
    run.result, complete = _attested(patcher.guard_acted(record), state.part, run, hashes, start)
    run.result = run.result.of(weighted=weighted)
    if complete:
        each = activity.of_run(record, (lora for lora, _ in state.part.interference), run.acted, run.level)
        run.result = run.result.of(activity=activity.most(each))
        for made in (streams(output, **kwargs), kept.latents(patcher.model, **kwargs)):
            ledger.attest_latents(made, run.result, run.acted, each, run.shares or ())
        if inside:
            inside.ran.append(run.result)
    patcher.guard_ended(run.result)
    return output


class _Denoised:
    """Around a sampler's callback: keeps the last x0, which SamplerCustomAdvanced and its like give out as well."""

    def __init__(self, callback: Callable | None):
        self._callback = callback
        self._x0: torch.Tensor | None = None

    def __call__(self, step, x0, *args, **kwargs):
        self._x0 = x0
        return self._callback and self._callback(step, x0, *args, **kwargs)

    def latents(self, model, **kwargs) -> Iterator[torch.Tensor]:
        """The last x0 as those nodes give it out (SamplerCustomAdvanced.execute), latent by latent."""
        if self._x0 is not None:
            yield from given_out(model, self._x0.cpu(), **kwargs)


def _attested(
    record: Attestation, part: GuardedPart, run: GuardedRun, embeddings_sha256: tuple[str, ...], start: edits.Start
) -> tuple[Attestation, bool]:
    """The attestation of a run that has ended, and whether its latents may have it."""
    evaluations, calls, idle = run.counts or (0, 0, 0)
    complete = evaluations > 0 and part.branches.roles == ALL_ROLES  # an audit's partial pass attests nothing
    status = attest.guarded_status(record.base_had_merged_loras, start.outside) if complete else "not sampled"
    result = record.of(
        status=status,
        embeddings_sha256=embeddings_sha256,
        evaluations=evaluations,
        firings=calls,
        idle_layers=idle,
        acted_strength={sha256: one.least for (_, sha256), one in run.acted.items()},
        acted_share={sha256: one.share for (_, sha256), one in run.acted.items()},
        measured_evaluations=run.measured,
        task_share=min(run.shares) if run.shares and complete else None,
        muted_evaluations=run.muted,
    )
    return result.edited(start.edits if complete else ()), complete


def _silence_previews(callback: Callable | None) -> None:
    """No image before the gate: empties latent_preview.prepare_callback's previewer."""
    names = getattr(getattr(callback, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(callback, "__closure__", None) or (), strict=False):
        if name == "previewer":
            cell.cell_contents = None
        elif name == "packed_callback":  # 0.33.0 puts it around the callback where there are several latents
            _silence_previews(cell.cell_contents)


def _check_conditioning(conds: dict[str, list[dict]], state: GuardState) -> tuple[str, ...]:
    """Hashes of the embeddings; GuardError where the guarded text encoder is needed and did not make one of them."""
    hashes = []
    for name, entries in conds.items():
        for entry in entries:
            if (cross := entry.get("cross_attn")) is not None:
                hashes.append(tensor_sha256(cross))
            for tensor in encoded(entry) if state.text_digest else ():
                if not ledger.was_made_under(tensor, state.text_digest):
                    raise GuardError(
                        f"The {name} conditioning was not made by the guarded CLIP alone, as far as can be told, and "
                        "the safety LoRA has a text-encoder half: encode every prompt with the guard's CLIP output; a "
                        "node that weights or mixes embeddings may stay where it is given that CLIP, or conditionings "
                        "of that CLIP, and no other, and encodes with all of it.",
                        code="conditioning.not-guarded",
                    )
    return tuple(hashes)


def _weighted(conds: dict[str, list[dict]]) -> tuple[str, ...]:
    """Types of the nodes that weighted or mixed embeddings of these conditionings."""
    if not len(ledger.weighted):
        return ()
    tensors = (tensor for entries in conds.values() for entry in entries for tensor in encoded(entry))
    return tuple(dict.fromkeys(name for tensor in tensors for name in ledger.weighted_by(tensor)))


def encoded(entry: dict) -> Iterator[torch.Tensor]:
    """What text encoders made of a conditioning, GLIGEN's phrases too."""
    for value in map(entry.get, ENCODED):
        if isinstance(value, torch.Tensor) and value.is_floating_point():  # ACE-Step's lyrics are token numbers
            yield value
    for phrase, *_ in entry["gligen"][2] if "gligen" in entry else ():  # ("position", model, [(embedding, box), ...])
        yield phrase


class GuardedClipMixin(GenerateMixin):
    """In front of ComfyUI's CLIP: encodes with the branches on, counts them, and remembers what it made."""

    @property
    def text_digest(self) -> str:
        """Digest of the safety LoRAs' text-encoder half; "" where they have none."""
        return self.patcher.guard_state.text_digest

    def clone(self, *args, **kwargs):
        return _wrap_clip(super().clone(*args, **kwargs), self.patcher.guard_state)

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        self.load_model(tokens)
        with self.patcher.guard_begin():
            result = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        made = result.values() if return_dict else result if isinstance(result, tuple) else (result,)
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                ledger.remember_embedding(tensor, self.patcher.guard_state.text_digest)
        return result

    def encode_from_tokens_scheduled(self, *args, **kwargs):
        if self.patcher.forced_hooks is not None:
            raise GuardError(
                "A guarded CLIP cannot encode under hooks (Set CLIP Hooks): remove the hooks.", code="model.hooks"
            )
        return super().encode_from_tokens_scheduled(*args, **kwargs)

    get_sd = _refused("get_sd", "be saved", _BASE)
    load_sd = _refused("load_sd", "take other weights", _BEFORE)


def _wrap_clip(clip, state: GuardState):
    if not isinstance(clip, GuardedClipMixin):
        clip.__class__ = guarded_class(type(clip), GuardedClipMixin)
    clip.patcher = _wrap(clip.patcher, state)
    return clip


def guard(model, clip, safety: Safety, tasks: Tasks, accept_merged: bool, policy: GuardLimits):
    """(GuardedModel, guarded CLIP or the CLIP as it came) for a MODEL and an optional CLIP; GuardError if it cannot."""
    _check_types(model, clip)
    for patcher, what in ((model, "The MODEL"), (clip.patcher if clip else None, "The CLIP")):
        if patcher is not None:
            _check_incoming(patcher, accept_merged, what)
    before, text = pending.of(model), pending.of(clip and clip.patcher)
    tasks = (*tasks, *pending.tasks(before, text))
    tasks = safety_first.without_text(tasks) if policy.combine == SAFETY_FIRST else tasks
    model = model.clone()
    pending.leave(model, before)
    if clip:
        clip = clip.clone()
        pending.leave(clip.patcher, text)
    key = guard_cache.key(model, clip, safety, tasks, policy)
    merged = len(before.rest) + len(text.rest)
    built = guard_cache.guards.get(key) or guard_cache.guards.put(
        key, _build(model, clip, safety, tasks, policy, merged)
    )
    state = GuardState(built.model, built.record, frozenset(before.rest), built.text_digest)
    guarded = _wrap(model, state)
    widen(guarded, state.part.branches)
    if built.text:
        clip = _wrap_clip(clip, replace(state, part=built.text, patches=frozenset(text.rest)))
    patchers = (guarded, clip.patcher) if built.text else (guarded,)
    size = sum(patcher.branches.size(compute_dtype(patcher)) for patcher in patchers)
    memory = format_memory(size, len(guard_cache.guards), guard_cache.guards.size)
    return GuardedModel(guarded, f"{built.report}\n{memory}", built.summary), clip


def _build(model, clip, safety: Safety, tasks: Tasks, policy: GuardLimits, merged: int) -> guard_cache.Built:
    parts = _parts(model, clip, safety, tasks, policy)
    text = parts[1] if clip and parts[1].layers else None
    record = make_record(PACK, family(model), model_sha256(model), bool(merged), (parts[0], text), safety, tasks)
    if policy.combine == SAFETY_FIRST:
        record = record.of(combine=policy.combine)
        safety_first.calibrations(record, [s.lora for s in safety])
    remarks = list(notes(safety, tasks, record.base_sha256, merged, clip is not None, policy.combine))
    report = format_guard(record.base_family, record.base_sha256, parts, remarks)
    functional = measured(model, clip, parts, safety, tasks, record.base_sha256)
    check(functional, {s.lora.sha256: s.lora.name for s in safety}, policy.functional_strength_floor)
    record = record.of(functional_strength=functional.strengths, functional_not_measured=functional.unmeasured)
    report += "\n" + format_functional(functional, record)
    return guard_cache.Built(parts[0], text, record, text_digest(safety), report, guard_summary(parts, remarks))


def _parts(model, clip, safety: Safety, tasks: Tasks, policy: GuardLimits) -> tuple[GuardedPart, ...]:
    """Reuse the cached layer layout while every layer of it is still valid, otherwise read it from the model."""
    build = lambda **known: build_parts(  # noqa: E731
        model_info(model, **known), clip_info(clip, **known) if clip else None, safety, tasks, policy
    )
    try:
        parts = build(remembered=True)
        modules = (model.model, clip and clip.cond_stage_model)
        specs = ([layer.spec for layer in part.branches.layers.values()] for part in parts)
        if all(is_current(module, found) for module, found in zip(modules, specs, strict=False)):
            return parts
    except (GuardError, AttributeError):
        pass  # the error is raised again below, of the model as it is now
    return build()


def _check_types(model, clip, node: str = "Guard Model") -> None:
    """Any-type nodes can bring anything to a socket."""
    kinds = (model, comfy.model_patcher.ModelPatcher, "MODEL"), (clip, comfy.sd.CLIP | None, "CLIP")
    for got, kind, name in kinds:
        if not isinstance(got, kind):
            raise GuardError(
                f"{node} got a {type(got).__name__} as {name}: connect the checkpoint's {name}.",
                code="input.wrong-type",
            )


_MERGE = "leave that node out, or switch accept_merged on: images then read merged base"
_PENDING = "load them with Load Task LoRA instead, or switch accept_merged on, which takes them as task LoRAs"


def _check_incoming(patcher, accept_merged: bool, what: str, merged: str = "", beside: str = _BESIDE) -> None:
    """``merged`` and ``beside`` are the remedies of the node that asks."""
    if isinstance(patcher, GuardMixin):
        raise GuardError(f"{what} is guarded already: take one of the two guards out.", code="model.guarded-already")
    if swapped := pending.swapping(patcher.patches):
        raise GuardError(
            f"{what} brings a LoRA that swaps modules ({len(swapped)} changes of the kind {pending.SWAPPING!r}, first "
            f"{shown(swapped[0])}), where a branch would be lost: leave out the node that loads it.",
            code="model.swaps-modules",
        )
    if patcher.patches and not accept_merged:
        found = pending.of(patcher)
        kinds = ", ".join((*["LoRAs"] * bool(found.found), *found.why))
        remedy = merged or (_MERGE if found.why else _PENDING)
        raise GuardError(
            f"{what} brings {kinds} to be merged into {len(patcher.patches)} weights: {remedy}.", code="model.merged"
        )
    _check_clean(patcher, frozenset(patcher.patches), what, beside)


def _check_clean(patcher, patches: frozenset[str], what: str, beside: str = _BESIDE) -> None:
    """No patch, hook, injection or replacement beside the guard (attributes of ModelPatcher)."""
    skipping = [k for kinds in patcher.wrappers.values() for k in kinds if k in SKIPPING_WRAPPERS]
    replaced = [name for name in patcher.object_patches if name.startswith("diffusion_model")]
    found = {
        "a LoRA or merge in its weights": frozenset(patcher.patches) != patches,
        "a LoRA hook": any(patcher.hook_patches.values()),
        "another loader's injections (bypass LoRA)": any(patcher.injections.values()),
        "a weight wrapper": bool(patcher.weight_wrapper_patches),
        "a replaced diffusion_model": bool(replaced),
        "a node that skips evaluations (EasyCache)": bool(skipping),
        "copies of its model on more GPUs (MultiGPU CFG Split)": bool(patcher.additional_models.get("multigpu")),
    }
    for problem in (name for name, present in found.items() if present):
        raise GuardError(f"{what} carries {problem} {beside}.", code="model.patched")


def common_ksampler(patcher, *settings, **options):
    """The stock KSampler's own function (nodes.common_ksampler), so results are bit-identical."""
    import nodes  # ComfyUI's top-level module, complete only after start-up

    patcher.guard_run = None  # an earlier one: without a step (denoise 0) the sampler ends before there is another
    out = nodes.common_ksampler(patcher, *settings, **options)[0]
    if _last_result(patcher) is None:
        ledger.note_unsampled(out["samples"])
    return out


def attestation(patcher) -> Attestation:
    """The last run of this patcher; "not sampled" where it had none."""
    return _last_result(patcher) or patcher.guard_state.record


def _last_result(patcher) -> Attestation | None:
    return patcher.guard_run.result if patcher.guard_run else None
