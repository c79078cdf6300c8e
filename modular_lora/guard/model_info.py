"""What the guard asks of a host about one of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..branches.attachment import Times
from ..branches.layer_spec import LayerSpec, bias_key
from ..errors import GuardError
from ..files.matching import KeyMap


def _no_weight(key: str) -> Tensor:
    raise GuardError(
        f"The value of {key} is not known here, and DoRA and OFT are functions of it: leave the LoRA out.",
        code="layer.value-unknown",
    )


def _no_norm(key: str) -> float:
    raise GuardError(f"The norm of {key} is not known here.")


@dataclass(frozen=True)
class ModelInfo:
    """What the host knows of one model: ``key_map`` (file name -> weight key) and ``specs`` (weight key -> layer).

    ``weight`` gives W0's tensor of a weight or bias key, merged LoRAs taken back out and dequantised (GuardError where
    that cannot be had); it is asked only for adapters that are functions of W0 (DoRA, OFT). ``parts``: the
    sub-modules, by path, that do not run exactly once an evaluation. ``norm`` gives the Frobenius norm of W0's tensor
    of a weight key; hosts remember it, as W0 has to be read for it.
    """

    family: str
    key_map: KeyMap
    specs: Mapping[str, LayerSpec]
    roots: tuple[str, ...]
    weight: Callable[[str], Tensor] = _no_weight
    parts: Mapping[str, Times] = field(default_factory=dict)
    norm: Callable[[str], float] = _no_norm

    @cached_property
    def places(self) -> dict[str, LayerSpec]:
        """The layer of every weight and of every bias beside one."""
        return {**{bias_key(key): spec for key, spec in self.specs.items() if spec.bias}, **self.specs}
