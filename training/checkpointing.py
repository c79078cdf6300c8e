"""Gradient checkpointing of any network: its blocks forget their activations and recompute them going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@contextmanager
def checkpointed(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The forward of every block of ``network`` under torch.utils.checkpoint, non-reentrant, while inside."""
    placed: list[nn.Module] = []
    try:
        for block in _blocks(network) if wanted else ():
            if "forward" not in block.__dict__:
                block.__dict__["forward"] = _checkpointing(block.forward)
                placed.append(block)
        yield
    finally:
        for block in reversed(placed):
            del block.__dict__["forward"]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that are no mere containers."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from _blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _checkpointing(forward: Callable) -> Callable:
    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return recomputed
