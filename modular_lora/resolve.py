"""A layer of a file as parts of a change of its target's weight: every format against W0 alone.

The reference is ComfyUI's own merge of the file on W0 (comfy/weight_adapter, 0.3.75 and 0.33.0), its choices included:
dora_scale on the output axis is divided by the lengths of W0's rows, an OFT's ``rescale`` is not used, and its
strength counts twice (see ``power``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .adapters import Adapter, BiasedLayer, DiffLayer, DoraLayer, LohaLayer, LokrLayer, LoraLayer, OftLayer, SetLayer
from .changes import Bias, Dense, Gain, Kron, LowRank, Part, Rotation, dense
from .errors import GuardError
from .layers import LayerSpec, bias_key
from .matching import Target, slice_shape

Weight: TypeAlias = Callable[[str], Tensor]  # weight or bias key -> W0's tensor
Parts: TypeAlias = "tuple[tuple[Part, float], ...]"  # part and what it is multiplied by at strength 1
EPS = torch.finfo(torch.float32).eps  # what core adds to the lengths that it divides by


def power(adapter: Adapter) -> int:
    """How often core multiplies by the strength: an OFT's rotation twice, a replaced weight never."""
    adapter = getattr(adapter, "base", adapter)
    return 2 if isinstance(adapter, OftLayer) else 0 if isinstance(adapter, SetLayer) else 1


def resolve(adapter: Adapter, target: Target, spec: LayerSpec, weight: Weight) -> Parts:
    """The parts of one layer of a file on ``target`` (a weight, a slice of it, a norm, a bias) of the layer ``spec``.

    All tensors are on the CPU and in the shape of the whole weight, in fp32; a LoRA's factors in the file's dtype.
    ``weight`` is asked only for what is a function of W0. Raises GuardError for a rearrangement that is none.
    """
    place = _Place(target, spec, weight)
    if isinstance(adapter, BiasedLayer):
        return (*resolve(adapter.base, target, spec, weight), (place.bias(adapter.bias), 1.0))
    if spec.conv is not None and spec.conv.dense:
        return tuple((_as_weight(part, place), scale) for part, scale in _resolve(adapter, place))
    return _resolve(adapter, place)


def _as_weight(part: Part, place: _Place) -> Part:
    """A part that acts on the layer's output, or on its inputs in groups, as a matrix in the shape of W0."""
    acts = isinstance(part, Gain | Rotation) and place.spec.conv.transposed
    return Dense(dense(part, place.original)) if acts or isinstance(part, Kron) else part


def _resolve(adapter: Adapter, place: _Place) -> Parts:
    if isinstance(adapter, SetLayer):
        return ((_replacement(adapter, place), 1.0),)
    if isinstance(adapter, DiffLayer):
        return tuple(_diff(adapter, place))
    if isinstance(adapter, OftLayer):
        return ((_rotation(adapter, place), 1.0),)
    if isinstance(adapter, DoraLayer):
        return _dora(adapter, place)
    part, scale = _additive(adapter, place.shape)
    return ((place.weight(part), scale),)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a change goes: its own shape there, and the way from it to the whole weight."""

    target: Target
    spec: LayerSpec
    values: Weight

    @property
    def whole(self) -> tuple[int, ...]:
        return self.spec.weight_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice: out in [k k]."""
        return slice_shape(self.target, self.whole)

    @property
    def is_whole(self) -> bool:
        return self.target.offset is None and self.target.rearrange is None

    @property
    def outputs(self) -> slice:
        """The outputs of the layer that the slice covers."""
        dim, start, length = self.target.offset or (1, 0, 0)
        return slice(start, start + length) if dim == 0 else slice(None)

    def original(self) -> Tensor:
        """W0 of the slice (out in·k·k; out 1 for a norm or a bias; fp32)."""
        weight = self.values(self.target.key).float()
        weight = weight if self.target.offset is None else weight.narrow(*self.target.offset)
        return weight.reshape(weight.shape[0], -1)

    @property
    def is_bias(self) -> bool:
        return self.target.key.endswith(".bias")

    def original_bias(self) -> Tensor | None:
        """The layer's own bias (out of the whole weight)."""
        return self.values(bias_key(self.target.key)).float() if self.spec.bias else None

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows (out ...) in the order in which the weight has them."""
        return rows if self.target.rearrange is None else rows[_order(self.target, rows.shape[0])]

    def on_outputs(self, rows: Tensor) -> Tensor:
        """Rows of the slice (out ...) among all outputs of the layer, zero elsewhere."""
        if self.target.offset is None or self.target.offset[0] != 0:
            return rows
        whole = rows.new_zeros(self.whole[0], *rows.shape[1:])
        whole[self.outputs] = rows
        return whole

    def weight(self, part: LowRank | Dense | Kron, arrange: bool = True) -> LowRank | Dense | Kron:
        """A change of the slice as one of the whole weight; ``arrange``: its rows are still in the file's order."""
        if self.is_whole:
            return part
        if isinstance(part, Kron):
            part = Dense(dense(part, self.original))
        rows = part.up if isinstance(part, LowRank) else part.weight
        rows = self.on_outputs(self.arranged(rows) if arrange else rows)
        if isinstance(part, LowRank):
            return LowRank(self._on_inputs(part.down), rows)
        return Dense(self._on_inputs(rows))

    def _on_inputs(self, columns: Tensor) -> Tensor:
        """Columns of the slice (r in·k·k) among all inputs of the layer, zero elsewhere."""
        if self.target.offset is None or self.target.offset[0] != 1:
            return columns
        _, *kernel = self.whole[1:]
        whole = columns.new_zeros(columns.shape[0], *self.whole[1:])  # r in [k k]
        whole.narrow(*self.target.offset).copy_(columns.reshape(columns.shape[0], -1, *kernel))
        return whole.flatten(1)

    def bias(self, bias: Tensor) -> Bias:
        return Bias(self.on_outputs(self.arranged(bias.float().flatten())))


