"""How a layer of a model takes a branch, read from torch's public attributes of the layer only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerSpec:
    """How a layer takes a branch. ``weight_shape`` is the shape of W0: (out, in) or (out, in, *kernel).

    ``problem`` says why the layer takes no branch (an embedding, a grouped convolution, a quantised weight); the guard
    turns it into an error that names file and layer.
    """

    path: str
    weight_shape: tuple[int, ...]
    conv: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None  # stride, padding, dilation
    problem: str | None = None


def layer_spec(path: str, module: nn.Module) -> LayerSpec:
    """The spec of the module at ``path``; read from nn.Linear's and nn.ConvNd's public attributes only."""
    shape = tuple(module.weight.shape) if getattr(module, "weight", None) is not None else ()
    if isinstance(module, nn.Linear):
        return LayerSpec(path, shape)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return LayerSpec(path, shape, problem="a grouped or specially padded convolution")
        return LayerSpec(path, shape, conv=(module.stride, module.padding, module.dilation))
    return LayerSpec(path, shape, problem=f"a {type(module).__name__}, not a Linear or Conv layer")
