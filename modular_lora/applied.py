"""One LoRA on one model: matched, checked, and taken apart into what its branches compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from .adapters import Adapter, BiasedLayer, DiffLayer, DoraLayer, SetLayer
from .blocks import block_of, parse_block_weights
from .changes import Bias, LowRank, Part, Role, Term, dense
from .comparing import Changes, change, measure
from .errors import GuardError, shown
from .files import LoraFile
from .layers import LayerSpec, bias_key
from .matching import Match, match_layers, mismatch
from .model import ModelInfo
from .resolve import Parts, power, resolve


@dataclass(frozen=True)
class Applied:
    """One LoRA on one model; ``parts`` and ``changes`` are those at strength 1, block weights folded in."""

    role: Role
    lora: LoraFile
    strength: float
    match: Match
    zero: tuple[str, ...]  # matched layers of the file that change nothing
    parts: dict[str, Parts]  # weight or bias key -> parts and what they are multiplied by
    changes: Changes  # the same, to compare

    @cached_property
    def norm(self) -> float:
        """Of strength·ΔW over all weights."""
        measure(self.changes.values())
        return abs(self.strength) * math.sqrt(math.fsum(c.energy for c in self.changes.values()))


def apply(role: Role, lora: LoraFile, names: Sequence[str], strength: float, blocks: str, info: ModelInfo) -> Applied:
    """Match, check and resolve ``names`` (layers of ``lora``) on one model; ``blocks``: see blocks.py.

    What of a task LoRA fits no layer is left out and counted. Raises GuardError where a safety LoRA does not apply
    whole.
    """
    if role == "safety" and lora.unread:
        first = shown(lora.unread[0])
        what = f"holds {len(lora.unread)} tensors of no LoRA format, first {first}, and cannot apply whole"
        raise GuardError(f"Safety LoRA {lora.name} {what}: export the file again without them.")
    specs = info.places
    shapes = {key: spec.weight_shape if key in info.specs else (spec.outputs,) for key, spec in specs.items()}
    match = match_layers(lora, names, lora.places or info.key_map, shapes, info.family, whole=role == "safety")
    if role == "safety" and match.unmatched:
        raise GuardError(mismatch(lora, match, info.family))
    adapters = dict(_taken(role, lora, match, specs))
    weights = parse_block_weights(blocks, (t.key for t in match.targets.values()), info.specs, lora.name)
    parts: dict[str, list[tuple[Part, float]]] = {}
    zero = []
    for name, adapter in adapters.items():
        target, spec = match.targets[name], specs[match.targets[name].key]
        found = resolve(adapter, target, spec, info.weight)
        zero += [name] if _does_nothing(adapter, found, partial(info.weight, target.key)) else []
        block = weights.get(block_of(target.key), 1.0) if weights else 1.0
        factor = _factor(strength, block, power(adapter))
        for part, scale in found:
            key = bias_key(target.key) if isinstance(part, Bias) else target.key
            parts.setdefault(key, []).append((part, scale * factor))
    if role == "safety" and zero:
        raise GuardError(
            f"Safety LoRA {lora.name}: layer {min(zero)} ({len(zero)} in all) is all zero and would do nothing; "
            "train or export the file again."
        )
    changes = {
        key: change([(_compared(part, role, specs[key]), scale) for part, scale in found], partial(info.weight, key))
        for key, found in parts.items()
    }
    return Applied(role, lora, strength, match, tuple(zero), {k: tuple(p) for k, p in parts.items()}, changes)


def terms(applied: Sequence[Applied], info: ModelInfo) -> Iterator[tuple[LayerSpec, list[Term]]]:
    """What every layer computes beside its weight; parts of strength 0 are left out."""
    specs, found = info.places, {}
    for a in applied:
        for key, parts in a.parts.items():
            owner = a.lora.sha256 if a.role == "safety" else ""
            layer = [Term(a.role, part, a.strength * scale, owner) for part, scale in parts if a.strength * scale != 0]
            found.setdefault(specs[key].path, (specs[key], []))[1].extend(layer)
    return ((_widened(spec, layer), layer) for spec, layer in found.values() if layer)


def _compared(part: Part, role: Role, spec: LayerSpec) -> Part:
    """A part as two LoRAs are compared: on the inputs that W0 has, the safety LoRA's in fp32, for it is kept."""
    if isinstance(part, LowRank) and part.down.shape[1] > spec.inputs:
        part = LowRank(part.down[:, : spec.inputs], part.up)
    if isinstance(part, LowRank) and role == "safety":
        part = LowRank(part.down.float(), part.up.float())
    return part


def _widened(spec: LayerSpec, terms: Sequence[Term]) -> LayerSpec:
    """The layer with as many inputs as the widest LoRA gives it."""
    inputs = max((t.part.down.shape[1] for t in terms if isinstance(t.part, LowRank)), default=0)
    return spec.widened(inputs, spec.inputs) if inputs > spec.inputs else spec


def _does_nothing(adapter: Adapter, parts: Parts, W0: Callable[[], Tensor]) -> bool:
    """Whether a layer changes nothing; of a DoRA over zeros and of a replaced weight only W0 tells, to rounding."""
    if isinstance(adapter, SetLayer):
        stored = adapter.weight
    elif isinstance(adapter, DoraLayer) and adapter.base.is_zero:
        stored = adapter.magnitude
    else:
        return adapter.is_zero
    total = sum(scale * dense(part, W0) for part, scale in parts)
    return float(total.norm()) <= torch.finfo(stored.dtype).eps * float(W0().norm())


def _factor(strength: float, block: float, power: int) -> float:
    """What a layer is multiplied by beside its strength: (strength·block)^power / strength; nothing at strength 0."""
    if power == 0 and strength * block == 0:
        return 0.0
    return block * (strength * block) ** (power - 1)


def _taken(role: Role, lora: LoraFile, match: Match, specs: Mapping[str, LayerSpec]) -> Iterator[tuple[str, Adapter]]:
    """The matched layers as their targets take them; the others move to ``match.left``, GuardError in a safety LoRA."""
    for name, target in list(match.targets.items()):
        adapter, spec = lora.layers[name], specs[target.key]
        if name in match.left:  # the weight has another shape
            adapter = DiffLayer(name, None, adapter.bias)
        why = _problem(adapter, spec)
        if why is not None and role == "safety":
            raise GuardError(f"{lora.name}: layer {name} {why}.")
        if why is not None:
            match.left[name] = why
            adapter = _without_bias(adapter)
        if adapter is None or _problem(adapter, spec):
            del match.targets[name]
        else:
            yield name, adapter


def _without_bias(adapter: Adapter) -> Adapter | None:
    """The change of the weight alone."""
    if isinstance(adapter, BiasedLayer):
        return adapter.base
    if isinstance(adapter, DiffLayer) and adapter.weight is not None:
        return DiffLayer(adapter.name, adapter.weight, None)
    return None


def _problem(adapter: Adapter, spec: LayerSpec) -> str | None:
    """Why the layer cannot take such a change, or None."""
    if spec.problem and not (spec.norm and isinstance(adapter, DiffLayer | SetLayer)):
        return f"is {spec.problem} and takes no branch; use a LoRA without it"
    if isinstance(adapter, DiffLayer | BiasedLayer) and adapter.bias is not None and not spec.bias:
        return f"changes a bias, and {spec.path} has none: use a LoRA made for this base"
    return None
