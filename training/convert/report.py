"""What is said of converted weights: which method wrote them, whether W0 is the right one, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...modular_lora.errors import shown
from ...modular_lora.files import erased
from .difference import ConvertOptions, Part
from .errors import ConvertError
from .names import Parts
from .weights import Weights

FAR, FAR_UNPROVEN = 1.0, 0.1  # of ‖ΔW‖ / ‖W0‖ in a part; the latter where nothing else shows that W0 is the right one
_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Made:
    """A conversion, as the report shows it."""

    weights: Weights
    base: Weights
    method: str
    parts: tuple[Part, ...]
    rounded: str
    residual: float


def described(layout: erased.Layout | None) -> str:
    """A layout and its methods in words."""
    return f"{layout.what}, as saved by {layout.named}" if layout else "of no layout that is known by name"


def method(weights: Weights, ours: Parts, parts: Sequence[Part]) -> str:
    """The methods that save such a file, as far as names, types and the changed weights tell them."""
    dtypes = {str(get().dtype).removeprefix("torch.") for names in ours.values() for get in names.values()}
    layout = erased.recognise(weights.names, weights.pickled, {_TYPES.get(one, one) for one in dtypes})
    if weights.folder and len(ours) > 1:
        layout = erased.PIPELINE
    said = described(layout)
    if layout is None or not layout.whole:
        return said
    inner = erased.Found([name for part in parts for name in part.changed])
    kinds = sorted({f"{block}.{what}" for block, what in inner.attention})
    where = ", ".join(kinds) if inner.all_attention else f"{len(inner.names)} weights of several kinds"
    return f"{said}; changed: {where}"


def check_far(weights: Weights, base: Weights, part: Part, o: ConvertOptions) -> None:
    """ConvertError for a change that no eraser makes: W0 is another base.

    It is asked before the ranks are known, which may prove W0, and after.
    """
    unknown = not (part.ranks or part.full)  # no rank is known yet
    largest = math.inf if o.base_sha256 else FAR if part.proof or unknown else FAR_UNPROVEN
    if part.energy and part.change > largest:
        why = part.proof or "none of its weights is W0's own, and the change has no low rank"
        raise ConvertError(
            f"{weights.name}: the {part.name} differs from {base.name} by {part.change:.3g} of |W0|, and at most "
            f"{largest:g} is taken for an eraser's change ({why}): this is another base, or no eraser's work. Use the "
            "base that the eraser started from, or confirm this one with --base_sha256.",
            code="convert.other-base",
        )


def check_carried(weights: Weights, base: Weights, parts: Sequence[Part], o: ConvertOptions) -> None:
    """ConvertError where nothing is changed, or what no LoRA carries."""
    if not any(part.energy for part in parts):
        raise ConvertError(
            f"{weights.name}: every weight is that of {base.name}: nothing was erased in it, or it is the base itself.",
            code="convert.no-change",
        )
    for part in parts:
        if part.embeddings and not o.leave_out_embeddings:
            raise ConvertError(
                f"{weights.name}: changes {part.embeddings[0]}, {part.left_out / part.energy:.1%} of the {part.name}'s "
                "change, and an embedding takes no branch: use the text encoder itself in Load CLIP, or leave it out "
                "with --leave_out_embeddings, where the residual counts it.",
                code="convert.embedding",
            )
    if not any(part.changed for part in parts):
        raise ConvertError(
            f"{weights.name}: only embeddings are changed, which no LoRA carries: use the text encoder itself.",
            code="convert.embedding",
        )


def check_residual(weights: Weights, parts: Sequence[Part], residual: float, o: ConvertOptions) -> None:
    """ConvertError where the factors are not W_safe − W0, with what makes them so."""
    if residual > o.limit:
        raise ConvertError(
            f"{weights.name}: |W0 + UD - W_safe| / |dW| is {residual:.3g}, and at most {o.limit:g} is allowed: "
            f"{_remedy(parts, o)}.",
            code="convert.residual",
        )


def _remedy(parts: Sequence[Part], o: ConvertOptions) -> str:
    if sum(part.left_out for part in parts) > o.limit**2 * sum(part.energy for part in parts):
        return "the embeddings that are left out are more than that: use the text encoder itself in Load CLIP"
    if o.rank and any(part.inexact for part in parts):
        return f"give a larger --rank than {o.rank}, or 0 for as many as are needed"
    if sum(part.noise for part in parts) > o.limit**2 * sum(part.energy for part in parts):
        return (
            "the rounding of the file's type is more than that: ask for the weights in fp32, or give a larger --limit"
        )
    return "save it as float, or give a larger --limit"


def report(name: str, said: Made, o: ConvertOptions) -> str:
    """What came out, as lines."""
    taken = f"rounded to {said.rounded}, which leaves the smaller rest" if said.rounded else "as it is"
    lines = [
        f"{name}: safety LoRA of {said.weights.name}",
        f"  recognised: {said.method}",
        f"  W0: {said.base.name}, {taken}" + (", its SHA-256 is the given one" if o.base_sha256 else ""),
        *(line for part in said.parts for line in _part(part)),
    ]
    if ignored := said.weights.ignored:
        lines.append(f"  {len(ignored)} entries of the file are not tensors and were left (first {shown(ignored[0])})")
    proof = f"|W0 + UD - W_safe| / |dW| = {said.residual:.3g}, limit {o.limit:g}"
    return "\n".join([*lines, f"  proof: {proof}; whether it erases anything is not shown by this"])


def _part(part: Part) -> list[str]:
    if not part.energy:
        return [f"  {part.name}: all {part.tensors} weights are W0's own"]
    proof = part.proof or f"not shown by the weights, only that |dW| is below {FAR_UNPROVEN:g} of |W0|"
    lines = [
        f"  {part.name}: {len(part.changed) + len(part.embeddings)} of {part.tensors} weights changed, "
        f"|dW| / |W0| = {part.change:.3g}",
        f"    the right base: {proof}",
    ]
    if part.ranks:
        ranks = ", ".join(f"{rank} ({count})" for rank, count in sorted(part.ranks.items()))
        kept = f"{1 - part.rest / part.energy:.2%} of the energy kept"
        how = (
            f"{part.inexact} of them chosen by the limit or --rank, {kept}" if part.inexact else "the rest is rounding"
        )
        lines.append(f"    rank (layers) {ranks}; {how}")
    if part.full:
        lines.append(f"    {part.full} layers are full differences, smaller than factors of their rank")
    if part.embeddings:
        lines.append(f"    left out: {', '.join(part.embeddings)}, {part.left_out / part.energy:.2%} of the energy")
    lines.append(f"    rounding of the file's type: {math.sqrt(part.noise / part.energy):.2g} of |dW|")
    return lines
