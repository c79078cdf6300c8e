"""A training that starts from a safety LoRA which is there already, e.g. one in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile
from ..adapters import Adapters
from .closed.edit import Edit


@torch.no_grad()
def start_from(adapters: Adapters, lora: LoraFile) -> str:
    """Put a file's ΔW into the adapters that it has layers for: exactly, or the nearest of the adapters' rank.

    The other adapters start at zero, as without it.

    Returns:
        A line that says how much of ‖ΔW‖² was taken.

    Raises:
        GuardError: the file has a layer that is not trained, or of another shape.
    """
    if missing := sorted(set(lora.layers) - set(adapters.layers)):
        raise GuardError(
            f"init {lora.name}: {len(missing)} of its layers are not among those to be trained (first: {missing[0]}): "
            "choose the objective and target that train them, e.g. esd-x with target cross-attention, or leco.",
            code="init.other-layers",
        )
    kept = whole = 0.0
    for name, layer in lora.plain.items():
        down, up = adapters.pair(name)
        if layer.down.shape[1:] != down.shape[1:] or layer.up.shape[0] != up.shape[0]:
            raise GuardError(
                f"init {lora.name}: layer {name} has another shape than this model's: use its own base.",
                code="init.other-shape",
            )
        rank, scale = len(down), adapters.scale(name)
        edit = Edit(layer.scale * layer.up.double().flatten(1), layer.down.double().flatten(1))
        near, share = edit.reduced(rank)
        energy = float((edit.U.T @ edit.U * (edit.D @ edit.D.T)).sum())
        kept, whole = kept + share * energy, whole + energy
        even = (near.U.norm(dim=0) / near.D.norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-150)  # r
        _fill(down, near.D * even[:, None] / scale)
        up.zero_()
        _fill(up.flatten(1).T, (near.U / even).T)
    return f"started from {lora.name}: {100 * kept / max(whole, 1e-300):.2f} % of its change at this rank"


def _fill(rows: Tensor, values: Tensor) -> None:
    """The first rows; where the file has a smaller rank, what is left of up is zero and of down as it was drawn."""
    rows[: len(values)].copy_(values.reshape(len(values), *rows.shape[1:]))
