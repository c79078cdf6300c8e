"""The guard: safety and task LoRAs matched, checked and fused into branches, whole or stopped.

W* = W0 + Σ_s strength·ΔW_s + Σ_t strength·ΔW_t (arXiv 2412.00357, Modular LoRA), with W0 never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ..branches.acted import Meter
from ..branches.attachment import Branches
from ..branches.changes import Owner, Role
from ..branches.fused import FusedLayer, plain
from ..branches.layer_spec import LayerSpec
from ..errors import GuardError
from ..files.matching import mismatch
from ..files.names import is_text
from ..files.pending import check_not_safety
from ..files.reader import LoraFile, no_collection
from ..files.scales import check_scale
from ..provenance.attestation import SAFETY_FIRST, SUM, Attestation, LoraRecord
from ..util.cache import Cache
from .apply import Applied, apply, terms
from .comparing import Factor
from .disguise import check_disguise
from .interference import Interference, cancelled, interference
from .magnitude import check_magnitudes
from .model_info import ModelInfo

Part = Literal["model", "text"]
known_safety: Cache[Hashable, tuple[Mapping[str, LayerSpec], Applied]] = Cache(8)
ROLE_KEY = "modular_lora.role"  # file metadata: "safety" or "task"
BASE_KEY = "modular_lora.base_sha256"  # file metadata: tensor_hashing.weights_sha256 of the W0 it was trained on
CONTAMINATED_KEY = "modular_lora.contaminated_base"  # file metadata: what its base carried, where that was overridden
TRAINED_ON_KEY = "modular_lora.trained_on"  # file metadata: base and LoRAs that were in the forward during training


@dataclass(frozen=True)
class GuardLimits:
    """What the guard insists on of every safety LoRA, and how it lets the others act beside it.

    ``net_strength_floor``: least net strength of the files; ``acted_strength_floor``: of a run (acted.py);
    ``functional_strength_floor``: least functional strength (functional.py) where it is measured.
    """

    net_strength_floor: float = 0.5
    acted_strength_floor: float = 0.5
    functional_strength_floor: float = 0.2
    combine: str = SUM  # or "safety first": how the shares of the LoRAs are put together


@dataclass(frozen=True)
class SafetyLora:
    """A safety LoRA and its strength (> 0), on U-Net and text encoder alike."""

    lora: LoraFile
    strength: float

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise GuardError(
                f"Safety LoRA {self.lora.name}: strength {self.strength} must be above 0: 0 disables it and a "
                "negative value inverts it; take the node out if you do not want it.",
                code="lora.strength",
            )
        check_scale(self.lora.name, self.lora.stated, self.lora.layers, self.lora.scale)


@dataclass(frozen=True)
class TaskLora:
    """A task LoRA, its strengths on model and text encoder, and block weights (see blocks.py)."""

    lora: LoraFile
    strength_model: float
    strength_clip: float
    block_weights: str = ""

    def __post_init__(self):
        if not (math.isfinite(self.strength_model) and math.isfinite(self.strength_clip)):
            raise GuardError(
                f"Task LoRA {self.lora.name}: a strength is not a finite number; give numbers.", code="lora.strength"
            )


Safety = tuple[SafetyLora, ...]
Tasks = tuple[TaskLora, ...]


@dataclass(frozen=True)
class LoraLine:
    """How one LoRA applies to one model: layer counts, rank range and Frobenius norm of strength·ΔW."""

    role: Role
    name: str
    sha256: str
    strength: float
    matched: int
    unmatched: tuple[str, ...]
    elsewhere: int  # layers of the file for the other model (text encoder or U-Net)
    zero_layers: int
    ranks: tuple[int, int]  # of the layers that have one; (0, 0) where none has
    norm: float
    formats: tuple[str, ...] = ()  # of the layers that matched: "LoRA", "LoKr", ...
    left: tuple[tuple[str, str], ...] = ()  # layers that the model has and cannot take, and why
    refusal: str = ""  # what to say if the file applies nowhere else either


@dataclass(frozen=True)
class GuardedPart:
    """The guard on one model (U-Net or text encoder)."""

    part: Part
    branches: Branches
    lines: tuple[LoraLine, ...]
    interference: tuple[tuple[LoraFile, Interference], ...]  # by safety LoRA

    @property
    def layers(self) -> int:
        return len(self.branches.layers)


def check_roles(safety: Safety, tasks: Tasks) -> None:
    """Raise GuardError where no safety LoRA is given, or one file is used twice or in both roles."""
    if not safety:
        raise GuardError("Guard Model got no safety LoRA: connect Load Safety LoRA.", code="guard.no-safety-lora")
    shas = [s.lora.sha256 for s in safety]
    loras = [*(s.lora for s in safety), *(t.lora for t in tasks)]
    for item in tasks:
        if item.lora.sha256 in shas:
            raise GuardError(
                f"{item.lora.name} is the safety LoRA and a task LoRA at once, so one can cancel the other: "
                "take it out of the task LoRAs.",
                code="lora.both-roles",
            )
    shas += [t.lora.sha256 for t in tasks]
    for lora in (lora for lora in loras if not lora.lifted):  # a chain of other packs' loaders may load a file twice
        if shas.count(lora.sha256) > 1:
            raise GuardError(
                f"{lora.name} is loaded more than once: load it once, with the strength you want.", code="lora.twice"
            )


@no_collection()  # a full one takes 0.3 s in ComfyUI
def build_parts(
    model: ModelInfo, clip: ModelInfo | None, safety: Safety, tasks: Tasks, policy: GuardLimits
) -> tuple[GuardedPart, ...]:
    """The guard on a model and, where one is connected, on its text encoder, with every check; raises GuardError."""
    check_roles(safety, tasks)
    parts = on_each(model, clip, safety, tasks, policy)
    check_coverage(parts, clip is not None)
    return parts


def on_each(
    model: ModelInfo, clip: ModelInfo | None, safety: Safety, tasks: Tasks, policy: GuardLimits, enforce: bool = True
) -> tuple[GuardedPart, ...]:
    """`build_part` on a model and, where one is given, on its text encoder; what both have in common is not checked."""
    infos: list[tuple[Part, ModelInfo]] = [("model", model)]
    if clip:
        infos.append(("text", clip))
    return tuple(build_part(part, info, safety, tasks, policy, enforce) for part, info in infos)


def build_part(
    part: Part,
    info: ModelInfo,
    safety: Safety,
    tasks: Tasks,
    policy: GuardLimits,
    enforce: bool = True,
    known: Mapping[TaskLora, Applied] = MappingProxyType({}),
) -> GuardedPart:
    """Match, check and fuse every LoRA on one model.

    ``known``: task LoRAs that were applied to this very model before. Raises GuardError where a safety LoRA does not
    apply whole, or (``enforce``) its net strength falls below ``policy.net_strength_floor``; what of a task LoRA fits
    no layer is counted in its line.
    """
    applied = [apply_safety(s, part, info) for s in safety]
    applied += [known.get(t) or apply_task(t, part, info) for t in tasks]
    reports = compare_all(applied, info, policy, enforce)
    acting = [a for a in applied if a.role == "safety" and a.parts]
    with plain():
        layers = {spec.path: FusedLayer(spec, layer) for spec, layer in terms(applied, info)}
        meter = _meter(acting, policy.acted_strength_floor if enforce else None)
        gives_way = part == "model" and policy.combine == SAFETY_FIRST
        branches = Branches(layers, info.roots, info.parts, meter, gives_way)
    return GuardedPart(part, branches, tuple(_line(a, info.family) for a in applied), reports)


def apply_safety(item: SafetyLora, part: Part, info: ModelInfo) -> Applied:
    """A safety LoRA on one model; GuardError where it does not apply whole."""
    return _apply("safety", item.lora, item.strength, "", part, info)


def apply_task(item: TaskLora, part: Part, info: ModelInfo) -> Applied:
    """A task LoRA on one model; what of it fits no layer is left out and counted."""
    strength = item.strength_model if part == "model" else item.strength_clip
    return _apply("task", item.lora, strength, item.block_weights, part, info)


def compare_all(
    applied: Sequence[Applied], info: ModelInfo, policy: GuardLimits, enforce: bool = True
) -> tuple[tuple[LoraFile, Interference], ...]:
    """What the LoRAs on one model do to each safety LoRA that acts there.

    Raises GuardError for a task LoRA that is a safety LoRA in disguise, for values that are too large, and, with
    ``enforce``, for a net strength below the floor.
    """
    for task in (a for a in applied if a.lora.lifted):
        for s in (a for a in applied if a.role == "safety"):
            check_not_safety((s.lora, s.match), (task.lora, task.match))
    acting = [a for a in applied if a.role == "safety" and a.parts]
    if enforce:
        check_magnitudes(acting, info)  # among themselves, before they are compared with each other
    reports = tuple((a.lora, _interference(a, applied, policy)) for a in acting)
    if enforce:
        check_magnitudes(applied, info)  # first: where values are that large, net strengths mean nothing
        for a, (_, result) in zip(acting, reports, strict=True):
            _check_net_strength(a, result, policy)
            check_disguise(a, [other for other in applied if other is not a], result)
    return reports


def check_coverage(parts: tuple[GuardedPart, ...], has_clip: bool) -> None:
    """Raise GuardError where a task LoRA applies nowhere, or a safety LoRA's text-encoder half has no CLIP."""
    for lines in zip(*(part.lines for part in parts), strict=True):
        first = lines[0]
        if first.role == "safety" and first.elsewhere and not has_clip:
            raise GuardError(
                f"Safety LoRA {first.name} has {first.elsewhere} text-encoder layers and no CLIP is connected: connect "
                "the checkpoint's CLIP to the guard and encode the prompts with the CLIP that it gives.",
                code="guard.no-clip",
            )
        if not any(line.matched for line in lines):
            raise GuardError(_applies_nowhere(lines, has_clip), code="lora.applies-nowhere")


