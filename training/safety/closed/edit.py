"""What every closed form here comes to: W* = W (I + U D), one U and D for all layers that share an input.

UCE, RECE, SPEED and AlphaEdit write W* in different ways, and in each the change is W times a matrix of the text side
alone: what a layer gives for c is to be what it gives for c + U D c. So ΔW = (W U) D is a LoRA as it stands, up = W U
and down = D, of as many ranks as U has columns, without an SVD; and the solve is paid once an input, not once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Edit:
    """W* = W (I + U D); W is out d."""

    U: Tensor  # d n, float64
    D: Tensor  # n d, float64

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """(I + U D) x for columns x (d m): what the layers see in the place of x."""
        return x + self.U @ (self.D @ x)

    def then(self, following: Edit) -> Edit:
        """This edit, and ``following`` made of the layers that it gives: (I + U₁D₁)(I + U₂D₂) = I + U D."""
        U = torch.cat([self.U, self(following.U)], 1)
        return Edit(U, torch.cat([self.D, following.D]))

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(down n d, up out n) of one layer, W out d; both factors of one size, so that half precision holds them."""
        up, down = W.to(self.U) @ self.U, self.D
        even = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-150)  # n
        return down * even[:, None], up / even

    def reduced(self, rank: int) -> tuple[Edit, float]:
        """The nearest edit of at most ``rank`` (Frobenius norm of U D), and the share of ‖U D‖² that it keeps."""
        if self.rank <= rank:
            return self, 1.0
        (Qu, Ru), (Qd, Rd) = torch.linalg.qr(self.U), torch.linalg.qr(self.D.T)
        u, s, vh = torch.linalg.svd(Ru @ Rd.T)
        share = float(s[:rank].square().sum() / s.square().sum().clamp_min(1e-300))
        return Edit(Qu @ u[:, :rank] * s[:rank], vh[:rank] @ Qd.T), share
