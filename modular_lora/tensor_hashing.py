"""SHA-256 of tensors, by which latents, images, embeddings and weights are told apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of shape, dtype and contents; the same on every device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def row_digests(tensor: Tensor) -> tuple[str, ...]:
    """SHA-256 of every row of an embedding (b n d -> b·n digests), as float32."""
    rows = tensor.detach().float().cpu().reshape(-1, tensor.shape[-1])
    return tuple(hashlib.sha256(_bytes(row)).hexdigest() for row in rows)


def carrying_digests(tensor: Tensor) -> tuple[str, ...]:
    """`row_digests` of the rows that are not zero: ConditioningZeroOut's carry nothing."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return row_digests(rows[rows.abs().amax(1) > 0])


def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named weights in name order, each as float32: independent of device and of storage precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().float() if tensor.is_floating_point() else tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
