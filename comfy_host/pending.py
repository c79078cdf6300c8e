"""LoRAs that loaders before the guard left in a MODEL or CLIP, taken out of it as task LoRAs, so that checks see them.

ModelPatcher.patches holds what is to be merged when the model is loaded: weight key -> [(strength, value, strength of
the weight, offset, function), ...] in the order in which it was added (ModelPatcher.add_patches and
comfy.lora.calculate_weight). What is no sum on the weight (model merges) stays where it is.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.weight_adapter as weight_adapter
from torch import Tensor

from ..modular_lora.files.formats import FORMATS
from ..modular_lora.files.pending import Change, pending_lora
from ..modular_lora.guard.build import TaskLora, Tasks
from ..modular_lora.guard.model_info import ModelInfo
from .introspection import clip_info, model_info

Patches = dict[str, list[tuple]]  # as ModelPatcher holds them
# class of comfy/weight_adapter -> what its ``weights`` are, by the roles in files
ROLES = dict(kind.host for kind in FORMATS if kind.host)


SWAPPING = "config"  # kind of a patch by which ComfyUI 0.38 swaps modules; 0.33 and before log it and go on


@dataclass(frozen=True)
class Pending:
    """What a MODEL or CLIP is to take into its weights: sums that can be taken out, and what must stay."""

    found: tuple[Found, ...]
    rest: Patches
    why: tuple[str, ...]  # what stays, each kind once


@dataclass(frozen=True)
class Found:
    change: Change
    strength: float
    load: int | None  # stands for the loading of one file; None where the value does not tell


@dataclass
class _Lora:
    """Changes that one loading of one file gave, as far as can be told: by what they share, strength and order."""

    load: int | None
    strengths: dict[bool, float] = field(default_factory=dict)  # is text -> strength
    changes: dict[bool, list[Change]] = field(default_factory=lambda: {False: [], True: []})
    taken: set[tuple] = field(default_factory=set)
    found: list[Found] = field(default_factory=list)

    def takes(self, text: bool, one: Found) -> bool:
        return self.strengths.get(text, one.strength) == one.strength and _place(text, one) not in self.taken

    def add(self, text: bool, one: Found) -> None:
        self.strengths[text] = one.strength
        self.changes[text].append(one.change)
        self.taken.add(_place(text, one))
        self.found.append(one)


def _place(text: bool, one: Found) -> tuple:
    return text, one.change.key, one.change.offset


def of(patcher) -> Pending:
    """What is pending in a MODEL's or a CLIP's patcher."""
    if patcher is None or not patcher.patches:
        return Pending((), {}, ())
    if hasattr(patcher.model, "diffusion_model"):
        return _sorted(patcher.patches, model_info(patcher))
    return _sorted(patcher.patches, clip_info(SimpleNamespace(patcher=patcher, cond_stage_model=patcher.model)))


def swapping(patches: Mapping[str, list[tuple]]) -> list[str]:
    """What is to be given another module instead of another weight: it could lose a branch, or run without one."""
    return [key for key, entries in patches.items() if any(_pair(entry[1])[0] == SWAPPING for entry in entries)]


def tasks(model: Pending, clip: Pending) -> Tasks:
    """Task LoRAs of what can be taken out, in the order in which the weights name them."""
    return tuple(_task(i, lora) for i, lora in enumerate(_loras(model, clip), 1))


def loras_of(pending: Pending, is_text: bool) -> list[tuple[Found, ...]]:
    """The same of a MODEL or a CLIP by itself: the changes of each LoRA."""
    none = Pending((), {}, ())
    loras = _loras(none, pending) if is_text else _loras(pending, none)
    return [tuple(lora.found) for lora in loras]


def _loras(model: Pending, clip: Pending) -> list[_Lora]:
    every = [(text, one) for text, pending in ((False, model), (True, clip)) for one in pending.found]
    count = Counter(one.load for _, one in every if one.load is not None)
    loads = {load for load, times in count.items() if times > 1}
    loras: list[_Lora] = []
    for text, one in every:
        if one.load in loads:
            _join(loras, text, one, one.load, (one.load,))
    for text, one in every:
        if one.load not in loads:  # a full difference: of a file above, if one of its strength has room
            _join(loras, text, one, None, (*loads, None))
    return loras


def _join(loras: list[_Lora], text: bool, one: Found, load: int | None, allowed: Iterable[int | None]) -> None:
    fit = (lora for lora in loras if lora.load in allowed and lora.takes(text, one))
    if load is None:  # not by the side that a file has not, which would take any strength
        fit = (lora for lora in fit if text in lora.strengths)
    if (lora := next(fit, None)) is None:
        loras.append(lora := _Lora(load))
    lora.add(text, one)


def _task(number: int, lora: _Lora) -> TaskLora:
    model, text = lora.changes[False], lora.changes[True]
    counts = ", ".join(f"{len(some)} changes of the {of}" for some, of in ((model, "MODEL"), (text, "CLIP")) if some)
    note = f"{counts}, left by a loader before the guard; its file is not known, its sha256 is of its values"
    made = pending_lora(f"pending LoRA {number} (loaded before the guard)", model, text, note)
    return TaskLora(made, float(lora.strengths.get(False, 0.0)), float(lora.strengths.get(True, 0.0)))


def leave(patcher, pending: Pending) -> None:
    """Let ``patcher``, a fresh clone, merge nothing but what must stay."""
    if pending.found:
        patcher.patches = {key: list(some) for key, some in pending.rest.items()}
        patcher.patches_uuid = uuid.uuid5(patcher.patches_uuid, "taken out")  # ComfyUI tells weights apart by it


def own_functions(info: ModelInfo) -> set:
    """ComfyUI's own rearrangements of a model's weights."""
    return {entry[2] for entry in info.key_map.values() if isinstance(entry, tuple) and len(entry) > 2}


def _sorted(patches: Mapping[str, list[tuple]], info: ModelInfo) -> Pending:
    """What can be taken out is the end of each weight's list, behind the last change that is no sum on W0."""
    own = own_functions(info)
    found: list[Found] = []
    rest: Patches = {}
    why: dict[str, None] = {}
    for key, entries in patches.items():
        read = [read_entry(info, own, key, entry, i == 0) for i, entry in enumerate(entries)]
        kept = next((i for i in range(len(read), 0, -1) if isinstance(read[i - 1], str)), 0)
        if kept:
            rest[key] = list(entries[:kept])
            why |= dict.fromkeys(said for said in read[:kept] if isinstance(said, str))
        found += (one for one in read[kept:] if not isinstance(one, str))
    return Pending(tuple(found), rest, tuple(why))


