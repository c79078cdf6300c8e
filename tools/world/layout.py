"""The stock SD1.5 layout: every tensor's shape, and where each live channel of the narrow networks sits in it.

Needs only torch. Every dimension of every tensor has a kind: plain channels, the two halves of a skip connection,
attention heads (live dims lead in each head of 40), four-fold embeddings, GEGLU's value and gate halves, or untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, HEADS, CONTEXT, TOKENS = 320, 8, 768, 49408


def places(kind: str, live: int) -> tuple[Tensor, int]:
    """Positions [m] int64 of the live entries of one dimension in the full one, and the full size."""
    head = torch.arange(live // HEADS)
    table = {
        "channel": (torch.arange(live), WIDTH),
        "skip": (torch.cat([torch.arange(live), WIDTH + torch.arange(live)]), 2 * WIDTH),
        "head": (torch.cat([h * (WIDTH // HEADS) + head for h in range(HEADS)]), WIDTH),
        "four": (torch.arange(4 * live), 4 * WIDTH),
        "geglu": (torch.cat([torch.arange(4 * live), 4 * WIDTH + torch.arange(4 * live)]), 8 * WIDTH),
    }
    return table[kind]


# name suffix (without .weight / .bias) -> kinds of the output and the input dimension; "" leaves a dimension alone
KINDS = (
    ("time_embed.0", ("four", "")),
    ("time_embed.2", ("four", "four")),
    ("emb_layers.1", ("channel", "four")),
    ("attn1.to_q", ("head", "channel")),
    ("attn1.to_k", ("head", "channel")),
    ("attn1.to_v", ("head", "channel")),
    ("attn2.to_q", ("head", "channel")),
    ("attn2.to_k", ("head", "")),
    ("attn2.to_v", ("head", "")),
    ("to_out.0", ("channel", "head")),
    ("ff.net.0.proj", ("geglu", "channel")),
    ("ff.net.2", ("channel", "four")),
    ("input_blocks.0.0", ("channel", "")),
    ("out.2", ("", "channel")),
    ("skip_connection", ("channel", "skip")),
)


def kinds(module: str) -> tuple[str, str]:
    """Kinds of (output, input) dimension of a module of the narrow U-Net, by its dotted name."""
    for suffix, pair in KINDS:
        if module == suffix or module.endswith("." + suffix):
            return pair
    reads_skip = module.startswith("output_blocks.") and module.endswith((".0.in_layers.0", ".0.in_layers.2"))
    if reads_skip:
        return ("skip", "") if module.endswith(".0.in_layers.0") else ("channel", "skip")
    return ("channel", "channel")


def scatter(tensor: Tensor, dimension: int, kind: str, live: int) -> Tensor:
    """``tensor`` with one dimension widened to the stock size, zeros elsewhere."""
    if not kind:
        return tensor
    index, size = places(kind, live)
    if tensor.shape[dimension] != len(index):
        found = tensor.shape[dimension]
        raise ValueError(f"{kind} dimension holds {found} entries, not {len(index)}; check the live width")
    shape = list(tensor.shape)
    shape[dimension] = size
    return torch.zeros(shape, dtype=tensor.dtype).index_copy_(dimension, index, tensor)


def pad(name: str, tensor: Tensor, live: int) -> Tensor:
    """Full-width copy of the narrow tensor ``name``; 1 x 1 convolutions of the transformers get their two last axes."""
    module = name.rpartition(".")[0]
    out, inp = kinds(module)
    tensor = scatter(tensor, 0, out, live)
    if tensor.ndim > 1:
        tensor = scatter(tensor, 1, inp, live)
        if module.endswith(("proj_in", "proj_out")):
            tensor = tensor[:, :, None, None]
    return tensor


def pad_lora(module: str, down: Tensor, up: Tensor, live: int) -> tuple[Tensor, Tensor]:
    """Full-width LoRA factors: A [r, in] and B [out, r], with 1 x 1 axes where the stock module is a convolution."""
    out, inp = kinds(module)
    down, up = scatter(down, 1, inp, live), scatter(up, 0, out, live)
    if module.endswith(("proj_in", "proj_out")):
        down, up = down[:, :, None, None], up[:, :, None, None]
    return down, up


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of the U-Net with mult [1, 1], one residual block and one transformer a level."""
    shapes: dict[str, tuple[int, ...]] = {}
    w, e = WIDTH, 4 * WIDTH

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def residual(name: str, n_in: int) -> None:
        add(f"{name}.in_layers.0", n_in)
        add(f"{name}.in_layers.2", w, n_in, 3, 3)
        add(f"{name}.emb_layers.1", w, e)
        add(f"{name}.out_layers.0", w)
        add(f"{name}.out_layers.3", w, w, 3, 3)
        if n_in != w:
            add(f"{name}.skip_connection", w, n_in, 1, 1)

    def transformer(name: str) -> None:
        block = f"{name}.transformer_blocks.0"
        add(f"{name}.norm", w)
        add(f"{name}.proj_in", w, w, 1, 1)
        add(f"{name}.proj_out", w, w, 1, 1)
        for attention, context in (("attn1", w), ("attn2", CONTEXT)):
            for part, n_in in (("to_q", w), ("to_k", context), ("to_v", context)):
                add(f"{block}.{attention}.{part}", w, n_in, bias=False)
            add(f"{block}.{attention}.to_out.0", w, w)
        add(f"{block}.ff.net.0.proj", 2 * e, w)
        add(f"{block}.ff.net.2", w, e)
        for norm in ("norm1", "norm2", "norm3"):
            add(f"{block}.{norm}", w)

    add("time_embed.0", e, w)
    add("time_embed.2", e, e)
    add("input_blocks.0.0", w, 4, 3, 3)
    add("input_blocks.2.0.op", w, w, 3, 3)
    add("output_blocks.1.2.conv", w, w, 3, 3)
    for name in ("input_blocks.1", "input_blocks.3", "middle_block"):
        residual(f"{name}.0", w)
        transformer(f"{name}.1")
    residual("middle_block.2", w)
    for i in range(4):
        residual(f"output_blocks.{i}.0", 2 * w)
        transformer(f"output_blocks.{i}.1")
    add("out.0", w)
    add("out.2", 4, w, 3, 3)
    return shapes


