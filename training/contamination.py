"""Whether a base carries a safety LoRA already: a registry of known bases first, then a test of the weights.

The paper (arXiv 2412.00357) trains task LoRAs on W0, never on a safety-tuned model: such a task LoRA undoes the safety
LoRA that it was trained on. The registry knows bases by the hash of their contents, which a re-save does not change.
The test needs no W0: with D the safety LoRA's ΔW = alpha/rank·B·A and W the weights in question,

    T = Σ_l ⟨W_l, D_l⟩ / Σ_l ‖D_l‖²

is near 0 for a base that D never touched and near s where D was merged at strength s. Its deviation for a clean base is
the larger of two: that of random directions of the same norms, which have ⟨W_l, D_l⟩ of variance ‖W_l‖²‖D_l‖²/(out·in),
and the spread of the layers' own estimates about T, which sees structure that random directions miss. An erasure that
was trained anew, or put into another basis, escapes the test; the registry is the first gate.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..modular_lora.branches.changes import Part
from ..modular_lora.branches.layer_spec import LayerSpec
from ..modular_lora.errors import GuardError
from ..modular_lora.files.formats import LoraLayer, Scaled
from ..modular_lora.files.matching import match_layers
from ..modular_lora.files.names import is_text
from ..modular_lora.files.reader import LoraFile
from ..modular_lora.files.target import Place
from ..modular_lora.guard.build import CONTAMINATED_KEY, ROLE_KEY, TRAINED_ON_KEY, ModelInfo
from ..modular_lora.guard.comparing import Change, Factor, change, factors, inner, norm
from ..modular_lora.util import plain_json

LEAST_Z, LEAST_T = 6.0, 0.15  # both must be exceeded; docs/figures/contamination.json has what they cost and find
WHOLE = 0.02  # of strength 1: this close, taking the LoRA out again gives W0 up to rounding
KNOWN_BASES = Path(__file__).parent / "known_bases.json"

Verdict = Literal["clean", "contains", "subtracted"]
_log = logging.getLogger("modular_lora")


@dataclass(frozen=True)
class KnownBase:
    """A registry's entry."""

    name: str
    status: Literal["clean", "contaminated"]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """T of one safety LoRA on one base."""

    safety: str
    strength: float  # T
    deviation: float  # of T on a clean base
    layers: int
    missing: int  # layers of the file whose weight the base does not have

    @property
    def z(self) -> float:
        return self.strength / self.deviation if self.deviation else math.copysign(math.inf, self.strength)

    @property
    def verdict(self) -> Verdict:
        if abs(self.strength) <= LEAST_T or abs(self.z) <= LEAST_Z:
            return "clean"
        return "contains" if self.strength > 0 else "subtracted"

    @property
    def least_seen(self) -> float:
        """The least strength that this test can tell."""
        return max(LEAST_T, LEAST_Z * self.deviation)

    def __str__(self) -> str:
        figures = f"T {self.strength:+.3f}, z {self.z:+.1f} over {self.layers} layers"
        if self.verdict == "contains":
            return f"contains the safety LoRA {self.safety} at strength {self.strength:.2f} ({figures})"
        if self.verdict == "subtracted":
            return f"had the safety LoRA {self.safety} subtracted at strength {-self.strength:.2f} ({figures})"
        return f"no sign of {self.safety} at a strength above {self.least_seen:.2f} ({figures})"


def known_bases(*paths: str | Path) -> dict[str, KnownBase]:
    """The bundled registry and those at ``paths``, the last one first where they name the same base.

    A registry is JSON: {content sha256: {"name", "status": "clean" or "contaminated", "note"}}, the hash as
    tensor_hashing.weights_sha256 gives it. Raises GuardError with file, entry and remedy.
    """
    found: dict[str, KnownBase] = {}
    for path in (KNOWN_BASES, *paths):
        try:
            table = plain_json.read_object(path)
        except (OSError, ValueError) as error:
            raise GuardError(
                f"{path}: is not a readable registry of bases ({error}): mend or remove the file.",
                code="bases.unreadable",
            ) from error
        found |= {_digest(path, sha256): _entry(path, sha256, entry) for sha256, entry in table.items()}
    return found


