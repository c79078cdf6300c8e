"""Where a change goes: a weight of a model, or a slice of it, and the way from the change's shape to the weight's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branches.changes import Additive, Bias
from ..branches.layer_spec import LayerSpec, bias_key
from ..errors import GuardError


@dataclass(frozen=True)
class Target:
    """A weight, or a slice of it along one dimension; ``rearrange`` brings a change's rows to the weight's order."""

    key: str
    offset: tuple[int, int, int] | None = None  # dim, start, length
    rearrange: Callable[[Tensor], Tensor] | None = None


def slice_shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the part of a weight of `shape` that a target covers."""
    if target.offset is None:
        return shape
    dim, _, length = target.offset
    return (*shape[:dim], length, *shape[dim + 1 :])


@dataclass(frozen=True, eq=False)
class Place:
    """Where a change goes: its own shape there, and the way from it to the whole weight.

    Attributes:
        target: a weight, a slice of it, a norm or a bias of the layer ``spec``.
        spec: the layer.
        values: weight or bias key -> W0's tensor; asked only for what is a function of W0.
    """

    target: Target
    spec: LayerSpec
    values: Callable[[str], Tensor]

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
    def is_bias(self) -> bool:
        return self.target.key.endswith(".bias")

    def original(self) -> Tensor:
        """W0 of the slice (out in·k·k; out 1 for a norm or a bias; fp32)."""
        weight = self.values(self.target.key).float()
        weight = weight if self.target.offset is None else weight.narrow(*self.target.offset)
        return weight.reshape(weight.shape[0], -1)

    def original_bias(self) -> Tensor | None:
        """The layer's own bias (out of the whole weight)."""
        return self.values(bias_key(self.target.key)).float() if self.spec.bias else None

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows (out ...) in the order in which the weight has them; GuardError where ``rearrange`` gives no order."""
        if self.target.rearrange is None:
            return rows
        numbers = torch.arange(rows.shape[0])
        try:
            order = self.target.rearrange(numbers[:, None]).flatten()
        except (TypeError, ValueError, RuntimeError, IndexError):
            order = torch.empty(0)
        if not torch.equal(order.sort().values, numbers):
            what = f"{self.target.key} is stored rearranged in a way that no branch can follow"
            raise GuardError(f"{what}: leave its layer out.", code="layer.rearranged")
        return rows[order]

    def on_outputs(self, rows: Tensor) -> Tensor:
        """Rows of the slice (out ...) among all outputs of the layer, zero elsewhere."""
        if self.target.offset is None or self.target.offset[0] != 0:
            return rows
        _, start, length = self.target.offset
        whole = rows.new_zeros(self.whole[0], *rows.shape[1:])
        whole[start : start + length] = rows
        return whole

    def on_inputs(self, columns: Tensor) -> Tensor:
        """Columns of the slice (r in·k·k) among all inputs of the layer, zero elsewhere."""
        if self.target.offset is None or self.target.offset[0] != 1:
            return columns
        whole = columns.new_zeros(columns.shape[0], *self.whole[1:])  # r in [k k]
        whole.narrow(*self.target.offset).copy_(columns.reshape(columns.shape[0], -1, *self.whole[2:]))
        return whole.flatten(1)

    def weight(self, part: Additive, arrange: bool = True) -> Additive:
        """A change of the slice as one of the whole weight; ``arrange``: its rows are still in the file's order."""
        if self.is_whole:
            return part
        ordered = self.arranged if arrange else lambda rows: rows
        return part.moved(lambda rows: self.on_outputs(ordered(rows)), self.on_inputs)

    def bias(self, bias: Tensor) -> Bias:
        """A change of the slice's bias as one of the whole layer's."""
        return Bias(self.on_outputs(self.arranged(bias.float().flatten())))
