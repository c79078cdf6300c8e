"""Normalisations that take a change of their weight and bias: y = n(x)·(w + Δw) + b + Δb = y₀ + n(x)·Δw + Δb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

_RMS = ("RMSNorm", "T5LayerNorm")  # ComfyUI's own classes beside nn.RMSNorm
_EPS = 1e-6  # of Flux's RMSNorm, which calls its weight ``scale`` and says no more


@dataclass(frozen=True)
class Norm(ABC):
    """What a norm does before its weight."""

    shape: tuple[int, ...]  # of the weight

    @abstractmethod
    def normalised(self, x: Tensor) -> Tensor:
        """n(x), in the shape and dtype of x."""

    def beside(self, vector: Tensor, y: Tensor) -> Tensor:
        """The weight's or bias's shape as it multiplies y."""
        return vector.view(self.shape)


@dataclass(frozen=True)
class GroupNorm(Norm):
    """Channels are the second dimension of y."""

    groups: int
    eps: float

    def normalised(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, eps=self.eps)

    def beside(self, vector: Tensor, y: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in y.shape[2:]))


@dataclass(frozen=True)
class LayerNorm(Norm):
    eps: float

    def normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps)


@dataclass(frozen=True)
class RMSNorm(Norm):
    eps: float | None  # None: torch's own, of the dtype

    def normalised(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, eps=self.eps)


def norm_of(module: nn.Module) -> Norm | None:
    """What ``module`` does if it is a norm with a weight whose arithmetic is known, else None.

    A weight that a class stores less one (Gemma's RMSNorm) changes y by the same n(x)·Δw.
    """
    if not isinstance(module, nn.GroupNorm | nn.LayerNorm) and type(module).__name__ not in _RMS:
        return None
    weight = getattr(module, norm_weight(module) or "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.GroupNorm):
        return GroupNorm(tuple(weight.shape), module.num_groups, module.eps)
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(tuple(weight.shape), module.eps)
    if type(module).__name__ in _RMS and weight.dim() == 1:
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", _EPS))
        return RMSNorm(tuple(weight.shape), eps)
    return None


def norm_weight(module: nn.Module) -> str | None:
    """The name of the weight of an RMS norm that does not call it ``weight``; None for all other modules."""
    if type(module).__name__ not in _RMS or hasattr(module, "weight"):
        return None
    return "scale" if isinstance(getattr(module, "scale", None), Tensor) else None
