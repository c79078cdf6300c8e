"""What a LoRA file is: layers, ranks, norms, metadata and hashes, for reading before it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from ..modular_lora.comparing import Factor, norm
from ..modular_lora.files import LoraFile, LoraLayer, describe_base, read_lora
from ..modular_lora.guard import BASE_KEY, ROLE_KEY
from ..modular_lora.matching import is_text
from .output import kohya_hashes

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
    zero: int
    convolutions: int
    ranks: tuple[tuple[int, int], ...]  # (rank, layers)
    alphas: tuple[tuple[float | None, int], ...]  # (alpha, layers); None: the file gives none, the scale is 1
    norm: float  # ‖ΔW‖ over the part
    largest: tuple[str, float]  # layer with the largest ‖ΔW‖


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
    metadata: dict[str, str]
    hashes: tuple[tuple[str, str, str], ...]  # (key, as the metadata says, as computed) of the sshs_* hashes


def inspect(path: str | Path) -> Inspection:
    """Read a LoRA file and describe it; LoraFileError where it does not pass `read_lora`."""
    lora = read_lora(Path(path))
    found = lora.metadata
    computed = kohya_hashes(safetensors.torch.load_file(lora.path), found)
    halves = [("U-Net", False), ("text encoder", True)]
    layers = {part: [layer for name, layer in lora.layers.items() if is_text(name) is text] for part, text in halves}
    return Inspection(
        name=lora.name,
        sha256=lora.sha256,
        dtypes=tuple(
            sorted({str(t.dtype).removeprefix("torch.") for x in lora.layers.values() for t in (x.down, x.up)})
        ),
        role=found.get(ROLE_KEY, ""),
        base=describe_base(found) or "",
        base_sha256=found.get(BASE_KEY, ""),
        parts=tuple(_part(part, group, lora) for part, group in layers.items() if group),
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
    ]
    for key, said, computed in report.hashes:
        verdict = (
            "not in the file" if not said else "as in the file" if said == computed else f"the file says {_text(said)}"
        )
        lines.append(f"  {key} {computed} ({verdict})")
    own = sorted(key for key in report.metadata if key.startswith("modular_lora.") and key not in (ROLE_KEY, BASE_KEY))
    lines += [f"  {_text(key)}: {_text(report.metadata[key])}" for key in (*SHOWN, *own) if key in report.metadata]
    if leaks := [key for key in ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs") if key in report.metadata]:
        lines.append(f"  note: {', '.join(leaks)} show captions or folder names of the training pictures")
    return "\n".join(lines)


def _part(part: str, layers: Sequence[LoraLayer], lora: LoraFile) -> PartReport:
    norms = {x.name: norm(Factor(x.up.float().flatten(1), x.down.float().flatten(1), x.scale)) for x in layers}
    return PartReport(
        part=part,
        layers=len(layers),
        zero=sum(x.name in lora.zero_layers for x in layers),
        convolutions=sum(x.down[0, 0].numel() > 1 for x in layers),
        ranks=tuple(sorted(Counter(x.rank for x in layers).items())),
        alphas=tuple(sorted(Counter(x.alpha for x in layers).items(), key=str)),
        norm=math.hypot(*norms.values()),
        largest=max(norms.items(), key=lambda item: item[1]),
    )


def _part_lines(p: PartReport) -> list[str]:
    ranks = ", ".join(f"{rank} ({count})" for rank, count in p.ranks)
    alphas = ", ".join(f"{'none' if alpha is None else f'{alpha:g}'} ({count})" for alpha, count in p.alphas)
    head = f"  {p.part}: {p.layers} layers, {p.convolutions} with a kernel, {p.zero} all zero"
    name, size = p.largest
    return [
        head,
        f"    rank (layers) {ranks}; alpha (layers) {alphas}",
        f"    norm {p.norm:.4g}, largest {size:.3g} in {name}",
    ]


def _text(value: str) -> str:
    """Text out of a file on one printable line of bounded length."""
    return "".join(c if c.isprintable() else "?" for c in value[:200])
