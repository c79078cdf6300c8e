"""A U-Net and a text encoder of a few thousand weights, their classes and layers named as sd-scripts names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

WIDTH, CONTEXT, WORDS = 12, 10, 64


class Attention(nn.Module):
    def __init__(self, context: int):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x, context):
        return self.to_out[0](F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH), Attention(CONTEXT)

    def forward(self, x, context):
        x = x + self.attn1(x, x)
        return x + self.attn2(x, context)


class Transformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x, context):
        h = self.proj_in(x)
        h = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class UNet2DConditionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.attentions = nn.ModuleList([Transformer2DModel(), Transformer2DModel()])

    def forward(self, x, context):
        h = self.conv_in(x)
        for attention in self.attentions:
            h = attention(h, context)
        return self.conv_out(h)


class CLIPAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(CONTEXT, CONTEXT) for _ in range(4))

    def forward(self, x):
        return self.out_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class CLIPTextModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, CONTEXT)
        layer = nn.ModuleDict({"self_attn": CLIPAttention()})
        self.text_model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([layer])})})

    def forward(self, prompt: str):
        x = self.embedding(torch.tensor([[ord(c) % WORDS for c in (prompt or " ")]]))
        return x + self.text_model["encoder"]["layers"][0]["self_attn"](x)  # 1 n d


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file."""
    generator = torch.Generator().manual_seed(seed)
    parts = {"unet": UNet2DConditionModel(), "te": CLIPTextModel()}
    named = {f"{part}.{k}": v for part, model in parts.items() for k, v in model.state_dict().items()}
    return {k: torch.randn(v.shape, generator=generator) / max(v[0].numel(), 1) ** 0.5 for k, v in named.items()}


def load(path: str) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    tensors, models = load_file(path), {"te": CLIPTextModel(), "unet": UNet2DConditionModel()}
    for part, model in models.items():
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        model.load_state_dict(own)
        model.requires_grad_(False)
    return models["te"], models["unet"]
