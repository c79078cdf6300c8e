"""Which weight of a model each layer of a LoRA file changes, by ComfyUI's own key map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from .adapters import (
    Adapter,
    BiasedLayer,
    DiffLayer,
    DoraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    OftLayer,
    SetLayer,
    WideLoraLayer,
)
from .errors import GuardError
from .files import LoraFile, describe_base
from .names import PEFT

KeyMap = Mapping[str, "str | tuple"]  # file name -> weight key, or (weight key, (dim, start, length), rearrange)


@dataclass(frozen=True)
class Target:
    """A weight, or a slice of it along one dimension; ``rearrange`` brings a change's rows to the weight's order."""

    key: str
    offset: tuple[int, int, int] | None = None  # dim, start, length
    rearrange: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Match:
    """Where a file's layers go."""

    targets: dict[str, Target]  # layer name -> target
    unmatched: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)  # layers that the model has and cannot take (whole) -> why


def match_layers(
    lora: LoraFile,
    names: Iterable[str],
    key_map: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    subject: str,
    whole: bool = True,
) -> Match:
    """Find the weight that each of `names` (layers of `lora`) changes.

    `key_map` is ComfyUI's map (comfy.lora.model_lora_keys_unet or _clip), `shapes` gives every weight's shape and
    `subject` names the model in errors. A layer whose name or weight is unknown is unmatched. Raises GuardError for a
    target that is no plain slice, for a wrong shape and for two layers on one place; where the file need not apply
    ``whole``, the last two are left out as ComfyUI's merge leaves them out.
    """
    found, unmatched = Match({}, ()), []
    taken: dict[tuple, tuple[str, str]] = {}  # place -> name in the file, name in the map
    for name in names:
        known = name if name in key_map else next((v for v in _variants(name) if v in key_map), None)
        target = None if known is None else _target(key_map[known], lora, name)
        if target is None or target.key not in shapes:
            unmatched.append(name)
            continue
        place, pair = (target.key, target.offset), (name, known)
        why = _misfit(lora.layers[name], target, shapes[target.key], subject)
        if why is None and place in taken:
            lost, pair = _in_order(taken.pop(place), pair, key_map)
            name, why = lost[0], f"and {pair[0]!r} both change {target.key} of {subject}: keep one of them in the file"
            found.targets.pop(name, None)
            taken[place], found.targets[pair[0]] = pair, target
        elif why is None:
            taken[place], found.targets[name] = pair, target
        elif _takes_bias(lora.layers[name], target, shapes[target.key]):
            found.targets[name] = target
        if why is not None and whole:
            raise GuardError(f"{lora.name}: layer {name!r} {why}")
        if why is not None:
            found.left[name] = why
    return replace(found, unmatched=tuple(unmatched))


def _in_order(first: tuple[str, str], second: tuple[str, str], key_map: KeyMap) -> tuple[tuple[str, str], ...]:
    """Two (name in the file, name in the map) of one place in the map's order: ComfyUI takes the last."""
    order = list(key_map)
    return tuple(sorted((first, second), key=lambda pair: order.index(pair[1])))


def mismatch(lora: LoraFile, match: Match, subject: str) -> str:
    """One line for a file whose layers do not all match a model: counts, first name, the base it says, remedy."""
    if match.left and not match.targets:
        name, why = next(iter(match.left.items()))
        return f"{lora.name}: layer {name!r} {why}"
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
    bare = name.removeprefix(PEFT)
    plain = bare.removeprefix("unet.").removeprefix(PEFT)
    stems = name, bare, plain, f"unet.{plain}", f"text_encoder.{plain}", f"diffusion_model.{plain}"
    for stem in (*stems, f"transformer.{bare.removeprefix(f'transformer.{PEFT}')}", name.removesuffix(".scale")):
        yield stem
        long = stem if ".processor.to_" in stem else stem.replace(".to_", ".processor.to_")
        yield long
        yield long.removesuffix(".0") if long.endswith(".to_out.0") else long


def _target(entry: str | tuple, lora: LoraFile, name: str) -> Target:
    if isinstance(entry, str):
        return Target(entry)
    key, offset, *rest = entry
    rearrange = rest[0] if rest else None
    if offset is None:
        return Target(key, None, rearrange)
    dim, start, length = offset
    if dim not in (0, 1):
        subject = f"{lora.name}: layer {name!r}"
        raise GuardError(f"{subject}: slices {key} along dimension {dim}, only 0 and 1 are known: leave it out")
    return Target(key, (int(dim), int(start), int(length)), rearrange)


