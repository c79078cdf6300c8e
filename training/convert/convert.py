"""Published weights in, a safety LoRA out: ΔW = W_safe − W0, layer by layer, with the proof of what came out.

Nothing is trained and nothing drawn. What is shown is that W0 + UD is W_safe up to a stated rest; whether W_safe erases
anything is what its authors claim, and what the audit measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...modular_lora.errors import GuardError, shown
from ...modular_lora.files import erased
from ...modular_lora.files.names import sort_names
from ...modular_lora.files.reader import LoraFile
from ...modular_lora.places import check_writable
from ...version import VERSION
from ..metadata_keys import BASE_FILE_KEY, CONVERTED_KEY, RESIDUAL_KEY
from ..output import write_tensors
from ..safety.metadata import safety_metadata
from . import report
from .difference import ConvertOptions, Difference, Part, rounded_to
from .errors import ConvertError
from .names import Parts, by_part, same_names
from .weights import Get, Weights, open_weights

ADAPTER = "a LoRA in PyTorch's format, as sliders, LECO, SPM and MACE's adapters are saved"
_FAMILIES = {768: "SD15", 1024: "SD20", 2048: "SDXL"}  # by the width of the text in cross-attention


@dataclass(frozen=True)
class Converted:
    """A safety LoRA file that was written, and what is said of it.

    Attributes:
        lora: the file as read back.
        method: what was recognised.
        parts: what was found, model by model; none where a LoRA was saved again.
        rounded: the type that W0 was rounded to, "" where it was taken as it is.
        residual: ‖W0 + UD − W_safe‖ / ‖ΔW‖ over all weights, with the factors as saved.
        report: all of it in words.
    """

    lora: LoraFile
    method: str
    parts: tuple[Part, ...]
    rounded: str
    residual: float
    report: str


def convert(source: Path, base: Path | None, to: Path, o: ConvertOptions) -> Converted:
    """Write the safety LoRA of published weights.

    Args:
        source: Erased weights (file or folder), or a LoRA in PyTorch's own format.
        base: W0 (file or folder); not needed for a LoRA.
        to: The new .safetensors file.
        o: See `ConvertOptions`.

    Raises:
        ConvertError: what was recognised, and why it does not become a safety LoRA.
    """
    _check_output(to)
    weights = open_weights(source, "weights")
    layout = erased.recognise(weights.names, weights.pickled)
    if layout is not None and not layout.convertible:
        what = f"{weights.name}: is {layout.named}: {layout.what}"
        raise ConvertError(f"{what}: {erased.remedy(layout, weights.name)}.", code="convert.no-lora-can")
    if (lora := _lora(weights)) is not None:
        return _saved_again(weights, lora, to, o)
    if base is None:
        raise ConvertError(
            f"{weights.name}: is {report.described(layout)}: name the weights that it was made from with --base (a "
            "checkpoint or a diffusers folder).",
            code="convert.no-base",
        )
    return _difference(weights, open_weights(base, "--base"), to, o)


def _check_output(to: Path) -> None:
    if to.suffix.lower() != ".safetensors":
        what = f"--output {to.name}: must end in .safetensors, which is what the guard reads"
        raise ConvertError(f"{what}: name it so.", code="convert.output")
    if to.exists():
        what = f"--output {to}: already exists, and files are never overwritten"
        raise ConvertError(f"{what}: choose another name.", code="convert.output")
    check_writable(to.absolute().parent, "--output")


def _lora(weights: Weights) -> dict[str, Get] | None:
    """The tensors of a LoRA; None where the file is none."""
    if len(weights.parts) != 1:
        return None
    (names,) = weights.parts.values()
    try:
        return dict(names) if sort_names(names, weights.name).layers else None
    except GuardError:
        return None


def _saved_again(weights: Weights, lora: Mapping[str, Get], to: Path, o: ConvertOptions) -> Converted:
    """A LoRA in PyTorch's own format, as a safetensors file: the same tensors under the same names."""
    if not weights.pickled:
        raise ConvertError(
            f"{weights.name}: is a LoRA already, in safetensors: load it as it is.", code="convert.is-a-lora"
        )
    tensors = {name: get().contiguous().clone() for name, get in lora.items()}
    written = write_tensors(to, tensors, _metadata(o, to, ADAPTER, **{CONVERTED_KEY: _of(weights)}))
    said = f"{to.name}: {len(tensors)} tensors of {weights.name} ({ADAPTER}) as they are, {len(written.layers)} layers"
    return Converted(written, ADAPTER, (), "", 0.0, said)


