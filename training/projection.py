"""Projection of a task LoRA onto the orthogonal complement of what a safety LoRA reads, and of what it writes.

On the side of the inputs, of its down matrices against the safety LoRA's row space:

A_t ← A_t − (A_t Q) Qᵀ, with Q an orthonormal basis of the row space of A_s (the columns of Q span the rows of A_s).
Then A_t x = 0 for every x in span(Q), so y = W0·x + s·B_s·(A_s·x) + t·B_t·(A_t·x) is what the safety LoRA alone gives.

That is a claim on one layer and on inputs in span(Q): on a convolution, on input patches in it. It holds up to the
rounding of the type that the file is saved in (about 3.5e-5 of the layer in fp16; `residual` says how much). It says
nothing of inputs outside the span, and nothing of a whole network, whose later layers see inputs that the task LoRA's
other layers have changed.

On the side of the outputs, of its up matrices against the safety LoRA's column space, as SaLoRA fixes C = I − V Vᵀ in
front of a LoRA's up matrix (arXiv 2501.01765; its V are the answers to safety prompts, here it is what B_s can write):

    B_t ← B_t − P (Pᵀ B_t), with P an orthonormal basis of the columns of B_s

Then Pᵀ y = Pᵀ (W0·x + s·B_s·(A_s·x)) for every x: in the directions that the safety LoRA writes in, both together give
what it alone gives, whatever the input. It says nothing of other directions. Neither side implies the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..modular_lora.branches.layer_spec import LayerSpec
from ..modular_lora.errors import GuardError
from ..modular_lora.files.matching import match_layers
from ..modular_lora.files.reader import LoraFile, LoraLayer
from ..modular_lora.files.target import Place, Target
from ..modular_lora.guard.build import ModelInfo
from ..modular_lora.guard.comparing import Factor, factors, norm
from .choices import Sides

RTOL = 1e-6  # of the largest singular value: below it a direction is rounding
MOSTLY = 0.5  # of a layer's energy: what one random initialisation costs, and little else does


@dataclass(frozen=True)
class LayerProjection:
    """One layer of the task LoRA that shares its weight with a safety LoRA."""

    layer: str
    rank: int  # dimension of the safety LoRA's row space
    before: float  # ‖ΔW‖²
    after: float  # ‖ΔW‖² in the saved type
    residual: float  # ‖A Q‖ / ‖A‖ in the saved type; 0 where the inputs were left
    columns: int = 0  # dimension of the safety LoRA's column space; 0 where the outputs were left
    outputs: float = 0.0  # ‖Bᵀ P‖ / ‖B‖ in the saved type

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
    sides: Sides = "input"

    @property
    def removed(self) -> float:
        """Share of the whole LoRA's ‖ΔW‖² that the projection took out."""
        before = math.fsum(p.before for p in self.layers) + self.kept
        return math.fsum(p.before - p.after for p in self.layers) / before if before else 0.0

    @property
    def residual(self) -> float:
        """The largest residual of a layer's inputs."""
        return max((p.residual for p in self.layers), default=0.0)

    @property
    def outputs(self) -> float:
        """The largest residual of a layer's outputs."""
        return max((p.outputs for p in self.layers), default=0.0)

    @property
    def residuals(self) -> str:
        """Both, as far as they were asked for, as they stand in the file's metadata."""
        said = {"input": f"residual {self.residual:.1e}", "output": f"outputs {self.outputs:.1e}"}
        return ", ".join(text for side, text in said.items() if self.sides in (side, "both"))


def row_basis(down: Tensor, layer: str = "layer", space: str = "input") -> Tensor:
    """Q (in·k·k, q ≤ r; float32, on down's device): orthonormal columns that span the rows of ``down`` (r in [k k]).

    Rows are scaled to norm 1 first; directions below `RTOL` of the largest singular value are dropped. Raises
    GuardError, naming ``layer`` and ``space``, where nothing of that space would be left.
    """
    rows = down.detach().flatten(1).cpu().double()
    rows = torch.nn.functional.normalize(rows[rows.abs().amax(1) > 0], dim=1, eps=0.0)  # r in·k·k
    if not len(rows):
        return down.new_zeros(rows.shape[1], 0, dtype=torch.float32)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)  # basis: min(r, in·k·k) in·k·k
    basis = basis[sizes > RTOL * sizes[0]]
    if len(basis) == rows.shape[1]:
        raise GuardError(
            f"{layer}: the safety LoRA's rank {down.shape[0]} fills the {space} space of {rows.shape[1]}, a projection "
            "would leave nothing of the task LoRA: use a safety LoRA of smaller rank, or leave this layer out.",
            code="project.nothing-left",
        )
    return basis.T.float().contiguous().to(down.device)


