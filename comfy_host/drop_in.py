"""Guard: a MODEL, CLIP and VAE that stay guarded whatever loaders, samplers and decoders a workflow has behind it.

`attach` gives ComfyUI's own objects back, guarded. A LoRA that any loader puts onto them, by ``add_patches`` as
ComfyUI's own loader does, becomes a task LoRA beside the weights, and so does what loaders in front left in them
(lifting.py).
The branches are made when the model is loaded for sampling, or the text encoder for a prompt: once for all that the
chain of loaders put there. What merges, saves or drops is refused as by Guard Model (patcher.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch

from ..modular_lora.branches.attachment import Attachment
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import functional, safety_first
from ..modular_lora.guard.build import (
    GuardedPart,
    GuardLimits,
    Part,
    Safety,
    Tasks,
    apply_safety,
    build_part,
    check_coverage,
    check_roles,
    make_record,
    notes,
    text_digest,
)
from ..modular_lora.guard.report import format_functional, format_guard, format_memory
from ..modular_lora.guard.summary import guard_summary, run_line, task_line
from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.attestation import SAFETY_FIRST, SUM, Attestation, LoraRecord
from ..modular_lora.provenance.ledger import Encoder
from ..modular_lora.util.cache import Cache
from . import guard_cache, lifting, patcher, pending
from .bound_vae import bound
from .control_inputs import widen
from .enforcement import policy as policies
from .functional import measured
from .hooked_loras import Acting, HookedMixin
from .introspection import family, is_current, model_sha256
from .lifting import Added, Side
from .memory import MemoryMixin, compute_dtype
from .node_report import show_run
from .patcher import (
    APPLY_MODEL,
    KEY,
    OUTER_SAMPLE,
    PACK,
    GuardedClipMixin,
    GuardState,
    dress,
    encoded,
    guarded_class,
)
from .run import GenerateMixin

# a text encoder's guard and task LoRAs, by what is told of it: functional strength is measured with both halves
_encoding: Cache[tuple[Encoder, int], tuple[GuardedPart, Tasks]] = Cache(16)


BESIDE = "beside the guard: remove that node; LoRAs may come from Load LoRA and loaders that work as it does"


class Trio(NamedTuple):
    """What `attach` gives: guarded, or None where nothing was given."""

    model: Any
    clip: Any
    vae: Any
    report: str = ""
    summary: str = ""  # what of it is read on the node


@dataclass(frozen=True)
class _Shared:
    """What a guarded MODEL and CLIP have in common, with all their clones."""

    safety: Safety
    limits: GuardLimits
    model: Any  # patcher as it came, or None
    clip: Any  # CLIP as it came, or None
    node_id: str = ""  # of the node that shows what runs say
    by_policy: bool = False  # no node of the graph asked for it


class DropInMixin(HookedMixin):
    """In front of a ModelPatcher's class: what ``add_patches`` brings becomes task LoRAs, made into branches when used.

    Attributes:
        guard_side: MODEL or CLIP, and the safety LoRAs on it.
        guard_added: The LoRAs that were put onto this clone, in order.
    """

    guard_beside = BESIDE
    guard_side: Side
    guard_shared: _Shared
    guard_added: tuple[Added, ...]
    guard_built: GuardState | None  # None until somebody needs the branches
    _guard_attachment: Attachment | None

    @property
    def guard_state(self) -> GuardState:  # type: ignore[override]  # made when it is first asked for
        """The guard with all LoRAs so far; GuardError where they may not act together."""
        if self.guard_built is None:
            self.guard_built = _build(self.guard_side, self.guard_shared, self.guard_added)
            widen(self, self.guard_built.part.branches)
        return self.guard_built

    @property
    def guard_attachment(self) -> Attachment:  # type: ignore[override]
        """Where the branches sit on this clone's model."""
        if self._guard_attachment is None:
            self._guard_attachment = Attachment(self.model, self.guard_state.part.branches)
        return self._guard_attachment

    def guard_on(self, clone) -> None:
        _drop_in(clone, self.guard_side, self.guard_shared, self.guard_added, self.guard_built)
        clone.guard_hooked = dict(self.guard_hooked)  # loaders of AnimateDiff-Evolved register a hook on the model

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """As ModelPatcher.add_patches; gives the keys of ``patches`` that this model has. Errors: lifting.handed."""
        taken, entries = lifting.entries_of(self.model, patches, strength_patch, strength_model)
        if (added := lifting.handed(self.guard_side, self.guard_added, entries)) is not None:
            self.guard_add((added,))
        return taken

    def guard_add(self, more: tuple[Added, ...]) -> None:
        with self.use_ejected():  # a model that is loaded already gets the new branches
            self.guard_added = (*self.guard_added, *more)
            self.guard_built = self._guard_attachment = None

    def guard_with(self, more: tuple[Added, ...]) -> GuardState:
        return _build(self.guard_side, self.guard_shared, (*self.guard_added, *more))

    def guard_record(self, conds: dict[str, list[dict]]) -> Attestation:
        """With the task LoRAs of the text encoders that made the conditionings, and functional strength with these."""
        made = (tensor for entries in conds.values() for entry in entries for tensor in encoded(entry))
        encoders = list(dict.fromkeys(e for tensor in made for e in ledger.encoders_of(tensor)))
        record = self.guard_state.record
        layers = max((encoder.layers for encoder in encoders), default=0)
        record = record.of(
            loras=_with_text(record.loras, encoders), text_encoder=f"guarded, {layers} layers" if layers else ""
        )
        return _with_functional(self, record, encoders)

    def guard_ended(self, result: Attestation) -> None:
        if self.guard_shared.node_id:
            show_run(self.guard_shared.node_id, run_line(result), task_line(result))

    def set_injections(self, *args, **kwargs):
        raise GuardError(
            "A guarded model cannot take another loader's injections (set_injections): load the LoRA with Load LoRA, "
            "which the guard keeps beside the weights.",
            code="model.refused",
        )

    def get_ram_usage(self):
        """0.3.75's cache asks it of every result, also of those whose branches nobody needs yet."""
        return self.model_size() if self.guard_built is not None else super(MemoryMixin, self).model_size()

    def detach(self, unpatch_all=True):
        """Of branches that were never made there is nothing to free."""
        if self.guard_built is None:
            return super(MemoryMixin, self).detach(unpatch_all)
        return super().detach(unpatch_all)


