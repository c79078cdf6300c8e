"""Projection of a task LoRA's down matrices onto the orthogonal complement of a safety LoRA's row space.

A_t ← A_t − (A_t Q) Qᵀ, with Q an orthonormal basis of the row space of A_s (the columns of Q span the rows of A_s).
Then A_t x = 0 for every x in span(Q), so y = W0·x + s·B_s·(A_s·x) + t·B_t·(A_t·x) is what the safety LoRA alone gives.

That is a claim on one layer and on inputs in span(Q): on a convolution, on input patches in it. It holds up to the
rounding of the type that the file is saved in (about 3.5e-5 of the layer in fp16; `residual` says how much). It says
nothing of inputs outside the span, and nothing of a whole network, whose later layers see inputs that the task LoRA's
other layers have changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..modular_lora.errors import GuardError
from ..modular_lora.files.matching import match_layers
from ..modular_lora.files.reader import LoraFile, LoraLayer
from ..modular_lora.files.target import Target
from ..modular_lora.guard.build import ModelInfo
from ..modular_lora.guard.comparing import Factor, factors, norm

RTOL = 1e-6  # of the largest singular value: below it a direction is rounding
MOSTLY = 0.5  # of a layer's energy: what one random initialisation costs, and little else does


@dataclass(frozen=True)
class LayerProjection:
    """One layer of the task LoRA that shares its weight with a safety LoRA."""

    layer: str
    rank: int  # dimension of the safety LoRA's row space
    before: float  # ‖ΔW‖²
    after: float  # ‖ΔW‖² in the saved type
    residual: float  # ‖A Q‖ / ‖A‖ in the saved type

    @property
    def removed(self) -> float:
        """Share of ‖ΔW‖² that the projection took out."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class ProjectionReport:
    """What a projection did to a task LoRA."""

    task: str
    safety: tuple[str, ...]
    layers: tuple[LayerProjection, ...]  # paired ones
    unpaired: tuple[str, ...]  # task layers with no safety layer on their weight; they stay as they are
    kept: float  # ‖ΔW‖² of the unpaired layers
    by_name: bool  # paired by equal layer names, for want of a model
    strangers: Mapping[str, tuple[str, ...]]  # file name -> layers that the model does not have

    @property
    def removed(self) -> float:
        """Share of the whole LoRA's ‖ΔW‖² that the projection took out."""
        before = math.fsum(p.before for p in self.layers) + self.kept
        return math.fsum(p.before - p.after for p in self.layers) / before if before else 0.0

    @property
    def residual(self) -> float:
        """The largest residual of a layer."""
        return max((p.residual for p in self.layers), default=0.0)


def row_basis(down: Tensor, layer: str = "layer") -> Tensor:
    """Q (in·k·k, q ≤ r; float32, on down's device): orthonormal columns that span the rows of ``down`` (r in [k k]).

    Rows are scaled to norm 1 first; directions below `RTOL` of the largest singular value are dropped. Raises
    GuardError, naming ``layer``, where nothing of the input space would be left.
    """
    rows = down.detach().flatten(1).cpu().double()
    rows = torch.nn.functional.normalize(rows[rows.abs().amax(1) > 0], dim=1, eps=0.0)  # r in·k·k
    if not len(rows):
        return down.new_zeros(rows.shape[1], 0, dtype=torch.float32)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)  # basis: min(r, in·k·k) in·k·k
    basis = basis[sizes > RTOL * sizes[0]]
    if len(basis) == rows.shape[1]:
        raise GuardError(
            f"{layer}: the safety LoRA's rank {down.shape[0]} fills the input space of {rows.shape[1]}, a projection "
            "would leave nothing of the task LoRA: use a safety LoRA of smaller rank, or leave this layer out.",
            code="project.nothing-left",
        )
    return basis.T.float().contiguous().to(down.device)


def project(down: Tensor, Q: Tensor) -> Tensor:
    """``down`` (r in [k k]) − (down Q) Qᵀ: float32, same shape, no gradient."""
    with torch.no_grad(), torch.autocast(down.device.type, enabled=False):
        A = down.detach().float().flatten(1)  # r in·k·k
        return torch.addmm(A, A @ Q, Q.T, alpha=-1).reshape(down.shape)


def residual(down: Tensor, Q: Tensor) -> float:
    """‖down Q‖ / ‖down‖, computed in float64; 0 for a down that is zero."""
    A = down.detach().flatten(1).cpu().double()
    size = float(A.norm())
    return float((A @ Q.cpu().double()).norm()) / size if size else 0.0


def bases(
    layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile], infos: Sequence[ModelInfo] = ()
) -> dict[str, Tensor]:
    """Q (see `row_basis`) of the safety LoRAs' joint row space, for every task layer whose weight one of them changes.

    With ``infos`` (U-Net and text encoder) layers are paired by the weight that they change, whatever the files call
    it; slices of a fused weight count with the whole. Without, by equal layer names. Raises GuardError where sizes
    differ, where no layer is paired at all, or where a safety LoRA fills a layer's input space.
    """
    rows = _rows_by_weight(layers, safety, infos) if infos else _rows_by_name(layers, safety)
    if not rows:
        names = ", ".join(lora.name for lora in safety)
        remedy = (
            "use LoRAs of one base" if infos else "give the checkpoint, so that files with other names can be paired"
        )
        raise GuardError(
            f"Projection: none of {len(layers)} layers is in {names} too: {remedy}.", code="project.other-layers"
        )
    return {name: row_basis(torch.cat([row_basis(r, name).T for r in found]), name) for name, found in rows.items()}


