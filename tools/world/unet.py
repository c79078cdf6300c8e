"""Narrow U-Net with stock SD1.5 names that embeds exactly in ComfyUI's 320-channel ``UNetModel`` by zero padding.

Only ``live`` of 320 channels carry anything. GroupNorm's groups of 10 (20 after a skip connection) are then wholly live
or wholly dead, LayerNorm must divide by 320 instead of ``live``, and attention must keep the full head width's scale.
Feature maps are [n, live, h, w] float32, tokens [n, h * w, live], text context [n, l, 768].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 320  # channels of the stock layout
HEADS = 8
CONTEXT = 768
LIVE = 120  # channels that are trained; a multiple of 40 keeps groups and heads whole


class Linear(nn.Linear):
    """y = W x + b + sum_i s_i B_i A_i x, with adapters (A [r, in], B [out, r], s) kept outside the state dict."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__(n_in, n_out, bias)
        self.adapters: list[tuple[Tensor, Tensor, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for down, up, scale in self.adapters:
            y = y + scale * F.linear(F.linear(x, down), up)
        return y


class PaddedLayerNorm(nn.Module):
    """LayerNorm over 320 channels of which only the first ``live`` are non-zero: mu = sum x / 320."""

    def __init__(self, live: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(live))
        self.bias = nn.Parameter(torch.zeros(live))

    def forward(self, x: Tensor) -> Tensor:
        mu = x.sum(-1, keepdim=True) / WIDTH  # [n, t, 1]
        var = x.square().sum(-1, keepdim=True) / WIDTH - mu.square()
        return (x - mu) * torch.rsqrt(var + 1e-5) * self.weight + self.bias


def group_norm(channels: int, live: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(live // 10, channels, eps)


class ResBlock(nn.Module):
    def __init__(self, n_in: int, live: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(n_in, live), nn.SiLU(), nn.Conv2d(n_in, live, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * live, live))
        # index 2 is a dropout in the stock layout
        out = [group_norm(live, live), nn.SiLU(), nn.Identity(), nn.Conv2d(live, live, 3, padding=1)]
        self.out_layers = nn.Sequential(*out)
        self.skip_connection = nn.Identity() if n_in == live else nn.Conv2d(n_in, live, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Softmax attention with the scale of the full head width d = 320 / 8; ``bias`` [n, l] is added to the logits."""

    def __init__(self, live: int, context: int) -> None:
        super().__init__()
        self.to_q = Linear(live, live, bias=False)
        self.to_k = Linear(context, live, bias=False)
        self.to_v = Linear(context, live, bias=False)
        self.to_out = nn.Sequential(Linear(live, live))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected)  # [n, 8, t or l, live / 8]
        mask = None if bias is None else bias[:, None, None, :]  # [n, 1, 1, l]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(WIDTH // HEADS) ** -0.5)
        return self.to_out(y.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, live: int) -> None:
        super().__init__()
        self.proj = Linear(live, 8 * live)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, live: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(live), nn.Identity(), Linear(4 * live, live))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, live: int) -> None:
        super().__init__()
        self.attn1 = Attention(live, live)
        self.ff = FeedForward(live)
        self.attn2 = Attention(live, CONTEXT)
        self.norm1, self.norm2, self.norm3 = (PaddedLayerNorm(live) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context, bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Tokens through one transformer block; the stock 1 x 1 convolutions act as linear maps on tokens."""

    def __init__(self, live: int) -> None:
        super().__init__()
        self.norm = group_norm(live, live, 1e-6)
        self.proj_in = Linear(live, live)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(live)])
        self.proj_out = Linear(live, live)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [n, h * w, live]
        tokens = self.proj_out(self.transformer_blocks[0](tokens, context, bias))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, live: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(live, live, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, live: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(live, live, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """Sequential that hands the time embedding and the text to the layers that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, bias)
            else:
                x = layer(x)
        return x


def timestep_embedding(t: Tensor) -> Tensor:
    """Cosine and sine features [n, 320] of timesteps [n]."""
    half = WIDTH // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # [160]
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NarrowUNet(nn.Module):
    """eps(x_t, t, c): two levels with one residual block and one transformer each, as the stock layout mult [1, 1]."""

    def __init__(self, live: int = LIVE) -> None:
        super().__init__()
        if live % 40:
            raise ValueError(f"live width {live} would cut groups or heads; choose a multiple of 40")
        n = live
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 4 * n), nn.SiLU(), nn.Linear(4 * n, 4 * n))
        down = [Stage(ResBlock(n, n), SpatialTransformer(n)) for _ in range(2)]
        first = Stage(nn.Conv2d(4, n, 3, padding=1))
        self.input_blocks = nn.ModuleList([first, down[0], Stage(Downsample(n)), down[1]])
        self.middle_block = Stage(ResBlock(n, n), SpatialTransformer(n), ResBlock(n, n))
        up = [Stage(ResBlock(2 * n, n), SpatialTransformer(n)) for _ in range(4)]
        up[1].append(Upsample(n))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(group_norm(n, n), nn.SiLU(), nn.Conv2d(n, 4, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(t))  # [n, 4 live]
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context, bias)
            skips.append(x)
        x = self.middle_block(x, emb, context, bias)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context, bias)
        return self.out(x)
