"""Which weight of a model each layer of a LoRA file changes, by ComfyUI's own key map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..branches.layer_spec import LayerSpec
from ..errors import GuardError
from .formats import Adapter
from .names import PEFT
from .reader import LoraFile, describe_base
from .target import Target, slice_shape

_KOHYA = "lora_unet_"
KeyMap = Mapping[str, "str | tuple"]  # file name -> weight key, or (weight key, (dim, start, length), rearrange)


@dataclass(frozen=True)
class Match:
    """Where a file's layers go."""

    targets: dict[str, Target]  # layer name -> target
    unmatched: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)  # layers that the model has and cannot take (whole) -> why
    layers: dict[str, Adapter] = field(default_factory=dict)  # as their targets take them


@dataclass(frozen=True)
class _Candidate:
    """A layer of a file and the weight that it would change."""

    name: str  # in the file
    known: str  # in the key map
    layer: Adapter
    target: Target


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
    found: dict[str, _Candidate] = {}
    holders: dict[tuple, _Candidate] = {}  # place -> who changes it
    left: dict[str, str] = {}
    unmatched = []
    for name in names:
        one = _candidate(lora, name, key_map)
        if one is None or one.target.key not in shapes:
            unmatched.append(name)
            continue
        shape, place = shapes[one.target.key], (one.target.key, one.target.offset)
        lost, why = one, _misfit(one.layer, one.target, shape, subject)
        if why is not None:
            if (bias := _fitting_bias(one, shape)) is not None:
                found[name] = bias
        elif place in holders:
            lost, won = _in_order(holders[place], one, key_map)
            why = f"and {won.name!r} both change {won.target.key} of {subject}: keep one of them in the file"
            found.pop(lost.name, None)
            holders[place] = found[won.name] = won
        else:
            holders[place] = found[name] = one
            continue
        if whole:
            raise GuardError(f"{lora.name}: layer {lost.name!r} {why}", code="lora.not-whole")
        left[lost.name] = why
    targets, layers = {name: c.target for name, c in found.items()}, {name: c.layer for name, c in found.items()}
    return Match(targets, tuple(unmatched), left, layers)


def take_layers(lora: LoraFile, match: Match, specs: Mapping[str, LayerSpec], whole: bool) -> Match:
    """What of a match the layers of a model take: of a change with a bias, that of the weight where there is no bias.

    ``specs``: of every weight and bias key. Raises GuardError where the file is to apply ``whole`` and does not.
    """
    taken = Match({}, match.unmatched, dict(match.left))
    for name, target in match.targets.items():
        layer: Adapter | None = match.layers[name]
        if (why := _problem(match.layers[name], specs[target.key])) is not None:
            if whole:
                raise GuardError(f"{lora.name}: layer {name} {why}.", code="lora.not-whole")
            taken.left[name] = why
            layer, _ = match.layers[name].split()
        if layer is not None and _problem(layer, specs[target.key]) is None:
            taken.targets[name], taken.layers[name] = target, layer
    return taken


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
    if name.startswith(_KOHYA):  # sliders for Flux: LECO's prefix before diffusers' names, which the map has as below
        yield f"lora_transformer_{name.removeprefix(_KOHYA)}"


def _candidate(lora: LoraFile, name: str, key_map: KeyMap) -> _Candidate | None:
    known = name if name in key_map else next((v for v in _variants(name) if v in key_map), None)
    return None if known is None else _Candidate(name, known, lora.layers[name], _target(key_map[known], lora, name))


def _in_order(first: _Candidate, second: _Candidate, key_map: KeyMap) -> tuple[_Candidate, _Candidate]:
    """Two layers of one place in the map's order: ComfyUI takes the last."""
    order = list(key_map)
    return (second, first) if order.index(second.known) < order.index(first.known) else (first, second)


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
        raise GuardError(
            f"{subject}: slices {key} along dimension {dim}, only 0 and 1 are known: leave it out", code="layer.slice"
        )
    return Target(key, (int(dim), int(start), int(length)), rearrange)


def _misfit(layer: Adapter, target: Target, shape: tuple[int, ...], subject: str) -> str | None:
    """Why a change has not its target's shape; a conv kernel may come flattened, as ComfyUI's trainer saves it."""
    dim, start, length = target.offset or (0, 0, 0)
    inside = len(shape) > dim and start + length <= shape[dim]
    wanted = slice_shape(target, shape)  # out in [k k]; out of a bias or a norm
    if inside and layer.fits(wanted):
        return None
    have = f"{list(layer.shape)} in the file, {list(wanted)} in {target.key} of {subject}"
    return f"({layer.kind}) is {have}: use a LoRA made for this base"


def _fitting_bias(one: _Candidate, shape: tuple[int, ...]) -> _Candidate | None:
    """The change of the bias beside a weight of another shape, where that fits; ComfyUI merges it by itself."""
    _, bias = one.layer.split()
    if bias is None or not bias.fits(slice_shape(one.target, tuple(shape))):
        return None
    return replace(one, layer=bias)


def _problem(layer: Adapter, spec: LayerSpec) -> str | None:
    """Why the layer of a model cannot take such a change, or None."""
    if spec.problem and not (spec.norm and layer.on_norms):
        return f"is {spec.problem} and takes no branch; use a LoRA without it"
    if not spec.bias and layer.split()[1] is not None:
        return f"changes a bias, and {spec.path} has none: use a LoRA made for this base"
    return None