def _applies_nowhere(lines: tuple[LoraLine, ...], has_clip: bool) -> str:
    """Why a LoRA changes nothing; its lines are those of one file on each model."""
    first = lines[0]
    said = [line.refusal for line in lines if line.refusal]
    if not said and not (first.elsewhere and not has_clip):
        said = [f"{first.name} applies to no layer at all: use one made for this base."]
    if first.elsewhere and not has_clip:
        said.append(
            f"{first.name} has {first.elsewhere} text-encoder layers and no CLIP is connected: connect the "
            "checkpoint's CLIP to the guard and encode the prompts with the CLIP that it gives."
        )
    return " ".join(said)


def text_digest(safety: Safety) -> str:
    """What the guarded text encoder's embeddings are bound to; empty where no safety LoRA has a text-encoder half."""
    text = sorted(f"{s.lora.acts_as}@{s.strength!r}" for s in safety if any(map(is_text, s.lora.layers)))
    return hashlib.sha256("\n".join(text).encode()).hexdigest() if text else ""


def make_record(
    pack: str,
    family: str,
    base_sha256: str,
    merged: bool,
    parts: tuple[GuardedPart, GuardedPart | None],
    safety: Safety,
    tasks: Tasks,
    combine: str = SUM,
) -> Attestation:
    """The attestation of a guard that has not run yet."""
    model, text = parts
    loras = [
        LoraRecord("safety", s.lora.name, s.lora.sha256, s.strength, s.strength, scale=s.lora.scale_shown)
        for s in safety
    ]
    for t in tasks:
        strengths = t.strength_model, t.strength_clip, t.block_weights or t.lora.shares
        loras.append(LoraRecord("task", t.lora.name, t.lora.sha256, *strengths, pending=t.lora.pending))
    return Attestation(
        status="not sampled",
        pack=pack,
        base_family=family,
        base_sha256=base_sha256,
        base_had_merged_loras=merged,
        loras=tuple(loras),
        net_strength={lora.sha256: result.net_strength for lora, result in model.interference},
        layers=model.layers,
        varying_layers=len(model.branches.varying),
        text_encoder=f"guarded, {text.layers} layers" if text else "",
        combine=combine,
    )


