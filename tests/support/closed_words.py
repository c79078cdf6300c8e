"""A text model of a few numbers for closed forms: rows of every prompt, three small layers."""

from __future__ import annotations

import torch
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.guard.model_info import ModelInfo
from modular_lora_guard.training.safety.closed.layers import TextInput, TextLayers
from modular_lora_guard.training.safety.closed.words import Encoded

WIDTH, OUT, TOKENS = 24, 6, 4
LAYERS = ("block.0.to_k", "block.0.to_v", "block.1.to_v")
MIXED = "block.0.joint"


def file_name(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


class Words:
    """A TextModel whose encoder gives every prompt rows of its own, the first one the same for all."""

    family, base_sha256, prediction = "SD15", "0" * 64, "epsilon"
    noise = ((4, 16, 8), 7)
    found = TextLayers((TextInput(LAYERS, WIDTH, TOKENS),), 0.8, (MIXED,), ())
    info = ModelInfo(
        "SD15",
        {file_name(path): f"{path}.weight" for path in (*LAYERS, MIXED)},
        {f"{path}.weight": LayerSpec(path, (OUT, WIDTH)) for path in (*LAYERS, MIXED)},
        (),
    )

    def rows(self, prompt: str) -> torch.Tensor:
        seed = sum(prompt.encode()) * 31 + len(prompt)
        rows = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows[0] = 1.0
        return rows * torch.linspace(0.2, 2, WIDTH, dtype=torch.float64)

    def encode(self, prompts, inputs):
        return [[Encoded(self.rows(prompt), ((1, 3 if prompt else 1),))] * len(inputs) for prompt in prompts]

    def weight(self, path: str) -> torch.Tensor:
        return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(LAYERS.index(path)))

    def bias(self, path: str) -> torch.Tensor | None:
        return torch.linspace(-1, 1, OUT) if path.endswith("to_v") else None

    def name(self, path: str) -> str:
        return file_name(path)

    def too_long(self, prompt: str) -> bool:
        return len(prompt) > 50
