"""How large the LoRAs beside a safety LoRA may be: sums in floating point lose what is small beside what is large.

The guard sums safety and task LoRAs apart (fusing.Fused), so only the last addition, (y0 + s) + t, can still round s
away. It cannot while t is of the size of y0 itself, whose own rounding s outlives. A file whose terms are far larger
than that is no LoRA that anybody trained, even where they cancel in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..branches.layer_spec import LayerSpec
from ..errors import GuardError
from .apply import Applied
from .model_info import ModelInfo

LIMIT = 256.0  # of ‖W0‖ or ‖dW_s‖, whichever is larger; what LoRAs really have: docs/guarantees.md


def check_magnitudes(applied: Sequence[Applied], info: ModelInfo) -> None:
    """Hold the terms of all LoRAs beside each safety LoRA against W0 and the safety LoRA, layer by layer.

    The magnitude of a change is Σᵢ |uᵢ||dᵢ| of a product of factors and the norm of any other, times its strength.

    Raises:
        GuardError: Where on a layer of a safety LoRA the others together exceed LIMIT·max(‖W0‖, ‖dW_s‖).
    """
    places, weights = info.places, {spec.path: key for key, spec in info.specs.items()}
    for safety in applied:
        if safety.role != "safety":
            continue
        own = _by_layer(safety, places, "energy")
        others = [(a, _by_layer(a, places, "magnitude")) for a in applied if a is not safety]
        for path, key in ((path, weights[path]) for path in own):
            sizes = [(size[path], a) for a, size in others if path in size]
            total = sum(size for size, _ in sizes)
            if not total <= LIMIT * own[path] and not total <= LIMIT * _norm(info, key):
                _, largest = max(sizes, key=lambda item: (item[0] != item[0], item[0]))
                raise GuardError(
                    f"{largest.lora.name}: its values in layer {path} add up to {total:.3g}, more than {LIMIT:g} times "
                    f"the weights there, and the share of safety LoRA {safety.lora.name} could be lost beside them: "
                    "leave the LoRA out, it was damaged or made for that.",
                    code="lora.too-large",
                )


def _by_layer(a: Applied, places: Mapping[str, LayerSpec], what: Literal["energy", "magnitude"]) -> dict[str, float]:
    """Norms of the changes, or their magnitudes, times the strength, by the path of the layer."""
    found: dict[str, float] = {}
    for key, change in a.changes.items():
        size = change.energy**0.5 if what == "energy" else change.magnitude
        path = places[key].path
        found[path] = found.get(path, 0.0) + abs(a.strength) * size
    return found


def _norm(info: ModelInfo, key: str) -> float:
    """‖W0‖ of a layer; 0 where its value cannot be had, which leaves the safety LoRA alone to compare with."""
    try:
        return info.norm(key)
    except GuardError:
        return 0.0