def autoencoder_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of TAESD's layout with 64 channels; a block of zeros is a ReLU there."""
    w = 64
    shapes: dict[str, tuple[int, ...]] = {"vae_scale": (), "vae_shift": ()}
    ends = {
        "taesd_encoder.0": (w, 3),
        "taesd_encoder.14": (4, w),
        "taesd_decoder.1": (w, 4),
        "taesd_decoder.19": (3, w),
    }
    for name, channels in ends.items():
        shapes |= {f"{name}.weight": (*channels, 3, 3), f"{name}.bias": channels[:1]}
    samplers = {"taesd_encoder": (2, 6, 10), "taesd_decoder": (7, 12, 17)}
    blocks = {"taesd_encoder": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "taesd_decoder": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)}
    for part in samplers:
        shapes |= {f"{part}.{i}.weight": (w, w, 3, 3) for i in samplers[part]}
        for i in blocks[part]:
            for k in (0, 2, 4):
                shapes |= {f"{part}.{i}.conv.{k}.weight": (w, w, 3, 3), f"{part}.{i}.conv.{k}.bias": (w,)}
    return shapes


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of CLIP-L's text model."""
    d, h = CONTEXT, 4 * CONTEXT
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (TOKENS, d),
        "embeddings.position_embedding.weight": (77, d),
        "final_layer_norm.weight": (d,),
        "final_layer_norm.bias": (d,),
    }
    parts = {f"self_attn.{p}_proj": (d, d) for p in "qkv"} | {"self_attn.out_proj": (d, d)}
    parts |= {"mlp.fc1": (h, d), "mlp.fc2": (d, h), "layer_norm1": (d,), "layer_norm2": (d,)}
    for layer in range(12):
        for part, shape in parts.items():
            name = f"encoder.layers.{layer}.{part}"
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