def measure(
    weights: Mapping[str, Tensor],
    safety: LoraFile,
    infos: Sequence[ModelInfo] = (),
    base: Mapping[str, Tensor] | None = None,
) -> Finding:
    """T of a safety LoRA on ``weights`` (weight key -> W, read one after the other; a LoRA is never multiplied out).

    Keys are those of ``infos`` (U-Net and text encoder); without ``infos`` they are the file's layer names. With a
    trusted W0 in ``base`` T is taken of W − W0, so it is the merged strength itself. Raises GuardError where the base
    has none of the file's layers.
    """
    found = _changes(safety, infos)
    overlaps, energies, variance = [], [], 0.0
    for key, D in found.items():
        if key not in weights:
            continue
        W = _difference(weights, base, key)  # out in·k·k
        shape = (D.up.shape[0], D.down.shape[1]) if isinstance(D, Factor) else D.dense().shape
        if W.shape != shape:
            raise GuardError(
                f"{safety.name}: layer of {key} is {list(shape)}, the base's weight {list(W.shape)}: use a LoRA made "
                "for this base.",
                code="base.other-shape",
            )
        overlaps.append(_overlap(W, D))
        energies.append(norm(D) ** 2)
        variance += float(torch.linalg.vector_norm(W)) ** 2 * energies[-1] / W.numel()
    total = math.fsum(energies)
    if not total:
        raise GuardError(
            f"{safety.name}: the base has none of its {len(found)} layers: use a LoRA made for this base.",
            code="base.no-such-layers",
        )
    T = math.fsum(overlaps) / total
    spread = math.fsum((o - T * e) ** 2 for o, e in zip(overlaps, energies, strict=True))
    spread *= len(energies) / max(len(energies) - 1, 1)
    deviation = math.sqrt(max(variance, spread)) / total
    return Finding(safety.name, T, deviation, len(energies), len(found) - len(energies))


def check_base(
    name: str,
    base_sha256: str,
    weights: Mapping[str, Tensor],
    safety: Sequence[LoraFile],
    infos: Sequence[ModelInfo] = (),
    *,
    known: Mapping[str, KnownBase],
    allow: bool = False,
) -> str:
    """Refuse a base that carries a safety LoRA; what goes into the file's metadata where that is allowed, else "".

    ``name`` is the base's, for messages; ``base_sha256`` is of its U-Net. A U-Net that ``known`` calls clean is not
    tested; a text encoder is, on its own, since a safety LoRA may be merged into one of the two. Raises GuardError.
    """
    entry = known.get(base_sha256)
    clean = entry is not None and entry.status == "clean"
    problems = []
    if entry and not clean:
        problems.append(f"is known as contaminated: {entry.name}" + f" ({entry.note})" * bool(entry.note))
    remedy = "train on the original base W0"
    for lora in (half for whole in safety for half in _halves(whole, weights, infos, clean)):
        finding = measure(weights, lora, infos)
        _log.info("%s: %s", name, finding)
        if finding.verdict != "clean":
            problems.append(str(finding))
            if abs(finding.strength - 1) < WHOLE:
                remedy = f"train on the original base W0, or merge {lora.name} into it at strength −1 first"
        elif finding.least_seen >= 1:
            _log.warning("%s: %s is too small beside the weights to be found if it was merged", name, lora.name)
    if problems and not allow:
        raise GuardError(
            f"{name} {'; '.join(problems)}: {remedy}, or set allow_contaminated_base (the file says so).",
            code="base.contaminated",
        )
    if problems:
        _log.warning("%s %s: trained on all the same (allow_contaminated_base)", name, "; ".join(problems))
    return "; ".join(problems)


