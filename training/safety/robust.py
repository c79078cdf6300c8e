"""Erasing what an attacker would ask with: adversarial embeddings in the training loop.

AdvUnlearn (arXiv 2405.15234) and Receler (arXiv 2311.17717) train against the worst prompt near the concept's, found
anew in every step. Here it is searched for on the conditioning itself, by projected gradient descent (arXiv
1706.06083):

    min over δ of |ε_θ(x_t, c + δ) − ε_0(x_t, c)|²,   ‖δ_i‖ ≤ size ‖c_i‖ for every token i

the embedding with which the network says again what the frozen base says for the concept. It starts at δ = 0, so a step
draws no random number more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Cond
from .sampling import Network

STRIDE = 2.5  # steps of the attack times their length, as a multiple of the radius (as in arXiv 1706.06083)


def attacked(network: Network, x_t: Tensor, t: Tensor, cond: Cond, brought: Tensor, steps: int, size: float) -> Cond:
    """The conditioning near ``cond`` for which ``network`` comes nearest to ``brought``.

    Args:
        network: The model with its adapters on.
        x_t: b c ... .
        t: b.
        cond: Of the concept, b rows.
        brought: What the base says there, ε_0(x_t, c), b c ... .
        steps: Of the descent.
        size: Radius, as a share of every token's norm.
    """
    cross = [row.cross.detach() for row in cond.rows]  # 1 n d each
    deltas = [torch.zeros_like(own) for own in cross]
    for _ in range(steps):
        moving = [delta.requires_grad_() for delta in deltas]
        with torch.enable_grad():
            asked = cond.crossing([own + delta for own, delta in zip(cross, moving, strict=True)])
            error = (network(x_t, t, asked) - brought).square().sum()
            gradients = torch.autograd.grad(error, moving)
        found = zip(cross, deltas, gradients, strict=True)
        deltas = [_moved(size * own.norm(dim=-1, keepdim=True), delta, g, steps) for own, delta, g in found]
    return cond.crossing([own + delta for own, delta in zip(cross, deltas, strict=True)])


def _moved(radius: Tensor, delta: Tensor, gradient: Tensor, steps: int) -> Tensor:
    """One step of the descent (1 n d), back within ``radius`` (1 n 1) of every token."""
    step = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    delta = delta.detach() - STRIDE / steps * radius * step
    return delta * (radius / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