def notes(
    safety: Safety, tasks: Tasks, base_sha256: str, merged: int, has_clip: bool, combine: str = SUM
) -> Iterator[str]:
    """What is worth a line on the node and stops nothing."""
    if combine == SAFETY_FIRST:
        yield (
            "safety first: the task LoRAs of an image give way where the safety LoRA acts on its prompt, and do not "
            "act in the text encoder"
        )
    if merged:
        yield f"a LoRA or model was merged into {merged} weights before the guard, so the base is not W0"
    for t in tasks:
        if not has_clip and (count := sum(map(is_text, t.lora.layers))) and t.strength_clip:
            yield f"task {t.lora.name} has {count} text-encoder layers that do not act: no CLIP is connected"
        if t.lora.metadata.get(ROLE_KEY) == "safety":
            yield f"{t.lora.name} says that it is a safety LoRA and acts as a task LoRA"
        for key, what in ((CONTAMINATED_KEY, "a base that is not clean"), (TRAINED_ON_KEY, "more than W0")):
            if said := t.lora.metadata.get(key):
                yield f"task {t.lora.name} says that it was trained on {what} ({said[:120]!r}): retrain it on W0"
    loras = [*(s.lora for s in safety), *(t.lora for t in tasks)]
    for lora in loras:
        yield from (f"{lora.name}: {note}" for note in lora.notes)
    if other := [lora.name for lora in loras if lora.metadata.get(BASE_KEY, base_sha256) != base_sha256]:
        yield (
            f"{len(other)} of {len(loras)} LoRAs were recorded on another base of this family ({', '.join(other)}): "
            "normal for community checkpoints, but look at what comes out"
        )


