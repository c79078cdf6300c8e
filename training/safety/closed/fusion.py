"""MACE's fusion (Lu et al., arXiv 2403.06135): several safety LoRAs as one, each on its own concept only.

    W* = (λ W + Σᵢ (W + ΔWᵢ) Cᵢ Cᵢᵀ + W K Kᵀ) (λ I + Σᵢ Cᵢ Cᵢᵀ + K Kᵀ)⁻¹

With M the second bracket, W M is λ W + Σᵢ W Cᵢ Cᵢᵀ + W K Kᵀ, hence W* − W = Σᵢ ΔWᵢ Cᵢ Cᵢᵀ M⁻¹: of every LoRA the up
factor stays, and its down factor D becomes D Cᵢ Cᵢᵀ M⁻¹. Of no LoRA does the rank grow; no SVD is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reaches(C: Sequence[Tensor], K: Tensor, lambda_: float) -> list[Tensor]:
    """Cᵢᵀ M⁻¹ (nᵢ d) of every concept: what of an input is taken for the concept's.

    Args:
        C: Inputs of the layers for each LoRA's concept (d nᵢ), float64.
        K: Inputs that none of them is to change (d m); m may be 0.
        lambda_: Weight of W itself; above 0.
    """
    M = lambda_ * torch.eye(len(K)).to(K) + K @ K.T  # d d, symmetric
    for one in C:
        M = M + one @ one.T
    return list(torch.linalg.solve(M, torch.cat(list(C), 1)).T.split([one.shape[1] for one in C]))


def confined(down: Tensor, up: Tensor, C: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (r' d, out r') of up · down · C · reach, r' the smaller of the LoRA's rank and C's columns.

    Args:
        down: r d, float64.
        up: out r, float64, the LoRA's scale in it.
        C: The concept's inputs (d n).
        reach: Cᵀ M⁻¹ (n d) of `reaches`.
    """
    thin = down @ C  # r n
    return (thin @ reach, up) if len(thin) <= C.shape[1] else (reach, up @ thin)
