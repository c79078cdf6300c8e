"""Unified Concept Editing (Gandikota et al., arXiv 2308.14761): ridge regression of the concept onto the guide.

    W* = (λ W + α Σ W g cᵀ + β Σ W k kᵀ) (λ I + α Σ c cᵀ + β Σ k kᵀ)⁻¹

With M the second bracket, W M = λ W + α Σ W c cᵀ + β Σ W k kᵀ, hence W* − W = α W (G − C) Cᵀ M⁻¹: rank n, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edit import Edit

LAMBDA, ALPHA, BETA = 0.5, 1.0, 1.0  # the authors' code


def uce(C: Tensor, G: Tensor, K: Tensor, lambda_: float = LAMBDA, alpha: float = ALPHA, beta: float = BETA) -> Edit:
    """Concept C (d n), guide G (d n, column by column) and kept K (d m), all float64.

    Args:
        C: Inputs of the layers for what is erased, a token a column.
        G: What each of them is moved to.
        K: Inputs that are held, as far as the regression can.
        lambda_: Weight of W itself.
        alpha: Weight of the concept.
        beta: Weight of what is kept.
    """
    M = lambda_ * torch.eye(len(C)).to(C) + alpha * C @ C.T + beta * K @ K.T  # d d, symmetric
    return Edit(alpha * (G - C), torch.linalg.solve(M, C).T)