def read_entry(info: ModelInfo, own: set, key: str, entry: tuple, first: bool) -> Found | str:
    """A change, or what it is that cannot be taken out."""
    strength, value, strength_model, offset, function = entry[:5]
    spec = info.places.get(key)
    if isinstance(value, list) or strength_model != 1.0:
        return "a model merge"
    if function is not None and function not in own:
        return "a change that another pack rearranges"
    if spec is None or (spec.problem and not spec.norm):
        return f"a change of {key}, which is not a layer that can take a branch"
    if offset is not None and offset[0] not in (0, 1):
        return f"a change of a slice of {key} along dimension {offset[0]}"
    read = _adapter(value) if isinstance(value, weight_adapter.WeightAdapterBase) else _plain(value, strength, first)
    if isinstance(read, str):
        return read
    parts, alpha, wide, load = read
    offset = None if offset is None else (int(offset[0]), int(offset[1]), int(offset[2]))
    return Found(Change(key, parts, alpha, offset, function, wide), strength, load)


_Read = tuple[dict[str, Tensor], float | None, bool, int | None]  # parts, alpha, wide, load


def _adapter(value) -> _Read | str:
    """An adapter's tensors by their roles; what one call of load_lora made shares one set of loaded keys."""
    roles = ROLES.get(type(value).__name__)
    if roles is None or len(roles) != len(value.weights):
        return f"a {getattr(value, 'name', type(value).__name__)} change"
    held = {role: part for role, part in zip(roles, value.weights, strict=True) if part is not None}
    reshape, alpha = held.pop("reshape", None), held.pop("alpha", None)
    held.pop("rescale", None)  # ComfyUI does not use it
    if not all(map(_is_values, held.values())):
        return f"a {value.name} change whose values are not numbers"
    if "oft_blocks" in held and "dora_scale" in held:
        return "an OFT change with lengths of its own"
    if reshape is not None and (len(reshape) != 2 or list(reshape) != [held["up"].shape[0], held["down"].shape[1]]):
        return "a LoRA for a weight of another shape"
    return held, None if alpha is None else float(alpha), reshape is not None, id(value.loaded_keys)


def _plain(value: object, strength: float, first: bool) -> _Read | str:
    """A difference, or a weight in W0's place: it drops what was added before, and ComfyUI asks for no strength."""
    kind, held = ("diff", value) if isinstance(value, tuple) and len(value) == 1 else _pair(value)
    if kind not in ("diff", "set") or not isinstance(held, tuple) or not held or not _is_values(held[0]):
        return f"a change of the kind {kind!r}"
    if kind == "set":
        usual = first and strength != 0
        return ({"set": held[0]}, None, False, None) if usual else "a replaced weight in a chain of changes"
    if len(held) > 1 and held[1].get("pad_weight"):
        return "a difference that widens the weight"
    return {"diff": held[0]}, None, False, None


def _pair(value: object) -> tuple:
    return value if isinstance(value, tuple) and len(value) == 2 else (type(value).__name__, None)


def _is_values(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()