def _drop_in(fresh, side: Side, shared: _Shared, added: tuple[Added, ...], built: GuardState | None = None):
    """The guard on a patcher that nobody else holds (a fresh clone)."""
    dress(fresh, DropInMixin)
    fresh.guard_side, fresh.guard_shared, fresh.guard_added = side, shared, added
    fresh.guard_built = built if fresh.model is side.base.model else None
    fresh._guard_attachment = None
    fresh.guard_hooked, fresh._guard_sets, fresh._guard_acting = {}, {}, ()
    return fresh


class DropInClipMixin(GuardedClipMixin):
    """In front of ComfyUI's CLIP: as GuardedClipMixin, with the LoRAs that loaders put onto it."""

    use_clip_schedule: bool  # CLIP's: whether hooks change what is encoded

    @property
    def text_digest(self) -> str:
        """The same; nothing is built for it."""
        return text_digest(self.patcher.guard_side.safety)

    def clone(self, *args, **kwargs):
        clone = super(GuardedClipMixin, self).clone(*args, **kwargs)
        clone.__class__ = type(self)
        return clone

    def generate(self, tokens, *args, **kwargs):
        if acting := self._acting:
            return self._under(acting).generate(tokens, *args, **kwargs)
        if not self.patcher.guard_state.part.layers:
            return super(GenerateMixin, self).generate(tokens, *args, **kwargs)
        return super().generate(tokens, *args, **kwargs)

    @property
    def guard_encoder(self) -> Encoder:
        """What is noted of the embeddings that it makes."""
        state = self.patcher.guard_state
        return Encoder(tuple(lora for lora in state.record.loras if lora.role == "task"), state.part.layers)

    @property
    def _acting(self) -> Acting:
        """The LoRAs of Set CLIP Hooks that change the text encoder, at the strengths of their keyframes of now."""
        return self.patcher.guard_acting(self.patcher.forced_hooks)

    def _under(self, acting: Acting):
        """A clone with these LoRAs and without hooks of its own."""
        return _clip_of(self, self.patcher.guard_under(acting))

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=MappingProxyType({}), show_pbar=True):
        """As CLIP's. One embedding is right for every step, unless a hook with keyframes acts on the text encoder."""
        hooks, scheduled = self.patcher.forced_hooks, self.use_clip_schedule
        if hooks is not None and scheduled and self.patcher.guard_hooked:
            return self._by_ranges(hooks, tokens, unprojected, add_dict)
        self.use_clip_schedule = False
        try:
            return super(GuardedClipMixin, self).encode_from_tokens_scheduled(tokens, unprojected, add_dict, show_pbar)
        finally:
            self.use_clip_schedule = scheduled

    def _by_ranges(self, hooks, tokens, unprojected: bool, add_dict) -> list:
        """An embedding for each range of steps in which keyframes leave the strengths as they are, as CLIP gives it."""
        made = []
        hooks.reset()
        for (start, end), keyframes in hooks.get_hooks_for_clip_schedule():
            if end < add_dict.get("start_percent", end) or start > add_dict.get("end_percent", start):
                continue
            for hook, keyframe in keyframes:
                hook.hook_keyframe._current_keyframe = keyframe
            encoded = self._under(self._acting).encode_from_tokens(tokens, "unprojected" if unprojected else True, True)
            cond = encoded.pop("cond")
            made.append([cond, encoded | {"clip_start_percent": start, "clip_end_percent": end} | dict(add_dict)])
            comfy.model_management.throw_exception_if_processing_interrupted()
        hooks.reset()
        return made

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        if acting := self._acting:
            return self._under(acting).encode_from_tokens(tokens, return_pooled, return_dict)
        state = self.patcher.guard_state
        if not state.part.layers:  # nothing acts on it
            return super(GuardedClipMixin, self).encode_from_tokens(
                tokens, return_pooled=return_pooled, return_dict=return_dict
            )
        result = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        encoder = self.guard_encoder
        every = lifting.joined(self.patcher.guard_side, self.patcher.guard_added)
        _encoding.put((encoder, id(self.cond_stage_model)), (state.part, tuple(added.task for added in every)))
        made = result.values() if return_dict else result if isinstance(result, tuple) else (result,)
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                ledger.note_encoder(tensor, encoder)
        return result


