"""Gradient checkpointing of any network: its blocks forget their activations and recompute them going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..modular_lora.errors import GuardError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@contextmanager
def checkpointed(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The forward of every block of ``network`` under torch.utils.checkpoint, non-reentrant, while inside."""
    placed: list[nn.Module] = []
    try:
        for block in _blocks(network) if wanted else ():
            if "forward" not in block.__dict__:
                block.__dict__["forward"] = _Recomputed(block.forward)
                placed.append(block)
        yield
    finally:
        for block in reversed(placed):
            del block.__dict__["forward"]


@contextmanager
def suspended(network: nn.Module) -> Iterator[None]:
    """The blocks' own forwards in place, for previews: the guard refuses to stack its branches on replaced ones."""
    blocks = [block for block in _blocks(network) if isinstance(block.__dict__.get("forward"), _Recomputed)]
    placed = {block: block.__dict__.pop("forward") for block in blocks}
    try:
        yield
    finally:
        for block, forward in placed.items():
            block.__dict__["forward"] = forward


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that are no mere containers."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from _blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


class _Recomputed:
    """A block's forward that keeps no activations."""

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        before = [(part, part._version) for part in _tensors((args, kwargs))]
        made = checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        if any(part._version != version for part, version in before):
            raise GuardError(
                "gradient_checkpointing: this network's blocks write into what they are given, so running them again "
                "would give wrong gradients: switch it off; mixed_precision bf16 halves the memory too.",
                code="train.recompute",
            )
        return made


def _tensors(parts: object) -> list[torch.Tensor]:
    return [part for part in tree_leaves(parts) if isinstance(part, torch.Tensor) and not part.is_inference()]
