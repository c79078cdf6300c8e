"""What loaders hand to ``add_patches`` of a guarded MODEL or CLIP, or left in it before, as task LoRAs.

One call of add_patches is one LoRA, or one layer of one (Inspire's block weights call it once a key): calls of one file
for different places are joined, with a strength for each layer. Every LoRA is read, checked and compared with the
safety LoRAs once, in the call that brought it, so that what is wrong with it is said at its loader.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from ..modular_lora.errors import GuardError
from ..modular_lora.files.pending import layer_name, pending_lora
from ..modular_lora.guard.apply import Applied
from ..modular_lora.guard.build import GuardLimits, Part, Safety, TaskLora, apply_safety, apply_task, compare_all
from ..modular_lora.guard.model_info import ModelInfo
from . import origins, pending
from .introspection import clip_info, model_info
from .pending import Found

_OUT = "merge without the guard, save the result as a checkpoint and load that one, or leave that node out"
_LEAVE = "leave that node out, or load the LoRA from a file in a format that docs/formats.md lists"


@dataclass(frozen=True)
class Side:
    """A MODEL ("model") or a CLIP ("text") behind the guard: what all its clones share.

    ``base``: its patcher as it was, without the guard and without what waited in it.
    """

    part: Part
    base: Any
    safety: Safety
    limits: GuardLimits

    @property
    def is_text(self) -> bool:
        return self.part == "text"

    def info(self, anew: bool = False) -> ModelInfo:
        """See introspection; ``anew``: not as its layers were last."""
        if not self.is_text:
            return model_info(self.base, remembered=not anew)
        return clip_info(SimpleNamespace(patcher=self.base, cond_stage_model=self.base.model), remembered=not anew)


@dataclass(frozen=True, eq=False)
class Added:
    """One LoRA, or a part of one, on one side.

    ``load`` stands for the file, or for the loading that brought it; None where nothing tells. ``applied``: the LoRA on
    the base, with the layers that it was applied to.
    """

    found: tuple[Found, ...]
    task: TaskLora
    load: Hashable | None
    applied: tuple[Mapping, Applied] | None = None

    @property
    def places(self) -> frozenset[tuple]:
        return frozenset((one.change.key, one.change.offset) for one in self.found)


def waiting(side: Side, found: pending.Pending) -> tuple[Added, ...]:
    """The LoRAs that loaders in front of the guard left; GuardError for what is no sum on the weights."""
    if found.why:
        refuse(found.why[0], next(iter(found.rest)), "brought")
    return tuple(_added(side, some) for some in pending.loras_of(found, side.is_text))


def again(side: Side, added: Added) -> Added:
    """A LoRA that was put onto the same model behind another guard; errors as of `handed`."""
    return _added(side, added.found)


def entries_of(model, patches: Mapping, strength: float, strength_model: float) -> tuple[list, pending.Patches]:
    """The keys of ``patches`` that a loaded model has, and their entries as ModelPatcher.patches has them."""
    if swapped := pending.swapping({key: [(strength, value)] for key, value in patches.items()}):
        refuse(f"a change of the kind {pending.SWAPPING!r}", swapped[0], "was given")
    weights, taken, entries = model.state_dict(), [], pending.Patches()
    for key in patches:
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        if name in weights:
            taken.append(key)
            entries.setdefault(name, []).append((strength, patches[key], strength_model, offset, function))
    return taken, entries


def handed(side: Side, before: Sequence[Added], entries: pending.Patches, alone: bool = True) -> Added | None:
    """The LoRA of one call of add_patches, its entries as ModelPatcher.patches has them; None for an empty call.

    ``alone``: it is held against the safety LoRAs by itself, at the strength that it has in the entries.

    Raises:
        GuardError: For what is no sum on the weights, by its kind and the first weight, and for a LoRA that may not
            stand beside the safety LoRAs.
        LoraFileError: For values that are not finite or do not fit together.
    """
    info, changed = side.info(), {one.change.key for added in before for one in added.found}
    own = pending.own_functions(info)
    found: list[Found] = []
    for key, some in entries.items():
        for i, entry in enumerate(some):
            read = pending.read_entry(info, own, key, entry, i == 0 and key not in changed)
            if isinstance(read, str):
                refuse(read, key, "was given")
            found.append(read)
    return _added(side, tuple(found), alone) if found else None


def refuse(what: str, key: str, how: str) -> NoReturn:
    """GuardError for a change that cannot be kept beside the weights."""
    raise GuardError(
        f"The guarded model {how} {what} (first of {key}), which cannot be kept beside the weights: "
        f"{_OUT if 'merge' in what or 'model_as_lora' in what else _LEAVE}.",
        code="model.not-kept",
    )


def _added(side: Side, found: tuple[Found, ...], alone: bool = True) -> Added:
    path = origins.path_of(one.change for one in found)
    task = _task(side, found, path)
    added = Added(found, task, path or _load(found))
    if len(found) == 1 or not alone:
        return added  # a layer by itself says nothing of a LoRA: what it is part of is judged when it is whole
    info = side.info()
    applied = apply_task(task, side.part, info)
    compare_all([*(apply_safety(s, side.part, info) for s in side.safety), applied], info, side.limits)
    return Added(found, task, added.load, (info.specs, applied))


def _load(found: Iterable[Found]) -> Hashable | None:
    loads = {one.load for one in found if one.load is not None}
    return loads.pop() if len(loads) == 1 else None


def _task(side: Side, found: Sequence[Found], path: Path | None) -> TaskLora:
    """A LoRA whose strength is the largest of its layers', which have shares of it."""
    changes = [one.change for one in found]
    strength = max((float(one.strength) for one in found), key=abs)
    shares = {layer_name(one.change, side.is_text): one.strength / strength for one in found if strength}
    file, said = origins.file_of(path, changes)
    name = origins.name_of(path) if path else "a LoRA of another loader"
    of = "CLIP" if side.is_text else "MODEL"
    note = f"{len(changes)} changes of the {of}, handed over by another loader: {said}"
    model, text = ((), changes) if side.is_text else (changes, ())
    factors = shares if set(shares.values()) - {1.0} else {}
    lora = pending_lora(name, model, text, note, factors, file)
    return TaskLora(lora, 0.0 if side.is_text else strength, strength if side.is_text else 0.0)


def joined(side: Side, every: Sequence[Added]) -> tuple[Added, ...]:
    """Calls of one file, or of one loading, for different places as one LoRA; in the order of the first."""
    groups: list[list[Added]] = []
    for one in every:
        fit = (g for g in groups if one.load is not None and g[0].load == one.load and _room(g, one))
        if (group := next(fit, None)) is None:
            groups.append([one])
        else:
            group.append(one)
    return tuple(group[0] if len(group) == 1 else _join(side, group) for group in groups)


def _room(group: Iterable[Added], one: Added) -> bool:
    return all(not other.places & one.places for other in group)


def _join(side: Side, group: Sequence[Added]) -> Added:
    found = tuple(one for added in group for one in added.found)
    return Added(found, _task(side, found, origins.path_of(one.change for one in found)), group[0].load)


def known(every: Iterable[Added], info: ModelInfo) -> Iterator[tuple[TaskLora, Applied]]:
    """LoRAs that were applied to exactly these layers before."""
    for one in every:
        if one.applied is not None and one.applied[0] is info.specs:
            yield one.task, one.applied[1]