def project(down: Tensor, Q: Tensor) -> Tensor:
    """``down`` (r in [k k]) − (down Q) Qᵀ: float32, same shape, no gradient."""
    with torch.no_grad(), torch.autocast(down.device.type, enabled=False):
        A = down.detach().float().flatten(1)  # r in·k·k
        return torch.addmm(A, A @ Q, Q.T, alpha=-1).reshape(down.shape)


def project_outputs(up: Tensor, P: Tensor) -> Tensor:
    """``up`` (out r [1 1]) − P (Pᵀ up), P (out p) orthonormal columns: float32, same shape, no gradient."""
    return project(up.flatten(1).T, P).T.reshape(up.shape)


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
    return {name: _joint([down for down, _ in each], name) for name, each in _paired(layers, safety, infos).items()}


def output_bases(
    layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile], infos: Sequence[ModelInfo] = ()
) -> dict[str, Tensor]:
    """P (out p) of the safety LoRAs' joint column space, for the same layers as `bases`, which says the rest."""
    paired = _paired(layers, safety, infos)
    return {name: _joint([up.T for _, up in each], name, "output") for name, each in paired.items()}


def _joint(rows: Sequence[Tensor], name: str, space: str = "input") -> Tensor:
    return row_basis(torch.cat([row_basis(r, name, space).T for r in rows]), name, space)


def _paired(
    layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile], infos: Sequence[ModelInfo]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Every safety LoRA's (down, up) on each task layer whose weight it changes."""
    found = _by_weight(layers, safety, infos) if infos else _by_name(layers, safety)
    if not found:
        names = ", ".join(lora.name for lora in safety)
        remedy = (
            "use LoRAs of one base" if infos else "give the checkpoint, so that files with other names can be paired"
        )
        raise GuardError(
            f"Projection: none of {len(layers)} layers is in {names} too: {remedy}.", code="project.other-layers"
        )
    return found


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
    sides: Sides = "input",
) -> tuple[dict[str, Tensor], ProjectionReport]:
    """A task LoRA file's tensors, under their own names, with every paired layer projected; and the report.

    ``dtype`` is the type to save in; None: the file's own, fp16 for fp8. ``sides``: of the inputs (down matrices), of
    the outputs (up matrices), or both. Pairing and errors: see `bases`.
    """
    layers = task.plain
    tensors = dict(task.tensors)
    rows = bases(layers, safety, infos) if sides != "output" else {}
    columns = output_bases(layers, safety, infos) if sides != "input" else {}
    done = []
    for name in rows or columns:
        layer, parts = layers[name], task.roles[name]
        down, up = layer.down, layer.up
        if (Q := rows.get(name)) is not None:
            down = project(project(down, Q), Q).to(_saved_type(tensors[parts["down"]].dtype, dtype))
            tensors[parts["down"]] = down
            tensors.pop(parts.get("mid", ""), None)  # Tucker form: its kernel is in the layer's down already
        if (P := columns.get(name)) is not None:
            up = project_outputs(project_outputs(up, P), P).to(_saved_type(tensors[parts["up"]].dtype, dtype))
            tensors[parts["up"]] = up
        before, after = norm(_factor(layer, layer.up, layer.down)) ** 2, norm(_factor(layer, up, down)) ** 2
        inputs = (0, 0.0) if Q is None else (Q.shape[1], residual(down, Q))
        outputs = (0, 0.0) if P is None else (P.shape[1], residual(up.flatten(1).T, P))
        done.append(LayerProjection(name, inputs[0], before, after, inputs[1], *outputs))
    unpaired = tuple(name for name in layers if name not in (rows or columns))
    kept = math.fsum(norm(_factor(layers[name], layers[name].up, layers[name].down)) ** 2 for name in unpaired)
    tensors = {name: tensor.to(_saved_type(tensor.dtype, dtype)) for name, tensor in tensors.items()}
    unknown = strangers((task, *safety), infos) if infos else {}
    names = tuple(lora.name for lora in safety)
    return tensors, ProjectionReport(task.name, names, tuple(done), unpaired, kept, not infos, unknown, sides)


_SAID = {"input": "", "output": " on its outputs", "both": " on inputs and outputs"}


