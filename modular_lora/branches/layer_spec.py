"""How a layer of a model takes a branch, read from torch's public attributes of the layer only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import Norm, norm_of, norm_weight

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Conv(NamedTuple):
    """How a convolution runs; a transposed one has an ``output_padding`` and a W0 of (in, out/groups, *kernel)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    output_padding: tuple[int, ...] | None = None

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    @property
    def dense(self) -> bool:
        """Whether a change goes through the layer only in the shape of W0: two factors in a row are no convolution."""
        return self.transposed or self.groups != 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x with ``weight``, without a bias."""
        dims = weight.dim() - 3
        runs: tuple[Callable[..., Tensor], ...]  # torch has an overload for each kind of padding
        if self.transposed:
            runs = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
            return runs[dims](
                x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        runs = F.conv1d, F.conv2d, F.conv3d
        return runs[dims](x, weight, None, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class LayerSpec:
    """How a layer takes a branch. ``weight_shape`` is the shape of W0: (out, in) or (out, in/groups, *kernel).

    It comes from the layer's features and kernel, never from the stored tensor, whose layout is the quantiser's.
    ``problem`` says why the layer takes no branch (an embedding, a padding other than zeros, a weight that cannot be
    placed); the guard turns it into an error that names file and layer.
    """

    path: str
    weight_shape: tuple[int, ...]
    conv: Conv | None = None
    problem: str | None = None
    bias: bool = False  # whether the layer has one
    norm: Norm | None = None  # a norm takes changes of its weight and bias and no other; ``problem`` says so
    narrow: int | None = None  # inputs of W0 where a LoRA gives the layer more (``weight_shape`` has them all)

    @property
    def outputs(self) -> int:
        if self.conv is not None and self.conv.transposed:
            return self.weight_shape[1] * self.conv.groups
        return self.weight_shape[0]

    @property
    def inputs(self) -> int:
        """Numbers in a row of the weight: in·k·k."""
        return math.prod(self.weight_shape[1:])

    @property
    def own(self) -> LayerSpec:
        """Of the layer as it is, without the inputs that a LoRA gives it."""
        return self if self.narrow is None else self.with_inputs(self.narrow, None)

    def with_inputs(self, inputs: int, narrow: int | None) -> LayerSpec:
        """With so many inputs; ``narrow``: how many of them the layer has by itself, None where it has them all."""
        return replace(self, weight_shape=(self.weight_shape[0], inputs), narrow=narrow)


def bias_key(weight_key: str) -> str:
    """The key of the bias beside a weight."""
    return f"{weight_key.rpartition('.')[0]}.bias"


def layer_specs(model: nn.Module) -> dict[str, LayerSpec]:
    """The specs of all modules that have a weight, or a norm's ``scale``, by the key of it."""
    found = {}
    for path, module in model.named_modules():
        name = "weight" if isinstance(getattr(module, "weight", None), Tensor) else norm_weight(module)
        if name is not None:
            found[f"{path}.{name}"] = layer_spec(path, module)
    return found


def layer_spec(path: str, module: nn.Module) -> LayerSpec:
    """The spec of the module at ``path``: a Linear or what says its features like one, a convolution, a norm."""
    bias = isinstance(getattr(module, "bias", None), Tensor)
    if (norm := norm_of(module)) is not None:
        return replace(_spec(path, module), weight_shape=norm.shape, norm=norm, bias=bias)
    spec = _spec(path, module)
    return replace(spec, bias=True) if bias else spec


def _spec(path: str, module: nn.Module) -> LayerSpec:
    weight = getattr(module, "weight", None)
    stored = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, _Convolution):
        return _conv_spec(path, module)
    outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(outputs, int) and isinstance(inputs, int)):
        return LayerSpec(path, stored, problem=f"a {type(module).__name__}, not a Linear or Conv layer")
    shape = (outputs, inputs)
    if isinstance(module, nn.Linear) or stored == shape:  # a packed nn.Linear still maps x to y
        return LayerSpec(path, shape)
    return LayerSpec(path, shape, problem=f"a {type(module).__name__} with a weight of shape {list(stored)}")


def _conv_spec(path: str, module: _Convolution) -> LayerSpec:
    first, second = module.out_channels, module.in_channels // module.groups
    output_padding = None
    if module.transposed:
        first, second, output_padding = module.in_channels, module.out_channels // module.groups, module.output_padding
    shape = (first, second, *module.kernel_size)
    if module.padding_mode != "zeros":
        return LayerSpec(path, shape, problem=f"a convolution padded by {module.padding_mode!r}")
    return LayerSpec(path, shape, Conv(module.stride, module.padding, module.dilation, module.groups, output_padding))
