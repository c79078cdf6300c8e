"""A frozen base that takes less room than it computes with: weights kept in 8 bits, or in main memory.

Such a weight is a tensor of the training's device and precision that holds its numbers elsewhere. What is computed with
it, going forward and going back, finds the whole weight, made for that one operation; what autograd keeps between the
two is what is held. So gradients are those of the whole weights, and one layer at a time has its own in full.

Hooks that move a module's weights for its forward (accelerate's ``cpu_offload``), and ComfyUI's casts inside it, save
nothing in a training: autograd keeps what they made until the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from ..modular_lora.errors import GuardError
from .checkpointing import blocks_of
from .memory import size
from .options import Options

EIGHT_BITS = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
MAIN_MEMORY = torch.device("cpu")
_aten = torch.ops.aten
_VIEWS = {  # what gives the same numbers in another order, which what is held can be asked for
    _aten.alias.default, _aten.detach.default, _aten.permute.default, _aten.t.default, _aten.transpose.int,
    _aten.view.default, _aten._unsafe_view.default,
}  # fmt: skip


class Stored(Tensor):
    """A weight, to be read alone: ``scale`` times ``held``, in ``dtype`` and on ``device`` as soon as it is used."""

    held: Tensor
    scale: float
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, scale: float, dtype: torch.dtype, device: torch.device) -> Stored:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=dtype, device=device)
        made.held, made.scale = held, scale
        return made

    def __init__(self, held: Tensor, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        """See __new__."""

    def whole(self) -> Tensor:
        """The weight itself; never to be written to, as it may be what is held."""
        values = self.held.to(self.device).to(self.dtype)
        return values if self.scale == 1 else values.mul_(self.scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _VIEWS:
            return cls(func(args[0].held, *args[1:], **kwargs), args[0].scale, args[0].dtype, args[0].device)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Stored) and argument.alias_info is not None and argument.alias_info.is_write:
                raise TypeError(f"{func}: a stored weight is read alone: what is written would be lost")
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


def _whole(value: object) -> object:
    return value.whole() if isinstance(value, Stored) else value


class Storage:
    """How a network's weights are stored while it is trained, from ``fp8_base_unet`` and ``blocks_to_swap``.

    Both are of the weights of linear layers and convolutions, which are nearly all of a network; what else it has
    (biases, norms, positions) stays whole. In 8 bits a weight W is W / s rounded to float8 (e4m3), s = max |W| / 448.
    Of blocks, the outermost modules that are no mere containers, those with the most numbers are swapped.
    """

    def __init__(self, network: nn.Module, options: Options, dtype: torch.dtype, device: torch.device) -> None:
        """Raises GuardError where the network has fewer blocks."""
        self._eight_bits, self._dtype, self._device = options.fp8_base_unet, dtype, device
        blocks = sorted(blocks_of(network), key=_numbers, reverse=True)
        if (count := options.blocks_to_swap) > len(blocks):
            raise GuardError(
                f"blocks_to_swap: {count}, and this network has {len(blocks)} blocks: give at most {len(blocks)}.",
                code="train.blocks",
            )
        self._swapped = {part for block in blocks[:count] for part in block.modules()}
        self._blocks = count
        self._rounded, self._away = _Sum(), _Sum()
        self._exact = 0  # weights that had 8 bits already
        self._change = self._energy = 0.0  # |W' − W|², |W|²

    @torch.no_grad()
    def of(self, module: nn.Module, name: str, weight: Tensor) -> nn.Parameter | None:
        """What stands in the place of a module's weight of this name; None where that is to be whole."""
        swapped = module in self._swapped
        layer = isinstance(module, nn.Linear | _ConvNd) and name == "weight" and weight.is_floating_point()
        if not layer or not (swapped or self._eight_bits) or hasattr(weight, "__tensor_flatten__"):
            return None  # the last is made of others already (ComfyUI's QuantizedTensor)
        held, scale = weight.detach(), 1.0
        if self._eight_bits:
            held, scale = self._in_eight_bits(held)
        if swapped:
            held = held.to(MAIN_MEMORY)
            self._away.add(held)
        else:
            held = held.to(self._device)
        return nn.Parameter(Stored(held, scale, self._dtype, self._device), requires_grad=False)

    def _in_eight_bits(self, weight: Tensor) -> tuple[Tensor, float]:
        if weight.dtype.itemsize == 1:
            self._exact += 1
            return weight, 1.0
        W = weight.float()
        scale = float(W.abs().max()) / torch.finfo(EIGHT_BITS).max or 1.0
        held = (W / scale).to(EIGHT_BITS)
        self._rounded.add(held)
        self._change += float((held.float().mul_(scale) - W).double().square().sum())
        self._energy += float(W.double().square().sum())
        return held, scale

    def lines(self) -> list[str]:
        """For the report."""
        found = []
        if self._eight_bits:
            whole = self._rounded.numbers * self._dtype.itemsize
            share = math.sqrt(self._change / self._energy) if self._energy else 0.0
            line = f"fp8_base_unet: {self._rounded.weights} weights in 8 bits, {size(self._rounded.bytes)} in place of "
            line += f"{size(whole)} ({self._dtype}); the LoRA is trained on these ROUNDED weights, "
            line += f"|W0' - W0| / |W0| {share:.2g}"
            found.append(line + f"; {self._exact} had 8 bits already, and are as they were" * bool(self._exact))
        if self._blocks:
            line = f"blocks_to_swap: {self._blocks} blocks wait in main memory, {self._away.weights} weights, "
            line += size(self._away.bytes)
            if self._device.type == "cpu":
                line += "; on the CPU, as here, that saves a copy in the training's precision at most"
            found.append(line)
        return found


class _Sum:
    """Weights that were stored so."""

    def __init__(self) -> None:
        self.weights = self.numbers = self.bytes = 0

    def add(self, held: Tensor) -> None:
        self.weights, self.numbers, self.bytes = self.weights + 1, self.numbers + held.numel(), self.bytes + held.nbytes


def _numbers(block: nn.Module) -> int:
    return sum(weight.numel() for weight in block.parameters())
