"""One LoRA on one model: matched, checked, and taken apart into what its branches compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from ..branches.changes import Bias, LowRank, Part, Parts, Role, Term
from ..branches.layer_spec import LayerSpec, bias_key
from ..errors import GuardError, shown
from ..files.block_weights import block_of, parse_block_weights
from ..files.matching import Match, match_layers, mismatch, take_layers
from ..files.reader import LoraFile
from ..files.target import Place
from .comparing import Changes, change, measure
from .model_info import ModelInfo


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
        raise GuardError(
            f"Safety LoRA {lora.name} {what}: export the file again without them.", code="lora.unread-tensors"
        )
    specs = info.places
    shapes = {key: spec.weight_shape if key in info.specs else (spec.outputs,) for key, spec in specs.items()}
    match = match_layers(lora, names, lora.places or info.key_map, shapes, info.family, whole=role == "safety")
    if role == "safety" and match.unmatched:
        raise GuardError(mismatch(lora, match, info.family), code="lora.not-whole")
    match = take_layers(lora, match, specs, whole=role == "safety")
    weights = parse_block_weights(blocks, (t.key for t in match.targets.values()), info.specs, lora.name)
    parts: dict[str, list[tuple[Part, float]]] = {}
    zero = []
    for name, adapter in match.layers.items():
        target = match.targets[name]
        found = adapter.resolve(Place(target, specs[target.key], info.weight))
        zero += [name] if adapter.does_nothing(found, partial(info.weight, target.key)) else []
        block = weights.get(block_of(target.key), 1.0) if weights else 1.0
        block *= lora.factors.get(name, 1.0)
        factor = _factor(strength, block, adapter.inner.power)
        for part, scale in found:
            key = bias_key(target.key) if isinstance(part, Bias) else target.key
            parts.setdefault(key, []).append((part, scale * factor))
    if role == "safety" and zero:
        raise GuardError(
            f"Safety LoRA {lora.name}: layer {min(zero)} ({len(zero)} in all) is all zero and would do nothing; "
            "train or export the file again.",
            code="lora.zero-layer",
        )
    changes = {
        key: change([(p.compared(specs[key].inputs, role == "safety"), s) for p, s in found], partial(info.weight, key))
        for key, found in parts.items()
    }
    return Applied(role, lora, strength, match, tuple(zero), {k: tuple(p) for k, p in parts.items()}, changes)


def terms(applied: Sequence[Applied], info: ModelInfo) -> Iterator[tuple[LayerSpec, list[Term]]]:
    """What every layer computes beside its weight; parts of strength 0 are left out."""
    specs, found = info.places, dict[str, tuple[LayerSpec, list[Term]]]()
    for a in applied:
        for key, parts in a.parts.items():
            owner = a.lora.sha256 if a.role == "safety" else ""
            layer = [Term(a.role, part, a.strength * scale, owner) for part, scale in parts if a.strength * scale != 0]
            found.setdefault(specs[key].path, (specs[key], []))[1].extend(layer)
    return ((_widened(spec, layer), layer) for spec, layer in found.values() if layer)


def _widened(spec: LayerSpec, terms: Sequence[Term]) -> LayerSpec:
    """The layer with as many inputs as the widest LoRA gives it."""
    inputs = max((t.part.down.shape[1] for t in terms if isinstance(t.part, LowRank)), default=0)
    return spec.with_inputs(inputs, spec.inputs) if inputs > spec.inputs else spec


def _factor(strength: float, block: float, power: int) -> float:
    """What a layer is multiplied by beside its strength: (strength·block)^power / strength; nothing at strength 0."""
    if power == 0 and strength * block == 0:
        return 0.0
    return block * (strength * block) ** (power - 1)
