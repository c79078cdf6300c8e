"""Which weight of a model each layer of a LoRA file changes, by ComfyUI's own key map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .errors import GuardError
from .files import LoraFile, LoraLayer, describe_base

KeyMap = Mapping[str, "str | tuple"]  # file name -> weight key, or (weight key, (dim, start, length))

_PEFT = "base_model.model."
_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model.", "clip_l.", "clip_g.", "t5xxl.")


@dataclass(frozen=True)
class Target:
    """A weight, or a slice of it along one dimension."""

    key: str
    offset: tuple[int, int, int] | None = None  # dim, start, length


@dataclass(frozen=True)
class Match:
    """Where a file's layers go."""

    targets: dict[str, Target]  # layer name -> target
    unmatched: tuple[str, ...]
    text: tuple[str, ...]  # text-encoder layers of the whole file, by prefix


def is_text(name: str) -> bool:
    """Whether a file's layer belongs to a text encoder, by its prefix."""
    return name.removeprefix(_PEFT).startswith(_TEXT)


def match_layers(
    lora: LoraFile, names: Iterable[str], key_map: KeyMap, shapes: Mapping[str, tuple[int, ...]], subject: str
) -> Match:
    """Find the weight that each of `names` (layers of `lora`) changes.

    `key_map` is ComfyUI's map (comfy.lora.model_lora_keys_unet or _clip), `shapes` gives every weight's shape and
    `subject` names the model in errors. A layer whose name or weight is unknown is unmatched. Raises GuardError for
    a wrong shape, for two layers on one place, and for a target that is no plain slice.
    """
    targets: dict[str, Target] = {}
    taken: dict[Target, str] = {}
    unmatched = []
    for name in names:
        entry = next((key_map[variant] for variant in _variants(name) if variant in key_map), None)
        target = None if entry is None else _target(entry, f"{lora.name}: layer {name!r}")
        if target is None or target.key not in shapes:
            unmatched.append(name)
            continue
        _check_shape(lora, lora.layers[name], target, tuple(shapes[target.key]), subject)
        if target in taken:
            what = f"layers {taken[target]!r} and {name!r} both change {target.key} of {subject}"
            raise GuardError(f"{lora.name}: {what}: keep one of them in the file")
        taken[target] = name
        targets[name] = target
    return Match(targets, tuple(unmatched), tuple(name for name in lora.layers if is_text(name)))


def mismatch(lora: LoraFile, match: Match, subject: str) -> str:
    """One line for a file whose layers do not all match a model: counts, first name, the base it says, remedy."""
    total = len(match.targets) + len(match.unmatched)
    first = f", not {match.unmatched[0]!r}" if match.targets and match.unmatched else ""
    base = describe_base(lora.metadata)
    says = f"it says it was trained for {base}" if base else "it does not say what base it was trained for"
    count = f"matches {len(match.targets)} of its {total} layers to {subject}{first}"
    return f"{lora.name} {count}; {says}: use a LoRA made for this base."


def slice_shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the part of a weight of `shape` that a target covers."""
    if target.offset is None:
        return shape
    dim, _, length = target.offset
    return (*shape[:dim], length, *shape[dim + 1 :])


def _variants(name: str) -> Iterator[str]:
    """A layer's name as the file has it, then as ComfyUI's map spells diffusers and PEFT names."""
    bare = name.removeprefix(_PEFT)
    plain = bare.removeprefix("unet.").removeprefix(_PEFT)
    for stem in (name, bare, plain, f"unet.{plain}", f"text_encoder.{plain}"):
        yield stem
        long = stem if ".processor.to_" in stem else stem.replace(".to_", ".processor.to_")
        yield long
        yield long.removesuffix(".0") if long.endswith(".to_out.0") else long


def _target(entry: str | tuple, subject: str) -> Target:
    if isinstance(entry, str):
        return Target(entry)
    key, offset, *rest = entry
    if any(item is not None for item in rest):
        raise GuardError(f"{subject}: {key} is stored rearranged, a branch cannot change it: leave the layer out")
    if offset is None:
        return Target(key)
    dim, start, length = offset
    if dim not in (0, 1):
        raise GuardError(f"{subject}: slices {key} along dimension {dim}, only 0 and 1 are known: leave it out")
    return Target(key, (int(dim), int(start), int(length)))


def _check_shape(lora: LoraFile, layer: LoraLayer, target: Target, shape: tuple[int, ...], subject: str) -> None:
    """The layer's dW must have its target's shape; a conv kernel may come flattened, as ComfyUI's trainer saves it."""
    inside = target.offset is None or (len(shape) > 1 and sum(target.offset[1:]) <= shape[target.offset[0]])
    wanted = slice_shape(target, shape)  # out in [k k]
    down = tuple(layer.down.shape[1:])  # in [k k]
    flat = len(down) == 1 and down[0] == math.prod(wanted[1:])
    padded = len(wanted) == 2 and down == (wanted[1], 1, 1)
    if inside and len(wanted) in (2, 4) and layer.up.shape[0] == wanted[0] and (down == wanted[1:] or flat or padded):
        return
    have = f"{[layer.up.shape[0], *down]} in the file, {list(wanted)} in {target.key} of {subject}"
    raise GuardError(f"{lora.name}: layer {layer.name!r} is {have}: use a LoRA made for this base")