def strangers(loras: Sequence[LoraFile], infos: Sequence[ModelInfo]) -> dict[str, tuple[str, ...]]:
    """Layers that are in no model of ``infos``, by file name; they cannot be paired."""
    found: dict[str, tuple[str, ...]] = {}
    for lora in loras:
        known: set[str] = set()
        for info in infos:
            known |= match_layers(lora, lora.layers, info.key_map, _shapes(info), info.family).targets.keys()
        if unknown := tuple(name for name in lora.layers if name not in known):
            found[lora.name] = unknown
    return found


def project_file(
    task: LoraFile,
    safety: Sequence[LoraFile],
    infos: Sequence[ModelInfo] = (),
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], ProjectionReport]:
    """A task LoRA file's tensors, under their own names, with every paired down matrix projected; and the report.

    ``dtype`` is the type to save in; None: the file's own, fp16 for fp8. Pairing and errors: see `bases`.
    """
    layers = task.plain
    found = bases(layers, safety, infos)
    tensors = dict(task.tensors)
    done = []
    for name, Q in found.items():
        layer, parts = layers[name], task.roles[name]
        saved = project(project(layer.down, Q), Q).to(_saved_type(tensors[parts["down"]].dtype, dtype))
        tensors[parts["down"]] = saved
        tensors.pop(parts.get("mid", ""), None)  # Tucker form: its kernel is in the layer's down already
        before, after = (norm(_factor(layer, down)) ** 2 for down in (layer.down, saved))
        done.append(LayerProjection(name, Q.shape[1], before, after, residual(saved, Q)))
    unpaired = tuple(name for name in layers if name not in found)
    kept = math.fsum(norm(_factor(layers[name], layers[name].down)) ** 2 for name in unpaired)
    tensors = {name: tensor.to(_saved_type(tensor.dtype, dtype)) for name, tensor in tensors.items()}
    unknown = strangers((task, *safety), infos) if infos else {}
    names = tuple(lora.name for lora in safety)
    return tensors, ProjectionReport(task.name, names, tuple(done), unpaired, kept, not infos, unknown)


def format_projection(report: ProjectionReport, rows: bool = True) -> str:
    """The report as text; ``rows``: with one line a layer, those that lost most first."""
    paired, total = len(report.layers), len(report.layers) + len(report.unpaired)
    lines = [
        f"{report.task} projected against {', '.join(report.safety)}: {report.removed:.2%} of its energy removed, "
        f"{paired} of {total} layers paired{' by equal names' if report.by_name else ''}, "
        f"largest residual {report.residual:.1e}"
    ]
    if report.unpaired:
        why = "has no layer of their names" if report.by_name else "has no layer on their weights"
        lines.append(f"{len(report.unpaired)} layers stay as they are: the safety LoRA {why}")
    for name, unknown in report.strangers.items():
        what = f"{len(unknown)} layers of {name} are not in the model (first {unknown[0]}) and could not be paired"
        lines.append(f"WARNING: {what}: give the CLIP too, or use a LoRA made for this base")
    if lost := [p for p in report.layers if p.removed > MOSTLY]:
        lines.append(
            f"WARNING: {len(lost)} layers lost more than {MOSTLY:.0%} of their energy, the mark of one random "
            "initialisation (same seed): retrain the task LoRA with another seed"
        )
    if rows:
        lines.append(f"{'layer':<72} {'rank':>5} {'removed':>9} {'residual':>9}")
        order = sorted(report.layers, key=lambda p: -p.removed)
        lines += [f"{p.layer:<72} {p.rank:>5} {p.removed:>9.3%} {p.residual:>9.1e}" for p in order]
    return "\n".join(lines)


def _rows_by_name(layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile]) -> dict[str, list[Tensor]]:
    """Safety rows (r in·k·k) by task layer, by equal names."""
    rows: dict[str, list[Tensor]] = {}
    for lora in safety:
        for name in layers.keys() & lora.plain.keys():
            ours, theirs = (x.down.flatten(1) for x in (layers[name], lora.plain[name]))
            if ours.shape[1] != theirs.shape[1]:
                raise GuardError(
                    f"{lora.name}: layer {name} has {theirs.shape[1]} inputs, {ours.shape[1]} in the task LoRA: use "
                    "LoRAs of one base.",
                    code="project.other-shape",
                )
            rows.setdefault(name, []).append(theirs)
    return {name: rows[name] for name in layers if name in rows}


def _rows_by_weight(
    layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile], infos: Sequence[ModelInfo]
) -> dict[str, list[Tensor]]:
    """Safety rows (r in·k·k) by task layer, by the weight that both change; restricted to the task layer's slice."""
    task = LoraFile(Path(), "task LoRA", "", {}, dict(layers))
    rows: dict[str, list[Tensor]] = {}
    for info in infos:
        shapes = _shapes(info)
        targets = match_layers(task, layers, info.key_map, shapes, info.family).targets
        for lora in safety:
            found = factors(lora, match_layers(lora, lora.plain, info.key_map, shapes, info.family), shapes)
            for name, target in targets.items():
                if target.key in found:
                    part = _restrict(found[target.key].down, target, shapes[target.key])
                    rows.setdefault(name, []).append(part)
    return {name: rows[name] for name in layers if name in rows}


def _restrict(down: Tensor, target: Target, shape: tuple[int, ...]) -> Tensor:
    """The columns of a whole weight's rows that a target reads; a slice along dimension 0 reads them all."""
    if target.offset is None or target.offset[0] == 0:
        return down
    _, start, length = target.offset
    return down.reshape(-1, *shape[1:]).narrow(1, start, length).flatten(1)


def _shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    return {key: spec.weight_shape for key, spec in info.specs.items()}


def _factor(layer: LoraLayer, down: Tensor) -> Factor:
    return Factor(layer.up.float().flatten(1), down.float().flatten(1), layer.scale)


def _saved_type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted or (torch.float16 if own.itemsize == 1 else own)