def attach(
    model, clip, vae, safety: Safety, limits: GuardLimits | None = None, node: str = "Guard", node_id: str = ""
) -> Trio:
    """Guard a MODEL and, where they are given, the CLIP and VAE that belong to it.

    Args:
        model: ModelPatcher of a diffusion model; LoRAs that wait in it become task LoRAs.
        clip: ComfyUI's CLIP, or None.
        vae: ComfyUI's VAE, or None.
        safety: The safety LoRAs, at least one.
        limits: What is insisted on; the defaults where it is None.
        node: What the errors call the one who asks.
        node_id: Of a node that shows what each run says of itself.

    Returns:
        The guarded three, the report and its summary.

    Raises:
        GuardError: Where the model cannot be guarded, or a LoRA in front cannot be kept beside its weights.
    """
    patcher._check_types(model, clip, node)
    if not isinstance(vae, comfy.sd.VAE | None):
        raise GuardError(
            f"{node} got a {type(vae).__name__} as VAE: connect the checkpoint's VAE.", code="input.wrong-type"
        )
    safety = _with_policys(safety, model, clip)
    check_roles(safety, ())
    made = _guarded(_Shared(safety, limits or GuardLimits(), model, clip, node_id))
    report, summary = _report([one for one in (made.model, made.clip and made.clip.patcher) if one is not None])
    return made._replace(vae=bound(vae) if vae is not None else None, report=report, summary=summary)


def attach_by_policy(model, clip, safety: Safety, combine: str = SUM) -> Trio:
    """Guard a MODEL, the CLIP that belongs to it, or one of them alone, where an operator's policy asks for it.

    The half of a safety LoRA that belongs to the other of the two counts as guarded there: that prompts were encoded
    with it is checked when the model is sampled.

    Args:
        model: ModelPatcher of a diffusion model, or None.
        clip: ComfyUI's CLIP, or None.
        safety: The safety LoRAs, at least one.
        combine: How the shares of the LoRAs are put together.

    Returns:
        The guarded ones, without a VAE and a report.

    Raises:
        GuardError: Where a safety LoRA does not apply whole, or what comes with them cannot be guarded.
    """
    made = _guarded(_Shared(safety, GuardLimits(combine=combine), model, clip, by_policy=True))
    for one in (one for one in (made.model, made.clip and made.clip.patcher) if one is not None):
        for item in safety:
            apply_safety(item, one.guard_side.part, one.guard_side.info())
    return made


def is_by_policy(value: object) -> bool:
    """Whether a MODEL or CLIP was guarded by `attach_by_policy`."""
    one = value.patcher if isinstance(value, DropInClipMixin) else value
    return isinstance(one, DropInMixin) and one.guard_shared.by_policy


def without_guard(value):
    """A MODEL or CLIP that was guarded by `attach_by_policy` as it was before, for nodes that guard it themselves.

    Raises:
        GuardError: Where loaders have put LoRAs onto it since.
    """
    if isinstance(value, DropInClipMixin):
        made = _clip_of(value, without_guard(value.patcher))
        made.__class__ = type(value).__bases__[1]
        return made
    if value.guard_added:
        raise GuardError(
            "This node cannot take LoRAs that a loader put onto a model which the server guards by itself: load them "
            "with Load Task LoRA, or take out the guard of the graph.",
            code="model.guarded-already",
        )
    return _bare(value)


