"""Erasing inside the null space of what is kept: SPEED (arXiv 2503.07392) and AlphaEdit (arXiv 2410.02355).

P projects onto what the kept inputs K do not use, so a change that ends in P says nothing for any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edit import Edit

THRESHOLD = 0.1  # SPEED's code: eigenvalues of the kept covariance below it count as unused
ROUNDING = 1e-5  # of the largest singular value of K: what float32 inputs say nothing below


def null_space(K: Tensor) -> tuple[Tensor, int]:
    """P (d d) with P K = 0, and rank(K), of kept inputs K (d m)."""
    if K.shape[1] < len(K):
        U, s, _ = torch.linalg.svd(K, full_matrices=False)
    else:
        values, U = torch.linalg.eigh(K @ K.T)
        s = values.clamp_min(0).sqrt()
    U = U[:, s > ROUNDING * s.max()]
    return torch.eye(len(K)).to(K) - U @ U.T, U.shape[1]


def quiet_space(K: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """P (d d) onto the eigenvectors of K Kᵀ / m (d d) with eigenvalues below ``threshold`` (SPEED).

    For kept inputs that fill the whole space: what is kept then changes, a little.
    """
    values, vectors = torch.linalg.eigh(K @ K.T / K.shape[1])
    quiet = vectors[:, values < threshold]
    return quiet @ quiet.T


def speed(C1: Tensor, Cstar: Tensor, P: Tensor, K2: Tensor, r: float = 1.0, lambda_: float = 0.0) -> Edit:
    """SPEED as its code has it; K₂ (d m, the start token among them) is held exactly where λ is 0.

        ΔW = W (C* C₁ᵀ − C₁ C₁ᵀ) P (I − M K₂ (K₂ᵀ P M K₂ + λ I)⁻¹ K₂ᵀ P) M,   M = (C₁ C₁ᵀ P + r I)⁻¹

    Args:
        C1: The concept's inputs (d n), float64.
        Cstar: What each is moved to (d n).
        P: Projector (d d), of `null_space` or `quiet_space`.
        K2: Inputs that are held beside it (d m); m may be 0. What of them P takes away already needs no holding.
        r: Weight of leaving W as it is.
        lambda_: Weight against an ill-conditioned K₂.
    """
    one = torch.eye(C1.shape[1]).to(C1)
    D = torch.linalg.solve(C1.T @ P @ C1 + r * one, C1.T @ P)  # C₁ᵀ P M, as (A + r)⁻¹ moves past what A is made of
    held = K2.T @ P  # m d
    if K2.numel() and float(held.norm()) > ROUNDING * float(K2.norm()):
        held = (held - held @ C1 @ D) / r  # K₂ᵀ P M, by Woodbury
        inner = held @ K2 + lambda_ * torch.eye(K2.shape[1]).to(K2)
        D = D - D @ K2 @ torch.linalg.pinv(inner, rtol=1e-12, hermitian=True) @ held
    return Edit(Cstar - C1, D)


def alpha_edit(K1: Tensor, R: Tensor, P: Tensor, Kp: Tensor, l2: float = 10.0) -> Edit:
    """AlphaEdit: Δ = R K₁ᵀ P (K_p K_pᵀ P + K₁ K₁ᵀ P + L2 I)⁻¹, with the residual R = W (C* − C₁) as W times ``R``.

    Args:
        K1: Inputs whose outputs are to change (d n), float64.
        R: C* − C₁ (d n): what is to be added to them, on the side of the inputs.
        P: Projector (d d).
        Kp: Inputs of earlier edits, which are held as far as the regression can (d m); m may be 0.
        l2: Weight of a small change; the authors' code has 10 for GPT-J's and Llama's layers.
    """
    K = torch.cat([Kp, K1], 1)  # K Kᵀ = K_p K_pᵀ + K₁ K₁ᵀ
    D = torch.linalg.solve(K.T @ P @ K + l2 * torch.eye(K.shape[1]).to(K), K.T @ P)  # Kᵀ P (K Kᵀ P + L2 I)⁻¹
    return Edit(R, D[Kp.shape[1] :])
