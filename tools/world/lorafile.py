"""LoRAs of the demo world as ordinary kohya files: full stock width on disk, live width in memory.

In memory a LoRA maps narrow module names to (A [8, in], B [out, 8], scale); dW = scale B A.
"""

from __future__ import annotations

from pathlib import Path

import torch
from modular_lora_guard.modular_lora.util import atomic
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..world import layout
from ..world.unet import Linear, NarrowUNet

RANK = 8
ALPHA = 8.0
Factors = dict[str, tuple[Tensor, Tensor, float]]

# transformers of the narrow net -> their diffusers names, which kohya files use
BLOCKS = {
    "input_blocks.1.1": "down_blocks_0_attentions_0",
    "input_blocks.3.1": "down_blocks_1_attentions_0",
    "middle_block.1": "mid_block_attentions_0",
    "output_blocks.0.1": "up_blocks_0_attentions_0",
    "output_blocks.1.1": "up_blocks_0_attentions_1",
    "output_blocks.2.1": "up_blocks_1_attentions_0",
    "output_blocks.3.1": "up_blocks_1_attentions_1",
}


def targets(unet: NarrowUNet) -> dict[str, Linear]:
    """The 84 adapted maps: attention, feed-forward, proj_in and proj_out of every transformer."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Linear)}


def kohya_name(module: str) -> str:
    """'input_blocks.1.1.proj_in' -> 'lora_unet_down_blocks_0_attentions_0_proj_in'."""
    for ours, theirs in BLOCKS.items():
        if module.startswith(ours + "."):
            return f"lora_unet_{theirs}_{module[len(ours) + 1 :].replace('.', '_')}"
    raise ValueError(f"module {module!r} is in no transformer; adapt only modules listed by targets()")


def initial(unet: NarrowUNet, seed: int) -> Factors:
    """A ~ U(-1 / sqrt(in), 1 / sqrt(in)), B = 0; a seed of its own for every LoRA keeps their row spaces apart."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, module in targets(unet).items():
        down = (2 * torch.rand(RANK, module.in_features, generator=generator) - 1) / module.in_features**0.5
        up = torch.zeros(module.out_features, RANK)
        factors[name] = (down.requires_grad_(), up.requires_grad_(), ALPHA / RANK)
    return factors


def attach(unet: NarrowUNet, *loras: Factors) -> None:
    """Let ``unet`` use exactly the given LoRAs, added beside the weights, on the layers that they have."""
    for name, module in targets(unet).items():
        module.adapters = [lora[name] for lora in loras if name in lora]


def save(factors: Factors, path: Path, live: int, metadata: dict[str, str]) -> None:
    """Write fp16 factors at stock width with string metadata."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up, _) in factors.items():
        wide_down, wide_up = layout.pad_lora(module, down.detach().half(), up.detach().half(), live)
        key = kohya_name(module)
        tensors[f"{key}.lora_down.weight"] = wide_down.contiguous()
        tensors[f"{key}.lora_up.weight"] = wide_up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
    with atomic.replacing(path, parents=True) as part:
        save_file(tensors, part, metadata=metadata)


def load(path: Path, unet: NarrowUNet) -> Factors:
    """Live part of a LoRA file for the narrow net, float32; of the layers that the file has.

    What a training on the narrow net wrote has no other part.
    """
    live = unet.out[0].num_channels
    factors: Factors = {}
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        for module in targets(unet):
            out, inp = layout.kinds(module)
            key = kohya_name(module)
            if f"{key}.alpha" not in there:
                continue
            down = file.get_tensor(f"{key}.lora_down.weight").flatten(1).float()
            up = file.get_tensor(f"{key}.lora_up.weight").flatten(1).float()
            scale = file.get_tensor(f"{key}.alpha").item() / down.shape[0]
            factors[module] = (_live(down.T, inp, live).T, _live(up, out, live), scale)
    return factors


def _live(rows: Tensor, kind: str, live: int) -> Tensor:
    """The rows of a dimension that are live, of all of stock width or of these alone."""
    if not kind:
        return rows
    index, size = layout.places(kind, live)
    return rows[index] if len(rows) == size else rows