def _bare(guarded: DropInMixin):
    """A clone of a guarded patcher without its guard and the LoRAs in it."""
    one = guarded.clone()
    one.__class__ = type(guarded).__bases__[1]  # as guarded_class has made it
    for kind in (OUTER_SAMPLE, APPLY_MODEL):
        one.remove_wrappers_with_key(kind, KEY)
    for name in [name for name in vars(one) if name.startswith(("guard_", "_guard_"))]:
        delattr(one, name)
    one.size = guarded.guard_side.base.size
    return one


def _with_policys(safety: Safety, *given) -> Safety:
    """The safety LoRAs of a node with those that a policy put onto what came to it; of one file the higher strength."""
    found = {item.lora.sha256: item for item in safety}
    if len(found) < len(safety):
        return safety  # one file twice, which is refused
    for one in filter(is_by_policy, given):
        for item in (one.patcher if isinstance(one, DropInClipMixin) else one).guard_shared.safety:
            own = found.get(item.lora.sha256, item)
            found[item.lora.sha256] = max(own, item, key=lambda known: known.strength)
    return tuple(found.values())


def _guarded(shared: _Shared) -> Trio:
    """The MODEL and CLIP of ``shared``, guarded, and with the LoRAs that were put onto them before."""
    model, clip = shared.model, shared.clip
    nothing: tuple[None, tuple[Added, ...]] = None, ()
    made = _side(model, "model", "The MODEL", shared) if model is not None else nothing
    text = _side(clip.patcher, "text", "The CLIP", shared) if clip is not None else nothing
    plain = _clip_of(clip, text[0].base) if text[0] else None
    if isinstance(plain, DropInClipMixin):
        plain.__class__ = type(clip).__bases__[1]
    shared = replace(shared, model=made[0] and made[0].base, clip=plain)
    one, other = (_drop_in(side.base.clone(), side, shared, some) if side else None for side, some in (made, text))
    if plain is not None:
        other = _clip_of(plain, other)
        other.__class__ = guarded_class(type(other), DropInClipMixin)
    return Trio(one, other, None)


def _side(one, part: Part, what: str, shared: _Shared) -> tuple[Side, tuple[Added, ...]]:
    """What is to be guarded, without what waited in it, and the LoRAs that did.

    What a policy guarded already brings the LoRAs that loaders have put onto it since.
    """
    if is_by_policy(one):
        side = Side(part, _bare(one), shared.safety, shared.limits)
        return side, tuple(lifting.again(side, added) for added in one.guard_added)
    patcher._check_incoming(one, True, what, beside=BESIDE)
    found = pending.of(one)
    side = Side(part, _without(one, found), shared.safety, shared.limits)
    return side, lifting.waiting(side, found)


def _without(one, found: pending.Pending):
    """A clone without the LoRAs that waited in it."""
    bare = one.clone()
    pending.leave(bare, found)
    return bare


def _clip_of(clip, with_patcher):
    """A clone of a CLIP around another patcher of the same text encoder."""
    other = clip.clone()
    other.patcher = with_patcher
    return other


def _build(side: Side, shared: _Shared, added: Iterable[Added]) -> GuardState:
    """The guard on one side with these LoRAs; remembered, as other clones may carry the same."""
    first = side.limits.combine == SAFETY_FIRST
    every = () if first and side.is_text else lifting.joined(side, tuple(added))
    tasks = tuple(one.task for one in every)
    key = guard_cache.part_key(side.part, side.base, side.safety, tasks, side.limits)
    if (built := guard_cache.guards.get(key)) is None:
        part = _part(side, every, tasks)
        built = guard_cache.guards.put(
            key, guard_cache.Built(part, None, _record(shared, side, part, tasks), "", "", "")
        )
    state = GuardState(built.model, built.record, frozenset(), text_digest(side.safety))
    policies.check_built(state, tasks)
    return state


def _part(side: Side, every: tuple[Added, ...], tasks: Tasks) -> GuardedPart:
    """Built on the layers as they were last, and once more where these are no longer what they were."""
    info = side.info()
    try:
        known = dict(lifting.known(every, info))
        part = build_part(side.part, info, side.safety, tasks, side.limits, known=known)
        if is_current(side.base.model, [layer.spec for layer in part.branches.layers.values()]):
            return part
    except (GuardError, AttributeError):
        pass  # the error is raised again below, of the model as it is now
    return build_part(side.part, side.info(anew=True), side.safety, tasks, side.limits)


