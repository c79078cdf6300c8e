"""What a LoRA file is: layers, ranks, norms, metadata and hashes, for reading before it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modular_lora.errors import plain
from ..modular_lora.files.formats import Adapter, LoraLayer
from ..modular_lora.files.names import is_text
from ..modular_lora.files.reader import LoraFile, describe_base, read_lora
from ..modular_lora.guard.build import BASE_KEY, ROLE_KEY
from ..modular_lora.guard.comparing import Factor, norm
from .output import kohya_hashes

_text = partial(plain, limit=200)  # out of a file, on one line
SHOWN = (  # metadata worth a line, in this order, where a file has it
    "modelspec.title",
    "modelspec.date",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "ss_network_module",
    "ss_steps",
    "ss_learning_rate",
    "ss_optimizer",
    "ss_lr_scheduler",
    "ss_seed",
    "ss_num_train_images",
    "ss_training_comment",
)


@dataclass(frozen=True)
class PartReport:
    """The layers of a file for one model."""

    part: str  # "U-Net" or "text encoder"
    layers: int
    kinds: tuple[tuple[str, int], ...]  # (format, layers)
    zero: int
    convolutions: int
    ranks: tuple[tuple[int | None, int], ...]  # (rank, layers); None: a format without one
    alphas: tuple[tuple[float | None, int], ...]  # (alpha, layers); None: the file gives none
    norm: float | None  # ‖ΔW‖ over the part; None where a layer is no LoRA, whose ΔW may need W0
    largest: tuple[str, float] | None  # layer with the largest ‖ΔW‖


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found in a file."""

    name: str
    sha256: str
    dtypes: tuple[str, ...]
    role: str
    base: str
    base_sha256: str
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...]
    metadata: dict[str, str]
    hashes: tuple[tuple[str, str, str], ...]  # (key, as the metadata says, as computed) of the sshs_* hashes


def inspect(path: str | Path) -> Inspection:
    """Read a LoRA file and describe it; LoraFileError where it does not pass `read_lora`."""
    lora = read_lora(Path(path))
    found = lora.metadata
    computed = kohya_hashes(lora.tensors, found)
    weights = [tensor for name, tensor in lora.tensors.items() if not name.endswith(".alpha")]
    halves = [("U-Net", False), ("text encoder", True)]
    layers = {part: [layer for name, layer in lora.layers.items() if is_text(name) is text] for part, text in halves}
    return Inspection(
        name=lora.name,
        sha256=lora.sha256,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in weights})),
        role=found.get(ROLE_KEY, ""),
        base=describe_base(found) or "",
        base_sha256=found.get(BASE_KEY, ""),
        parts=tuple(_part(part, group, lora) for part, group in layers.items() if group),
        notes=lora.notes,
        metadata=dict(found),
        hashes=tuple((key, found.get(key, ""), value) for key, value in computed.items()),
    )


def format_inspection(report: Inspection) -> str:
    """The report as text."""
    lines = [
        f"{report.name}: {report.role or 'no'} role recorded, {'/'.join(report.dtypes)}",
        f"  sha256 {report.sha256}",
        f"  base {report.base or 'not recorded'}"
        + (f", sha256 {_text(report.base_sha256)}" * bool(report.base_sha256)),
        *(line for part in report.parts for line in _part_lines(part)),
        *(f"  note: {note}" for note in report.notes),
    ]
    for key, said, computed in report.hashes:
        verdict = (
            "not in the file" if not said else "as in the file" if said == computed else f"the file says {_text(said)}"
        )
        lines.append(f"  {key} {computed} ({verdict})")
    own = sorted(key for key in report.metadata if key.startswith("modular_lora.") and key not in (ROLE_KEY, BASE_KEY))
    lines += [f"  {_text(key)}: {_text(report.metadata[key])}" for key in (*SHOWN, *own) if key in report.metadata]
    if leaks := [key for key in ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs") if key in report.metadata]:
        lines.append(f"  note: {', '.join(leaks)} show captions or folder names of the training images")
    return "\n".join(lines)


def _part(part: str, layers: Sequence[Adapter], lora: LoraFile) -> PartReport:
    norms = {x.name: norm(Factor.of(x)) for x in layers if isinstance(x, LoraLayer)}
    whole = len(norms) == len(layers)
    return PartReport(
        part=part,
        layers=len(layers),
        kinds=_counted(x.kind for x in layers),
        zero=sum(x.name in lora.zero_layers for x in layers),
        convolutions=sum(map(_has_kernel, layers)),
        ranks=_counted(x.rank for x in layers),
        alphas=_counted(getattr(x.inner, "alpha", None) for x in layers),
        norm=math.hypot(*norms.values()) if whole else None,
        largest=max(norms.items(), key=lambda item: item[1]) if whole else None,
    )


def _counted(values: Iterable[Any]) -> tuple[tuple[Any, int], ...]:
    """(value, how often), in the order of the values; None comes last."""
    return tuple(sorted(Counter(values).items(), key=lambda item: (item[0] is None, item[0] or 0)))


def _has_kernel(layer: Adapter) -> bool:
    """Whether a tensor of the layer has a kernel larger than 1; LoHa and LoKr may store theirs flattened."""
    tensors = (value for value in vars(layer.inner).values() if isinstance(value, Tensor))
    return any(t.dim() > 3 and t[0, 0].numel() > 1 for t in tensors)


def _part_lines(p: PartReport) -> list[str]:
    ranks = ", ".join(f"{'none' if rank is None else rank} ({count})" for rank, count in p.ranks)
    alphas = ", ".join(f"{'none' if alpha is None else f'{alpha:g}'} ({count})" for alpha, count in p.alphas)
    kinds = "" if [kind for kind, _ in p.kinds] == ["LoRA"] else ", ".join(f"{kind} ({n})" for kind, n in p.kinds)
    size = "norm only with the base's weights"
    if p.norm is not None and p.largest is not None:
        size = f"norm {p.norm:.4g}, largest {p.largest[1]:.3g} in {p.largest[0]}"
    return [
        f"  {p.part}: {p.layers} layers, {p.convolutions} with a kernel, {p.zero} all zero",
        *([f"    format (layers) {kinds}"] if kinds else []),
        f"    rank (layers) {ranks}; alpha (layers) {alphas}",
        f"    {size}",
    ]
