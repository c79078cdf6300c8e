"""OFT: a rotation of the weight's outputs in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...branches.changes import Dense, Parts, Rotation
from ..target import Place
from .base import Adapter, Shapes, Unread, demand


@dataclass(frozen=True, eq=False)
class OftLayer(Adapter):
    """OFT in Cayley form: W0's output blocks rotated by R = (I + Q)(I - Q)⁻¹, Q = blocks - blocksᵀ.

    As in ComfyUI its ``rescale`` is not used, and its strength counts twice.
    """

    blocks: Tensor  # k n n, k·n = out
    alpha: float | None  # bound on ‖Q‖, None or 0 for none

    form = "OFT"
    reads = ("OFT",)
    roles = ("oft_blocks",)
    endings = {"oft_blocks": "oft_blocks"}
    whole = ({"oft_blocks"},)
    host = ("OFTAdapter", ("oft_blocks", "rescale", "alpha", "dora_scale"))
    power = 2

    @classmethod
    def check(cls, shapes: Shapes) -> int:
        blocks = shapes["oft_blocks"]
        if len(blocks) == 4:
            raise Unread("is BOFT")
        demand(len(blocks) == 3 and blocks[1] == blocks[2], f"oft_blocks {list(blocks)} are not square blocks")
        return blocks[0] * blocks[1]

    @property
    def is_zero(self) -> bool:
        blocks = self.blocks.float()
        return torch.equal(blocks, blocks.transpose(1, 2))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def fits(self, wanted: tuple[int, ...]) -> bool:
        return len(wanted) > 1 and self.shape == wanted[:1]

    def change(self, place: Place) -> Parts:
        """R − I of every block of outputs; on a slice that blocks cannot cover, its product with W0."""
        blocks = self.blocks.float()  # k n n
        q = blocks - blocks.transpose(1, 2)
        if self.alpha and (length := q.norm() + 1e-8) > self.alpha:
            q = q * (self.alpha / length)
        eye = torch.eye(q.shape[1])
        turned = ((eye + q) @ (eye - q).inverse() - eye).transpose(1, 2).contiguous()  # row m: Σ_n (R − I)[n, m]·row n
        if place.is_whole:
            return ((Rotation(turned, place.original_bias()), 1.0),)
        return ((place.weight(Dense(Rotation(turned, None).dense(place.original))), 1.0),)