def _order(target: Target, rows: int) -> Tensor:
    """The row of a change that each row of the weight takes: what ``rearrange`` does to the numbers of the rows."""
    try:
        order = target.rearrange(torch.arange(rows)[:, None]).flatten()
    except (TypeError, ValueError, RuntimeError, IndexError):
        order = torch.empty(0)
    if not torch.equal(order.sort().values, torch.arange(rows)):
        raise GuardError(f"{target.key} is stored rearranged in a way that no branch can follow: leave its layer out.")
    return order


Additive: TypeAlias = "LoraLayer | LohaLayer | LokrLayer"


def _additive(adapter: Additive, shape: tuple[int, ...]) -> tuple[LowRank | Dense | Kron, float]:
    """A change that does not look at W0, in the shape of its slice (out in [k k]), and its scale."""
    if isinstance(adapter, LoraLayer):
        return LowRank(adapter.down.flatten(1), adapter.up.flatten(1)), adapter.scale
    make = _loha if isinstance(adapter, LohaLayer) else _lokr
    return make(adapter, shape), adapter.scale


def _loha(adapter: LohaLayer, shape: tuple[int, ...]) -> LowRank | Dense:
    """(A₁·B₁) ⊙ (A₂·B₂) as one product of rank r₁·r₂, columns and rows multiplied in pairs, or itself if smaller."""
    a1, b1 = _factors(adapter.w1_a, adapter.w1_b, adapter.t1)
    a2, b2 = _factors(adapter.w2_a, adapter.w2_b, adapter.t2)
    rank, (outputs, inputs) = a1.shape[1] * a2.shape[1], (shape[0], b1.shape[1])
    if rank * (outputs + inputs) >= outputs * inputs:
        return Dense((a1 @ b1) * (a2 @ b2))
    up = (a1[:, :, None] * a2[:, None]).flatten(1)  # out r1·r2
    down = (b1[:, None] * b2[None]).flatten(0, 1)  # r1·r2 in·k·k
    return LowRank(down, up)


def _lokr(adapter: LokrLayer, shape: tuple[int, ...]) -> Kron | Dense:
    """w1 ⊗ w2; a factor that is a product is multiplied out."""
    w1 = adapter.w1.float() if adapter.w1 is not None else adapter.w1_a.float() @ adapter.w1_b.float()  # o1 i1
    if adapter.w2 is not None:
        w2 = adapter.w2.float()
    else:
        a, b = _factors(adapter.w2_a, adapter.w2_b, adapter.t2)
        w2 = a @ b  # o2 i2·k·k
    kernel = shape[2:]
    inputs, rest = divmod(w2[0].numel(), torch.Size(kernel).numel())
    if rest == 0 and w1.shape[1] * inputs == shape[1]:
        return Kron(w1, w2.reshape(w2.shape[0], inputs, *kernel))
    return Dense(torch.kron(w1, w2.flatten(1)))  # a kernel that is split between the two


