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
        x_t: b c h w.
        t: b.
        cond: Of the concept, b rows.
        brought: ε_0(x_t, c), b c h w.
        steps: Of the descent.
        size: Radius, as a share of every token's norm.
    """
    cross = cond.cross.detach()  # b n d
    radius = size * cross.norm(dim=-1, keepdim=True)
    delta = torch.zeros_like(cross)
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad():
            error = (network(x_t, t, Cond(cross + delta, cond.pooled, cond.sizes)) - brought).square().sum()
            (gradient,) = torch.autograd.grad(error, delta)
        step = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        delta = delta.detach() - STRIDE / steps * radius * step
        delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return Cond(cross + delta, cond.pooled, cond.sizes)
