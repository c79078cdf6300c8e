"""LoRA weight hooks (Create Hook LoRA, with keyframes): branches for some conditionings and steps.

ComfyUI merges a hook's LoRA into the weights before an evaluation of the conditionings that carry it, and takes it out
again (ModelPatcher.add_hook_patches, patch_hooks). Here each combination of hooks, at the strengths that keyframes give
them at that step, is a guard of its own: built, checked and judged by its net strength like any other, so that the
worst step decides, and put onto the layers for these evaluations. On a CLIP (Set CLIP Hooks) it encodes the prompt with
its hooks, once, or once for every range of steps that keyframes give them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import comfy.hooks

from ..modular_lora.branches.attachment import Attachment
from ..modular_lora.guard.build import TaskLora
from ..modular_lora.provenance.attestation import Attestation, LoraRecord
from . import lifting
from .guarded_run import GuardedRun
from .lifting import Added, Side
from .memory import compute_dtype
from .patcher import GuardMixin, GuardState

Acting: TypeAlias = "tuple[tuple[Any, float], ...]"  # hooks (comfy.hooks._HookRef) and the strengths of their keyframes
HOOKS = "LoRA hooks changed the combination of LoRAs while it sampled"


@dataclass(frozen=True)
class _Set:
    """One combination of a run: its guard, what it counts, and the hooks' LoRAs in it."""

    run: GuardedRun
    state: GuardState
    tasks: tuple[TaskLora, ...] = ()


class HookedMixin(GuardMixin):
    """In front of a ModelPatcher's class, behind drop_in.DropInMixin."""

    guard_side: Side
    guard_added: tuple[Added, ...]
    guard_hooked: dict[Any, Added]  # by hook; what conditionings bring is noted anew at the beginning of each run
    _guard_sets: dict[Acting, _Set]  # of the latest run
    _guard_acting: Acting

    def guard_with(self, more: tuple[Added, ...]) -> GuardState:
        """The guard with further LoRAs beside those that were put onto this clone."""
        raise NotImplementedError

    def guard_add(self, more: tuple[Added, ...]) -> None:
        """Put further LoRAs onto this clone."""
        raise NotImplementedError

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        """As ModelPatcher.add_hook_patches; errors as of add_patches."""
        taken, entries = lifting.entries_of(self.model, patches, strength_patch, strength_model)
        own = {} if self.guard_side.is_text and not strength_patch else entries
        if (added := lifting.handed(self.guard_side, self.guard_added, own, alone=False)) is not None:
            self.guard_hooked[hook.hook_ref] = added
        self.hook_patches[hook.hook_ref] = {}  # registered, with nothing for ComfyUI to merge
        return taken

    def guard_begin(self, run: GuardedRun | None = None) -> GuardedRun:
        begun = super().guard_begin(run)
        self._guard_acting, self._guard_sets = (), {(): _Set(begun, self.guard_state)}
        return begun

    def patch_hooks(self, hooks: comfy.hooks.HookGroup | None):
        """The LoRAs of these hooks act in the evaluations that follow, at the strengths of now; None: no hook's.

        On a text encoder they act in the clone that encodes (`guard_under`).
        """
        if not self.guard_side.is_text:
            self._guard_act(self.guard_acting(hooks))
        self.current_hooks = hooks

    def guard_acting(self, hooks: comfy.hooks.HookGroup | None) -> Acting:
        """The LoRAs of these hooks that act now, and their strengths."""
        weights = hooks.get_type(comfy.hooks.EnumHookType.Weight) if hooks is not None else ()
        wanted = ((hook.hook_ref, float(hook.strength)) for hook in weights if hook.hook_ref in self.guard_hooked)
        return tuple(one for one in wanted if one[1] != 0)

    def guard_under(self, acting: Acting):
        """A clone on which the LoRAs of these hooks act as those of loaders do, and no hook."""
        clone = self.clone()
        clone.guard_add(self._guard_of(acting))
        clone.forced_hooks, clone.guard_hooked = None, {}
        return clone

    def _guard_act(self, wanted: Acting) -> None:
        if self.guard_run is None or not self.guard_run.running or wanted == self._guard_acting:
            return
        before, known = self._guard_sets[self._guard_acting], self._guard_sets.get(wanted)
        before.run.pause()
        if known is None:
            known = self._guard_sets[wanted] = self._guard_set(wanted, self.guard_run)
            self.guard_run.others.append(known.run)
            known.run.attachment.attach()
            known.run.attachment.verify()
            known.run.attachment.branches.to(self.load_device, compute_dtype(self))
            known.run.start()
        else:
            known.run.resume()
        self._guard_acting = wanted

    def _guard_set(self, wanted: Acting, main: GuardedRun) -> _Set:
        more = self._guard_of(wanted)
        state = self.guard_with(more)
        attachment = Attachment(self.model, state.part.branches)
        run = GuardedRun(attachment, main.steps, main.images, main.content, may_be_empty=True, shares=main.shares)
        return _Set(run, state, tuple(one.task for one in more))

    def _guard_of(self, acting: Acting) -> tuple[Added, ...]:
        return tuple(_scaled(self.guard_hooked[ref], strength) for ref, strength in acting)

    def cleanup(self):
        if self.guard_run is not None:
            self.guard_run.stop()
        for acting, one in self._guard_sets.items():
            if acting:
                one.run.attachment.detach()
                one.run.attachment.branches.free()
        if len(self._guard_sets) > 1 and self.is_injected:
            self.guard_attachment.attach()
        super().cleanup()

    def guard_acted(self, record: Attestation) -> Attestation:
        """With the LoRAs of hooks that acted, and the net strengths of the worst step."""
        sets = [one for acting, one in self._guard_sets.items() if acting]
        if not sets:
            return record
        nets = [record.net_strength, *(one.state.record.net_strength for one in sets)]
        unmeasured = dict(record.functional_not_measured) | dict.fromkeys(record.functional_strength, HOOKS)
        return record.of(
            loras=(*record.loras, *_records(task for one in sets for task in one.tasks)),
            net_strength={sha256: min(net[sha256] for net in nets) for sha256 in record.net_strength},
            functional_strength={},
            functional_not_measured=unmeasured,
        )


def _scaled(added: Added, strength: float) -> Added:
    """A hook's LoRA at the strength of its keyframe."""
    task = added.task
    task = replace(task, strength_model=task.strength_model * strength, strength_clip=task.strength_clip * strength)
    found = tuple(replace(one, strength=one.strength * strength) for one in added.found)
    return Added(found, task, added.load)


def _records(tasks: Iterable[TaskLora]) -> list[LoraRecord]:
    """One line for each LoRA, with the strengths that it had."""
    found: dict[tuple[str, str], list[TaskLora]] = {}
    for task in tasks:
        found.setdefault((task.lora.name, task.lora.sha256), []).append(task)
    return [_record(some) for some in found.values()]


def _record(some: list[TaskLora]) -> LoraRecord:
    lora, strengths = some[0].lora, [task.strength_model for task in some]
    said = f"by a hook, {min(strengths):g} to {max(strengths):g} where it acts"
    return LoraRecord("task", lora.name, lora.sha256, max(strengths, key=abs), 0.0, said, pending=lora.pending)