def _factors(a: Tensor, b: Tensor, middle: Tensor | None) -> tuple[Tensor, Tensor]:
    """A product (out r, r in·k·k); in Tucker form a is r out, b is r in and ``middle`` r r k k."""
    a, b = a.float(), b.float()
    if middle is None:
        return a, b.flatten(1)
    return a.t(), torch.einsum("ij...,jn->in...", middle.float(), b).flatten(1)


def _diff(adapter: DiffLayer, place: _Place):
    if adapter.weight is not None and place.is_bias:
        yield place.bias(adapter.weight), 1.0
    elif adapter.weight is not None:
        change = adapter.weight.float()
        yield place.weight(Dense(change.reshape(change.shape[0], -1))), 1.0
    if adapter.bias is not None:
        yield place.bias(adapter.bias), 1.0


def _replacement(adapter: SetLayer, place: _Place) -> Dense | Bias:
    """The difference of a stored weight to W0."""
    rows = adapter.weight.float()
    change = place.arranged(rows.reshape(rows.shape[0], -1)) - place.original()
    return Bias(change.flatten()) if place.is_bias else place.weight(Dense(change), arrange=False)


def _rotation(adapter: OftLayer, place: _Place) -> Rotation | Dense:
    """R − I of every block of outputs; on a slice that blocks cannot cover, its product with W0."""
    blocks = adapter.blocks.float()  # k n n
    q = blocks - blocks.transpose(1, 2)
    if adapter.alpha and (length := q.norm() + 1e-8) > adapter.alpha:
        q = q * (adapter.alpha / length)
    eye = torch.eye(q.shape[1])
    turned = ((eye + q) @ (eye - q).inverse() - eye).transpose(1, 2).contiguous()  # row m: Σ_n (R − I)[n, m]·row n
    if place.is_whole:
        return Rotation(turned, place.original_bias())
    rotation = Rotation(turned, None)
    return place.weight(Dense(dense(rotation, place.original)))


def _dora(adapter: DoraLayer, place: _Place) -> Parts:
    """(W0 + ΔW)·m/n − W0, n the lengths of W0's rows, of the rows of the sum (PEFT), or of its columns."""
    part, scale = _additive(adapter.base, place.shape)
    part = LowRank(part.down.float(), part.up.float()) if isinstance(part, LowRank) else part
    magnitude = adapter.magnitude.float()
    by_output = adapter.of_sum or magnitude.shape[0] == place.shape[0]
    if by_output and not (place.target.offset and place.target.offset[0] == 1):
        return _dora_by_output(part, scale, magnitude.flatten(), adapter.of_sum, place)
    W0 = place.original()  # out in·k·k
    total = W0 + scale * place.arranged(dense(part, place.original))
    if by_output:
        gain = magnitude.flatten()[:, None] / ((total if adapter.of_sum else W0).norm(dim=1, keepdim=True) + EPS)
        return ((place.weight(Dense(gain * total - W0), arrange=False), 1.0),)
    columns = total.reshape(place.shape[0], place.shape[1], -1)  # out in k·k
    gain = magnitude.flatten() / (columns.norm(dim=(0, 2)) + EPS)  # in
    change = (columns * gain[:, None]).flatten(1) - W0
    return ((place.weight(Dense(change), arrange=False), 1.0),)


def _dora_by_output(
    part: LowRank | Dense | Kron, scale: float, magnitude: Tensor, of_sum: bool, place: _Place
) -> Parts:
    """c·ΔW, and c − 1 as a gain on W0·x: both touch W0 only through the lengths of its rows."""
    if isinstance(part, Kron):
        part = Dense(dense(part, place.original))
    rows = place.arranged(part.up if isinstance(part, LowRank) else part.weight)
    lengths = place.original()
    if of_sum:
        lengths = lengths + scale * (rows @ part.down if isinstance(part, LowRank) else rows)
    c = magnitude / (lengths.norm(dim=1) + EPS)  # out
    rows = c[:, None] * rows
    change = LowRank(part.down, rows) if isinstance(part, LowRank) else Dense(rows)
    gain = Gain(place.on_outputs(c - 1), place.original_bias())
    return ((place.weight(change, arrange=False), scale), (gain, 1.0))
