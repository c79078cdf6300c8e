"""Expand the demo world's live weights to a checkpoint in stock SD1.5 layout, byte for byte the same everywhere.

The U-Net and the autoencoder are written as float16 and the text encoder as float8_e4m3, whose trained rows are exact
in that type. Dead channels are zeros. Needs torch and safetensors only. Command:
``python -m tools.world.expand FOLDER``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.util import atomic
from modular_lora_guard.modular_lora.util.hashing import hash_file
from safetensors.torch import load_file
from torch import Tensor

from ..world import ASSETS, CHECKPOINT, LIVE_WEIGHTS, layout

logger = logging.getLogger("modular_lora")

SHA256 = "6c7122c557efac0dcda26ffcb8478b9be4e3db7bd077865389cdc3768eff0bee"  # of the expanded checkpoint
LATENT_SCALE = 0.18215  # stock factor between autoencoder latents and U-Net latents; makes the latter unit variance

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
DTYPES = {"F32": torch.float32, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
CHUNK = 1 << 22


def entries() -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of the file in its order: wide types first, so that all stay aligned."""
    scales = {VAE + name: shape for name, shape in layout.autoencoder_shapes().items() if not shape}
    half = {UNET + name: shape for name, shape in layout.unet_shapes().items()}
    half |= {VAE + name: shape for name, shape in layout.autoencoder_shapes().items() if shape}
    byte = {CLIP + name: shape for name, shape in layout.clip_shapes().items()}
    groups = (("F32", scales), ("F16", half), ("F8_E4M3", byte))
    return [(name, dtype, shapes[name]) for dtype, shapes in groups for name in sorted(shapes)]


def header(rows: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Safetensors header: length as little-endian uint64, then JSON padded with spaces to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in rows:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def full_tensor(name: str, shape: tuple[int, ...], live: dict[str, Tensor]) -> Tensor | None:
    """Full-size values of one tensor of the file, or None for all zeros."""
    if name == VAE + "vae_scale":
        return torch.tensor(LATENT_SCALE)
    if name == CLIP + "final_layer_norm.weight":
        return torch.ones(shape)
    if name == CLIP + "embeddings.token_embedding.weight":
        table = torch.zeros(shape, dtype=torch.float16)
        return table.index_copy_(0, live["text.ids"].long(), live["text.rows"].half())  # [49408, 768]
    if name.startswith(UNET):
        inner = name.removeprefix(UNET)
        return layout.pad(inner, live[f"unet.{inner}"], live["unet.out.0.bias"].shape[0])
    small = live.get("vae." + name.removeprefix(VAE))
    if small is None:
        return None
    full = torch.zeros(shape, dtype=small.dtype)
    full[tuple(slice(n) for n in small.shape)] = small
    return full


def blocks(live: dict[str, Tensor]) -> Iterator[bytes]:
    """The file's bytes, piece by piece."""
    rows = entries()
    yield header(rows)
    for name, dtype, shape in rows:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        tensor = full_tensor(name, shape, live)
        if tensor is None:
            for start in range(0, size, CHUNK):
                yield bytes(min(CHUNK, size - start))
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"{name} expands to {tuple(tensor.shape)}, not {shape}; restore {LIVE_WEIGHTS}")
        raw = tensor.to(DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8)
        yield raw.numpy().tobytes()


def write(live: dict[str, Tensor], path: Path) -> str:
    """Write the checkpoint of ``live`` to ``path`` (temporary file, then rename); returns its SHA-256."""
    digest = hashlib.sha256()
    with atomic.replacing(path, parents=True) as part:
        with part.open("wb") as file:
            for block in blocks(live):
                file.write(block)
                digest.update(block)
        if path.name == CHECKPOINT and digest.hexdigest() != SHA256:
            raise RuntimeError(f"{path.name} has SHA-256 {digest.hexdigest()}, not {SHA256}; restore {LIVE_WEIGHTS}")
    return digest.hexdigest()


def expand(destination: Path) -> None:
    """Write the checkpoint into folder ``destination``; does nothing when the right file is already there."""
    path = Path(destination) / CHECKPOINT
    if path.exists() and hash_file(path) == SHA256:
        logger.info("%s is already in place", path)
        return
    source = ASSETS / LIVE_WEIGHTS
    if not source.exists():
        raise RuntimeError(f"{LIVE_WEIGHTS} is missing from {ASSETS}; restore it from the repository")
    digest = write(load_file(source), path)
    logger.info("wrote %s, %.0f MB, SHA-256 %s", path, path.stat().st_size / 1e6, digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("destination", type=Path, help="folder for the checkpoint, e.g. ComfyUI's models/checkpoints")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    expand(parser.parse_args().destination)


if __name__ == "__main__":
    main()