def _record(shared: _Shared, side: Side, part: GuardedPart, tasks: Tasks) -> Attestation:
    """Of a run that has not begun; of a text encoder what its guard knows."""
    base = shared.model
    known = (family(base), model_sha256(base)) if base is not None else ("", "")  # of a text encoder by itself
    return make_record(PACK, *known, False, (part, None), side.safety, tasks, side.limits.combine)


def _with_text(loras: tuple[LoraRecord, ...], encoders: Iterable[Encoder]) -> tuple[LoraRecord, ...]:
    """The LoRAs of a run: a file that acted in model and text encoder, at one strength each, is one line."""
    text = dict.fromkeys(lora for encoder in encoders for lora in encoder.loras)
    found = []
    for lora in loras:
        same = [other for other in text if (other.name, other.sha256) == (lora.name, lora.sha256)]
        alone = len(same) == 1 and sum(o.sha256 == lora.sha256 for o in loras) == 1
        if lora.role == "task" and alone:
            del text[same[0]]
            lora = replace(lora, strength_clip=same[0].strength_clip)
        found.append(lora)
    return (*found, *text)


def _with_functional(one: DropInMixin, record: Attestation, encoders: Iterable[Encoder]) -> Attestation:
    """The record with functional strength, where a safety LoRA has prompts to measure it by."""
    shared = one.guard_shared
    tasks = tuple(added.task for added in lifting.joined(one.guard_side, one.guard_added))
    acting = [encoder for encoder in encoders if encoder.loras]
    text = _encoding.get((acting[0], id(shared.clip.cond_stage_model))) if len(acting) == 1 and shared.clip else None
    files = [s.lora for s in shared.safety]
    if acting and text is None:
        found = functional.unmeasured(files, "the prompts were encoded with several combinations of LoRAs")
    else:
        found = _measured(shared, one.guard_state.part, tasks, record.base_sha256, text)
    functional.check(found, {file.sha256: file.name for file in files}, shared.limits.functional_strength_floor)
    return record.of(functional_strength=found.strengths, functional_not_measured=found.unmeasured)


def _measured(
    shared: _Shared, part: GuardedPart, tasks: Tasks, base_sha256: str, text: tuple[GuardedPart, Tasks] | None = None
) -> functional.Functional:
    """``text``: the guard on the text encoder and its task LoRAs, where it has any."""
    parts = [part]
    if shared.clip is not None and text is None:
        side = Side("text", shared.clip.patcher, shared.safety, shared.limits)
        text = _build(side, shared, ()).part, ()
    if text is not None:
        parts.append(text[0])
        tasks = (*tasks, *text[1])
    return measured(shared.model, shared.clip, parts, shared.safety, tasks, base_sha256)


def _report(made: list[DropInMixin]) -> tuple[str, str]:
    """What is known before anything runs, and what of it is read on the node.

    GuardError for a safety LoRA that does not apply whole.
    """
    states, shared = [one.guard_state for one in made], made[0].guard_shared
    parts, record = tuple(state.part for state in states), states[0].record
    tasks = tuple(added.task for one in made for added in one.guard_added)
    check_coverage(tuple(_safety_lines(part) for part in parts), shared.clip is not None)
    if shared.limits.combine == SAFETY_FIRST:
        safety_first.calibrations(record, [s.lora for s in shared.safety])
    remarks = list(notes(shared.safety, tasks, record.base_sha256, 0, shared.clip is not None, shared.limits.combine))
    lines = [format_guard(record.base_family, record.base_sha256, parts, remarks)]
    if not any(one.guard_added for one in made[1:]):
        found = _measured(shared, parts[0], tuple(a.task for a in made[0].guard_added), record.base_sha256)
        names = {s.lora.sha256: s.lora.name for s in shared.safety}
        functional.check(found, names, shared.limits.functional_strength_floor)
        lines.append(format_functional(found, record))
    size = sum(one.branches.size(compute_dtype(one)) for one in made)
    lines.append(format_memory(size, len(guard_cache.guards), guard_cache.guards.size))
    behind = "LoRAs that are loaded behind this node are kept beside the weights as well, and counted when it runs"
    return "\n".join([*lines, behind]), f"{guard_summary(parts, remarks, ' in front of this node')}\n{behind}"


def _safety_lines(part: GuardedPart) -> GuardedPart:
    """Without task LoRAs: a loader puts both halves of one onto MODEL and CLIP separately, or one half alone."""
    return replace(part, lines=tuple(line for line in part.lines if line.role == "safety"))