def _difference(weights: Weights, base: Weights, to: Path, o: ConvertOptions) -> Converted:
    hashed = base.sha256()
    if o.base_sha256 and o.base_sha256.strip().lower() != hashed:
        raise ConvertError(
            f"--base {base.name}: SHA-256 is {hashed}, --base_sha256 says {shown(o.base_sha256)}: use the base that "
            "the eraser started from.",
            code="convert.other-base",
        )
    ours, theirs = _same_names(weights, base)
    dtype = rounded_to(ours, theirs)
    differences = [Difference(part, names, theirs[part], dtype) for part, names in ours.items()]
    parts = tuple(one.survey() for one in differences)
    report.check_carried(weights, base, parts, o)
    second = "text_encoder_2" in {*ours, *theirs}
    tensors: dict[str, Tensor] = {}
    for difference, part in zip(differences, parts, strict=True):
        report.check_far(weights, base, part, o)
        tensors |= dict(difference.layers(part, second, o))
        report.check_far(weights, base, part, o)
    residual = math.sqrt(sum(part.rest for part in parts) / sum(part.energy for part in parts))
    report.check_residual(weights, parts, residual, o)
    rounded = str(dtype).removeprefix("torch.") if dtype else ""
    made = report.Made(weights, base, report.method(weights, ours, parts), parts, rounded, residual)
    rank = max((rank for part in made.parts for rank in part.ranks), default=1)
    metadata = _metadata(o, to, made.method, family=_family(ours), rank=rank, **_origin(made, hashed, o))
    written = write_tensors(to, tensors, metadata)
    return Converted(written, made.method, parts, rounded, residual, report.report(to.name, made, o))


def _same_names(weights: Weights, base: Weights) -> tuple[Parts, Parts]:
    """The tensors of both under one name each; ConvertError unless the base has every weight of the file."""
    raw, raw_base = by_part(weights), by_part(base)
    ours, theirs = same_names(raw, raw_base), same_names(raw_base, raw)
    for part, names in ours.items():
        if lacking := [name for name in names if name not in theirs.get(part, ())]:
            raise ConvertError(
                f"--base {base.name}: has no {part} weight {shown(lacking[0])} ({len(lacking)} of {len(names)} of "
                f"{weights.name} are not in it): use the base of the same family that holds the {part}, a checkpoint "
                "or a diffusers folder.",
                code="convert.other-base",
            )
    return ours, theirs


def _of(weights: Weights) -> str:
    return f"{weights.name} (sha256 {weights.sha256()})"


def _metadata(o: ConvertOptions, to: Path, method: str, **known: Any) -> dict[str, str]:
    """What the file says; no base_sha256, which is of W0 as ComfyUI has it and not known here."""
    engine = f"modular-lora-guard {VERSION}, converter"
    said = f"converted: {method}"
    return safety_metadata(method=said, engine=engine, concept=o.concept, prompts=o.concept, title=to.stem, **known)


def _origin(made: report.Made, hashed: str, o: ConvertOptions) -> dict[str, str]:
    """Metadata of what the file was made of."""
    return {
        CONVERTED_KEY: _of(made.weights),
        BASE_FILE_KEY: f"{made.base.name} (sha256 {hashed}{f', rounded to {made.rounded}' if made.rounded else ''})",
        RESIDUAL_KEY: f"{made.residual:.3g} of |dW|, limit {o.limit:g}",
    }


def _family(ours: Parts) -> str:
    """ComfyUI's name of the family, "" where the cross-attention's width does not tell it."""
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    widths = (get().shape[-1] for name, get in ours.get("unet", {}).items() if name.endswith(ends))
    return _FAMILIES.get(next(widths, 0), "")