def _misfit(layer: Adapter, target: Target, shape: tuple[int, ...], subject: str) -> str | None:
    """Why a change has not its target's shape; a conv kernel may come flattened, as ComfyUI's trainer saves it."""
    if target.offset is None and isinstance(layer, LoraLayer) and _shape(layer) == shape:  # nearly all there are
        return None
    dim, start, length = target.offset or (0, 0, 0)
    inside = len(shape) > dim and start + length <= shape[dim]
    wanted = slice_shape(target, shape)  # out in [k k]; out of a bias or a norm
    if inside and _fits(layer, wanted):
        return None
    have = f"{list(_shape(layer))} in the file, {list(wanted)} in {target.key} of {subject}"
    return f"({layer.kind}) is {have}: use a LoRA made for this base"


def _takes_bias(layer: Adapter, target: Target, shape: tuple[int, ...]) -> bool:
    """Whether the bias beside a weight of another shape fits; ComfyUI merges it by itself."""
    bias = getattr(layer, "bias", None)
    return bias is not None and bias.numel() == slice_shape(target, tuple(shape))[0]


def _fits(layer: Adapter, wanted: tuple[int, ...]) -> bool:
    """Whether a file's layer is a change of a weight of shape ``wanted``, and of the bias beside it."""
    if isinstance(layer, WideLoraLayer):
        shape = _shape(layer)
        return len(shape) == len(wanted) == 2 and shape[0] == wanted[0] and shape[1] >= wanted[1]
    if isinstance(layer, LoraLayer):
        return _same(_shape(layer), wanted)
    if isinstance(layer, BiasedLayer):
        return _fits(layer.base, wanted) and layer.bias.numel() == wanted[0]
    if isinstance(layer, DoraLayer):
        lengths = {wanted[0]} if layer.of_sum else {wanted[0], *wanted[1:2]}
        return len(wanted) > 1 and _fits(layer.base, wanted) and layer.magnitude.numel() in lengths
    if isinstance(layer, OftLayer):
        return len(wanted) > 1 and _shape(layer) == wanted[:1]
    if isinstance(layer, DiffLayer):
        bias = layer.bias is None or layer.bias.numel() == wanted[0]
        return bias and (layer.weight is None or _same(tuple(layer.weight.shape), wanted))
    return _same(_shape(layer), wanted)


def _same(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes are one: a kernel may come flattened, or as 1s where there is none."""
    if have == wanted or len(have) < 2 or len(wanted) < 2:
        return have == wanted
    flat = len(have) == 2 and have[1] == math.prod(wanted[1:])
    padded = len(wanted) == 2 and have[:2] == wanted and set(have[2:]) == {1}
    return have[0] == wanted[0] and (flat or padded)


def _shape(layer: Adapter) -> tuple[int, ...]:
    """The shape of the weight that a file's layer changes, as far as its tensors tell; (out,) for OFT or a bias."""
    if isinstance(layer, LoraLayer):
        return (layer.up.shape[0], *layer.down.shape[1:])
    if isinstance(layer, BiasedLayer | DoraLayer):
        return _shape(layer.base)
    if isinstance(layer, LohaLayer):
        return _factor_shape(layer.w1_a, layer.w1_b, layer.t1)
    if isinstance(layer, LokrLayer):
        first = layer.w1.shape if layer.w1 is not None else _factor_shape(layer.w1_a, layer.w1_b, None)
        second = layer.w2.shape if layer.w2 is not None else _factor_shape(layer.w2_a, layer.w2_b, layer.t2)
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    if isinstance(layer, OftLayer):
        return (layer.blocks.shape[0] * layer.blocks.shape[1],)
    if isinstance(layer, SetLayer):
        return tuple(layer.weight.shape)
    return tuple((layer.bias if layer.weight is None else layer.weight).shape)


def _factor_shape(a: Tensor, b: Tensor, middle: Tensor | None) -> tuple[int, ...]:
    """The shape of a @ b (out r, r in·k·k), or of the Tucker product of middle (r r k k), a (r out) and b (r in)."""
    return (a.shape[0], *b.shape[1:]) if middle is None else (a.shape[1], b.shape[1], *middle.shape[2:])
