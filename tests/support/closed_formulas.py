"""The papers' formulas of closed-form erasure as they stand there, column by column, for tests to hold ours against."""

from __future__ import annotations

import torch
from torch import Tensor


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype)


def formula_uce(W: Tensor, C: Tensor, G: Tensor, K: Tensor, lambda_: float, alpha: float, beta: float) -> Tensor:
    """W* of arXiv 2308.14761: (λW + α Σ W g cᵀ + β Σ W k kᵀ)(λI + α Σ c cᵀ + β Σ k kᵀ)⁻¹."""
    first, second = lambda_ * W, lambda_ * _eye(W)
    for c, g in zip(C.T, G.T, strict=True):
        first = first + alpha * torch.outer(W @ g, c)
        second = second + alpha * torch.outer(c, c)
    for k in K.T:
        first = first + beta * torch.outer(W @ k, k)
        second = second + beta * torch.outer(k, k)
    return first @ torch.linalg.inv(second)


def formula_rece(layers: list[Tensor], C: Tensor, G: Tensor, K: Tensor, rounds: int) -> list[Tensor]:
    """Every W* of arXiv 2407.12383, with its λ = 0.1 and UCE's 0.5."""
    edited = [formula_uce(W, C, G, K, 0.5, 1.0, 1.0) for W in layers]
    for _ in range(rounds):
        first = 0.1 * _eye(layers[0]) + sum(new.T @ new for new in edited)
        found = torch.stack(
            [
                torch.linalg.inv(first) @ sum(new.T @ (W @ c) for new, W in zip(edited, layers, strict=True))
                for c in C.T
            ],
            1,
        )
        edited = [formula_uce(W, found, G, K, 0.5, 1.0, 1.0) for W in edited]
    return edited


def formula_speed(W: Tensor, C: Tensor, G: Tensor, P: Tensor, K2: Tensor, r: float, lambda_: float) -> Tensor:
    """ΔW of arXiv 2503.07392, as the authors' code has it."""
    CC, GC = C @ C.T, G @ C.T
    M = torch.linalg.inv(CC @ P + r * _eye(P))
    if not K2.numel():
        return W @ (GC - CC) @ P @ M
    inner = torch.linalg.inv(K2.T @ P @ M @ K2 + lambda_ * _eye(K2))
    return W @ (GC - CC) @ P @ (_eye(P) - M @ K2 @ inner @ K2.T @ P) @ M


def formula_alpha_edit(W: Tensor, K1: Tensor, R: Tensor, P: Tensor, Kp: Tensor, l2: float) -> Tensor:
    """Δ of arXiv 2410.02355: its code solves (P(K₁K₁ᵀ + K_pK_pᵀ) + L2 I) Δᵀ = P K₁ Rᵀ."""
    return (torch.linalg.inv(P @ (K1 @ K1.T + Kp @ Kp.T) + l2 * _eye(P)) @ P @ K1 @ R.T).T


def formula_fusion(W: Tensor, changes: list[Tensor], concepts: list[Tensor], K: Tensor, lambda_: float) -> Tensor:
    """W* of arXiv 2403.06135's fusion: (λW + Σᵢ (W + ΔWᵢ) Σ c cᵀ + Σ W k kᵀ)(λI + Σ c cᵀ + Σ k kᵀ)⁻¹."""
    first, second = lambda_ * W, lambda_ * _eye(W)
    for change, C in zip(changes, concepts, strict=True):
        for c in C.T:
            first = first + torch.outer((W + change) @ c, c)
            second = second + torch.outer(c, c)
    for k in K.T:
        first = first + torch.outer(W @ k, k)
        second = second + torch.outer(k, k)
    return first @ torch.linalg.inv(second)