def format_projection(report: ProjectionReport, rows: bool = True) -> str:
    """The report as text; ``rows``: with one line a layer, those that lost most first."""
    paired, total = len(report.layers), len(report.layers) + len(report.unpaired)
    lines = [
        f"{report.task} projected against {', '.join(report.safety)}{_SAID[report.sides]}: {report.removed:.2%} of its "
        f"energy removed, {paired} of {total} layers paired{' by equal names' if report.by_name else ''}, "
        f"largest {report.residuals}"
    ]
    if report.unpaired:
        why = "has no layer of their names" if report.by_name else "has no layer on their weights"
        lines.append(f"{len(report.unpaired)} layers stay as they are: the safety LoRA {why}")
    for name, unknown in report.strangers.items():
        what = f"{len(unknown)} layers of {name} are not in the model (first {unknown[0]}) and could not be paired"
        lines.append(f"WARNING: {what}: give the CLIP too, or use a LoRA made for this base")
    if lost := [p for p in report.layers if p.removed > MOSTLY]:
        what = f"WARNING: {len(lost)} layers lost more than {MOSTLY:.0%} of their energy"
        lines.append(
            f"{what}, the mark of one random initialisation (same seed): retrain the task LoRA with another seed"
            if report.sides == "input"
            else f"{what} (first {lost[0].layer}), and do little of what they did: look at what comes out"
        )
    if rows:
        lines.append(f"{'layer':<72} {'rank':>5} {'removed':>9} {'residual':>9}")
        order = sorted(report.layers, key=lambda p: -p.removed)
        lines += [
            f"{p.layer:<72} {max(p.rank, p.columns):>5} {p.removed:>9.3%} {max(p.residual, p.outputs):>9.1e}"
            for p in order
        ]
    return "\n".join(lines)


def _by_name(layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Safety factors (r in·k·k, out r) by task layer, by equal names."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for lora in safety:
        for name in layers.keys() & lora.plain.keys():
            ours, theirs = ((x.down.flatten(1), x.up.flatten(1)) for x in (layers[name], lora.plain[name]))
            for what, a, b in (("inputs", ours[0][0], theirs[0][0]), ("outputs", ours[1][:, 0], theirs[1][:, 0])):
                if len(a) != len(b):
                    raise GuardError(
                        f"{lora.name}: layer {name} has {len(b)} {what}, {len(a)} in the task LoRA: use LoRAs of one "
                        "base.",
                        code="project.other-shape",
                    )
            found.setdefault(name, []).append(theirs)
    return {name: found[name] for name in layers if name in found}


def _by_weight(
    layers: Mapping[str, LoraLayer], safety: Sequence[LoraFile], infos: Sequence[ModelInfo]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Safety factors (r in·k·k, out r) by task layer, by the weight that both change; of the task layer's slice."""
    task = LoraFile(Path(), "task LoRA", "", {}, dict(layers))
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for info in infos:
        shapes = _shapes(info)
        targets = match_layers(task, layers, info.key_map, shapes, info.family).targets
        for lora in safety:
            found = factors(lora, match_layers(lora, lora.plain, info.key_map, shapes, info.family), shapes)
            for name, target in targets.items():
                if target.key in found:
                    whole, shape = found[target.key], shapes[target.key]
                    part = _restrict(whole.down, target, shape), _restrict_outputs(whole.up, target, shape)
                    pairs.setdefault(name, []).append(part)
    return {name: pairs[name] for name in layers if name in pairs}


def _restrict(down: Tensor, target: Target, shape: tuple[int, ...]) -> Tensor:
    """The columns of a whole weight's rows that a target reads; a slice along dimension 0 reads them all."""
    if target.offset is None or target.offset[0] == 0:
        return down
    _, start, length = target.offset
    return down.reshape(-1, *shape[1:]).narrow(1, start, length).flatten(1)


def _restrict_outputs(up: Tensor, target: Target, shape: tuple[int, ...]) -> Tensor:
    """The outputs of a whole weight that a target writes, in the order in which the task LoRA's file has them."""
    if target.offset is not None and target.offset[0] == 0:
        up = up.narrow(*target.offset)
    if target.rearrange is None:
        return up
    numbers = torch.arange(len(up))
    return up[Place(target, LayerSpec("", shape), lambda key: up).arranged(numbers).argsort()]


def _shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    return {key: spec.weight_shape for key, spec in info.specs.items()}


def _factor(layer: LoraLayer, up: Tensor, down: Tensor) -> Factor:
    return Factor(up.float().flatten(1), down.float().flatten(1), layer.scale)


def _saved_type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted or (torch.float16 if own.itemsize == 1 else own)
