"""How a layer of a model takes a branch, read from torch's public attributes of the layer only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from .norms import Norm, norm_of


@dataclass(frozen=True)
class LayerSpec:
    """How a layer takes a branch. ``weight_shape`` is the shape of W0: (out, in) or (out, in, *kernel).

    It comes from the layer's features and kernel, never from the stored tensor, whose layout is the quantiser's.
    ``problem`` says why the layer takes no branch (an embedding, a grouped convolution, a weight that cannot be
    placed); the guard turns it into an error that names file and layer.
    """

    path: str
    weight_shape: tuple[int, ...]
    conv: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None  # stride, padding, dilation
    problem: str | None = None
    bias: bool = False  # whether the layer has one
    norm: Norm | None = None  # a norm takes changes of its weight and bias and no other; ``problem`` says so


def bias_key(weight_key: str) -> str:
    """The key of the bias beside a weight."""
    return f"{weight_key.rpartition('.')[0]}.bias"


def layer_spec(path: str, module: nn.Module) -> LayerSpec:
    """The spec of the module at ``path``: a Linear, one that says its features like nn.Linear, nn.ConvNd or a norm."""
    spec = _spec(path, module)
    if (norm := norm_of(module)) is not None:
        spec = replace(spec, weight_shape=norm.shape, norm=norm)
    return replace(spec, bias=isinstance(getattr(module, "bias", None), Tensor))


def _spec(path: str, module: nn.Module) -> LayerSpec:
    weight = getattr(module, "weight", None)
    stored = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return LayerSpec(path, shape, problem="a grouped or specially padded convolution")
        return LayerSpec(path, shape, conv=(module.stride, module.padding, module.dilation))
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not all(isinstance(size, int) for size in shape):
        return LayerSpec(path, stored, problem=f"a {type(module).__name__}, not a Linear or Conv layer")
    if isinstance(module, nn.Linear) or stored == shape:  # a packed nn.Linear still maps x to y
        return LayerSpec(path, shape)
    return LayerSpec(path, shape, problem=f"a {type(module).__name__} with a weight of shape {list(stored)}")
