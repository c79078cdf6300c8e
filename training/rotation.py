"""OFT of a layer's outputs, with PEFT's blocks: imported where it is used, since PEFT takes seconds.

PEFT's OFT layers turn a layer's inputs (W0·R). kohya's and LyCORIS' files hold rotations of its outputs (Rᵀ·W0), and
that is what their readers do with them, so here the same module of PEFT's turns what W0 says, without the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..modular_lora.errors import GuardError


class Rotated(nn.Module, BaseTunerLayer):
    """y = W0·x + b, the k blocks of n numbers of W0·x each turned: y' = (W0·x)·R + b."""

    adapter_layer_names = ("oft_R",)

    def __init__(self, base_layer: nn.Module, most: int, adapter: str, path: str):
        """Blocks of the largest size up to ``most`` that LyCORIS' factorization gives for the layer's outputs."""
        super().__init__()
        weight = base_layer.get_parameter("weight")
        self.base_layer, self.size = base_layer, min(factorization(len(weight), most))
        if self.size < 2:
            raise GuardError(
                f"{path}: its {len(weight)} outputs fall into no equal blocks of at most {most} numbers to be turned: "
                "set a larger network_dim, or another target.",
                code="train.no-blocks",
            )
        half = self.size * (self.size - 1) // 2
        turn = OFTRotationModule(
            len(weight) // self.size, half, self.size, len(weight), use_cayley_neumann=False
        )  # in float32: a small rotation would be lost in a half
        self.oft_R = nn.ModuleDict({adapter: turn.to(weight.device, torch.float32)})
        self._active_adapter: str = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        bias = self.base_layer.bias
        dim = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        rows = y.movedim(dim, -1)
        said = (rows if bias is None else rows - bias.to(rows)).flatten(0, -2).float()  # rows, out
        turned = (self.oft_R[self._active_adapter](said) - said).reshape(rows.shape).movedim(-1, dim)
        return y + turned.to(y.dtype)