def _apply(role: Role, lora: LoraFile, strength: float, blocks: str, part: Part, info: ModelInfo) -> Applied:
    """`apply`; a safety LoRA on the model that it was last on is remembered with all that was worked out about it."""
    key = (lora.acts_as, lora.name, strength, part)
    known = known_safety.get(key) if role == "safety" else None
    if known is not None and known[0] is info.specs:
        return known[1]
    names = [name for name in lora.layers if is_text(name) == (part == "text")]
    applied = apply(role, lora, names, strength, blocks, info)
    if role == "safety" and all(isinstance(change, Factor) for change in applied.changes.values()):  # not of W0
        known_safety.put(key, (info.specs, applied))
    return applied


def _meter(acting: Sequence[Applied], floor: float | None) -> Meter:
    strengths: dict[Owner, float] = {("safety", a.lora.sha256): a.strength for a in acting}
    names: dict[Owner, str] = {("safety", a.lora.sha256): a.lora.name for a in acting}
    return Meter(strengths, names, floor)


def _interference(safety: Applied, applied: Sequence[Applied], policy: GuardLimits) -> Interference:
    others = [(a.lora.name, a.changes, a.strength) for a in applied if a is not safety]
    return interference(safety.changes, safety.strength, others, policy.net_strength_floor)


def _check_net_strength(safety: Applied, result: Interference, policy: GuardLimits) -> None:
    floor = policy.net_strength_floor
    if not result.net_strength >= floor:  # not a number is too little
        raise GuardError(
            cancelled(result, safety.strength, floor, f"Safety LoRA {safety.lora.name}"), code="guard.net-strength"
        )


def _line(a: Applied, family: str) -> LoraLine:
    targets, unmatched, left = a.match.targets, a.match.unmatched, a.match.left
    layers = [a.lora.layers[name] for name in targets]
    ranks = [layer.rank for layer in layers if layer.rank] or [0]
    return LoraLine(
        role=a.role,
        name=a.lora.name,
        sha256=a.lora.sha256,
        strength=a.strength,
        matched=len(targets),
        unmatched=unmatched,
        elsewhere=len(a.lora.layers) - len(targets.keys() | left.keys()) - len(unmatched),
        zero_layers=len(a.zero),
        formats=tuple(sorted({layer.kind for layer in layers})),
        ranks=(min(ranks), max(ranks)),
        norm=a.norm,
        left=tuple(left.items()),
        refusal="" if targets or not (unmatched or left) else mismatch(a.lora, a.match, family),
    )