def check_start(
    start: LoraFile,
    safety: Sequence[LoraFile],
    infos: Sequence[ModelInfo] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse to train a task LoRA on from a file that is, holds or was trained on a safety LoRA; raises GuardError.

    ``weights``: W0 by weight key, of which the change of a DoRA or an OFT is a function.
    """
    remedy = "start from a task LoRA that was trained on W0, or from none"
    if start.metadata.get(ROLE_KEY) == "safety" or start.sha256 in {lora.sha256 for lora in safety}:
        raise GuardError(f"{start.name} is a safety LoRA: {remedy}.", code="start.safety-lora")
    for key in (CONTAMINATED_KEY, TRAINED_ON_KEY):
        if said := start.metadata.get(key):
            raise GuardError(
                f"{start.name} says that it was not trained on W0 alone ({key} {said[:120]!r}): {remedy}.",
                code="start.contaminated",
            )
    ours = _changes(start, infos, weights) if safety else {}
    for lora in safety:
        theirs = _changes(lora, infos)
        energy = math.fsum(norm(D) ** 2 for D in theirs.values())
        s = math.fsum(inner(ours[key], D) for key, D in theirs.items() if key in ours) / energy if energy else 0.0
        if s > LEAST_T:
            raise GuardError(
                f"{start.name} contains the safety LoRA {lora.name} at strength {s:.2f}: {remedy}.",
                code="start.contaminated",
            )


def _halves(
    lora: LoraFile, weights: Mapping[str, Tensor], infos: Sequence[ModelInfo], only_text: bool
) -> list[LoraFile]:
    """The file's U-Net half (unless ``only_text``) and text-encoder half, those of which the base has a weight."""
    halves = []
    for text, part in ((False, "U-Net"), (True, "text encoder")):
        layers = {n: x for n, x in lora.layers.items() if is_text(n) is text}
        halves.append(replace(lora, name=f"{lora.name} ({part})", layers=layers))
    present = [half for half in halves if not weights.keys().isdisjoint(_changes(half, infos))]
    if not present:
        raise GuardError(
            f"{lora.name}: the base has none of its {len(lora.layers)} layers: use one made for this base.",
            code="base.no-such-layers",
        )
    return [half for half in present if not (only_text and half is halves[0])]


def _changes(
    lora: LoraFile, infos: Sequence[ModelInfo], weights: Mapping[str, Tensor] | None = None
) -> dict[str, Change]:
    """All layers by weight key, or by their own names where no model is given.

    LoraFileError where a change is a function of weights that are not given (DoRA, OFT).
    """
    if not infos:
        return {n: Factor.of(x) for n, x in lora.plain.items()}
    if not all(isinstance(layer, Scaled) or weights is not None for layer in lora.layers.values()):
        lora.plain  # noqa: B018, it raises, and says of which layer
    found: dict[str, Change] = {}
    for info in infos:
        shapes = {key: spec.weight_shape for key, spec in info.specs.items()}
        match = match_layers(lora, lora.layers, info.key_map, shapes, info.family)
        if all(isinstance(lora.layers[name], LoraLayer) for name in match.targets):
            found |= factors(lora, match, shapes)
            continue
        parts: dict[str, list[tuple[Part, float]]] = {}
        for name, target in match.targets.items():
            place = Place(target, LayerSpec("", shapes[target.key]), lambda key: (weights or {})[key])
            changes = lora.layers[name].change(place)
            inputs = math.prod(shapes[target.key][1:])
            parts.setdefault(target.key, []).extend((part.compared(inputs, True), scale) for part, scale in changes)
        for key, each in parts.items():
            found[key] = change(each, partial((weights or {}).__getitem__, key))
    return found


def _difference(weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, key: str) -> Tensor:
    """W or W − W0 (out in·k·k), float32, where W lies."""
    W = weights[key].detach().float().flatten(1)
    return W if base is None else W - base[key].detach().to(W).flatten(1)


def _overlap(W: Tensor, D: Change) -> float:
    """⟨W, scale·U·D⟩ = scale·tr(Uᵀ W Dᵀ): two thin products, the larger one over W; of other forms ⟨W, ΔW⟩ as it is."""
    if not isinstance(D, Factor):
        return float((W.cpu() * D.dense()).sum(dtype=torch.float64))
    thin = D.up.to(W).T @ W  # r in·k·k
    return D.scale * float((thin.cpu().double() * D.down.double()).sum())


def _digest(path: str | Path, sha256: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise GuardError(
            f"{path}: {sha256[:80]!r} is not 64 hex digits in lower case: copy the base's hash again.",
            code="bases.entry",
        )
    return sha256


def _entry(path: str | Path, sha256: str, entry: object) -> KnownBase:
    fields = {"name", "status", "note"}
    if (
        not isinstance(entry, dict)
        or not {"name", "status"} <= set(entry) <= fields
        or not all(isinstance(value, str) for value in entry.values())
        or entry["status"] not in ("clean", "contaminated")
    ):
        raise GuardError(
            f"{path}: entry of {sha256[:16]} needs name, status (clean, contaminated), note: correct it.",
            code="bases.entry",
        )
    return KnownBase(**entry)
