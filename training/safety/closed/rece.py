"""RECE (Gong et al., arXiv 2407.12383): erase, find the embedding that brings the concept back, erase that, repeat.

    c' = (λ I + Σᵢ W'ᵢᵀ W'ᵢ)⁻¹ (Σᵢ W'ᵢᵀ Wᵢ) c        (the c' that the edited W'ᵢ answer as the Wᵢ before answered c)

and UCE on c' with the layers as they are by then. Every W'ᵢ is Wᵢ (I + E), so with S = Σᵢ Wᵢᵀ Wᵢ the two sums are
(I + E)ᵀ S (I + E) and (I + E)ᵀ S: the layers are read once, whatever their number and the rounds'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edit import Edit
from .uce import LAMBDA, uce

REGULAR, ROUNDS = 0.1, 3  # the authors' settings for nudity


def adversarial(C: Tensor, S: Tensor, edit: Edit, lambda_: float = REGULAR) -> Tensor:
    """c' of every column of C (d n), for S = Σ WᵀW (d d) of the layers before the edit."""
    one = torch.eye(len(C)).to(C)
    edited = one + edit.U @ edit.D  # I + E
    return torch.linalg.solve(lambda_ * one + edited.T @ S @ edited, edited.T @ S @ C)


def rece(
    C: Tensor,
    G: Tensor,
    K: Tensor,
    S: Tensor,
    rounds: int = ROUNDS,
    lambda_: float = REGULAR,
    uce_lambda: float = LAMBDA,
) -> Edit:
    """UCE of C onto G holding K, then ``rounds`` times UCE of what brings C back; see `uce` for the shapes.

    The rank grows by n a round.
    """
    edit = uce(C, G, K, uce_lambda)
    for _ in range(rounds):
        edit = edit.then(uce(adversarial(C, S, edit, lambda_), G, K, uce_lambda))
    return edit
