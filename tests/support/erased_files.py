"""Files as concept erasers publish them: names, types and containers, on toys of a U-Net, a CLIP and a Flux.

The names of Stable Diffusion's U-Net come in pairs, diffusers' and CompVis', counted through block by block. Layouts
are those of a survey of published erasers; each says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, TEXT, RANK = 16, 24, 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Weights = dict[str, Tensor]
K, V = ("attn2.to_k.weight",), ("attn2.to_v.weight",)
ALL = ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "attn1.to_out.0.weight")
ALL += ("attn2.to_q.weight", *K, *V, "attn2.to_out.0.weight")


def u_net_names() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """diffusers' name, CompVis' name and shape of every weight of SD1.5's U-Net."""
    yield from _ends()
    number = 1
    for level in range(4):
        for j in range(2):
            yield from _resnet(f"down_blocks.{level}.resnets.{j}", f"input_blocks.{number}.0", level and not j)
            if level < 3:
                yield from _attention(f"down_blocks.{level}.attentions.{j}", f"input_blocks.{number}.1")
            number += 1
        if level < 3:
            yield from _layer(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op", 3)
            number += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _attention("mid_block.attentions.0", "middle_block.1")
    yield from _resnet("mid_block.resnets.1", "middle_block.2", False)
    number = 0
    for level in range(4):
        for j in range(3):
            yield from _resnet(f"up_blocks.{level}.resnets.{j}", f"output_blocks.{number}.0", True)
            if level > 0:
                yield from _attention(f"up_blocks.{level}.attentions.{j}", f"output_blocks.{number}.1")
            number += 1
        if level < 3:
            place = f"output_blocks.{number - 1}.{2 if level > 0 else 1}.conv"
            yield from _layer(f"up_blocks.{level}.upsamplers.0.conv", place, 3)


def _layer(theirs: str, ours: str, kernel: int, into: int = WIDTH, out: int = WIDTH) -> Iterator:
    shape = (out, into, kernel, kernel) if kernel else (out, into)
    yield f"{theirs}.weight", f"{ours}.weight", shape
    yield f"{theirs}.bias", f"{ours}.bias", (out,)


def _norm(theirs: str, ours: str, width: int = WIDTH) -> Iterator:
    yield f"{theirs}.weight", f"{ours}.weight", (width,)
    yield f"{theirs}.bias", f"{ours}.bias", (width,)


def _ends() -> Iterator:
    yield from _layer("conv_in", "input_blocks.0.0", 3, 4)
    yield from _layer("time_embedding.linear_1", "time_embed.0", 0)
    yield from _layer("time_embedding.linear_2", "time_embed.2", 0)
    yield from _norm("conv_norm_out", "out.0")
    yield from _layer("conv_out", "out.2", 3, WIDTH, 4)


def _resnet(theirs: str, ours: str, shortcut: bool) -> Iterator:
    yield from _norm(f"{theirs}.norm1", f"{ours}.in_layers.0")
    yield from _layer(f"{theirs}.conv1", f"{ours}.in_layers.2", 3)
    yield from _layer(f"{theirs}.time_emb_proj", f"{ours}.emb_layers.1", 0)
    yield from _norm(f"{theirs}.norm2", f"{ours}.out_layers.0")
    yield from _layer(f"{theirs}.conv2", f"{ours}.out_layers.3", 3)
    if shortcut:
        yield from _layer(f"{theirs}.conv_shortcut", f"{ours}.skip_connection", 1)


def _attention(theirs: str, ours: str) -> Iterator:
    yield from _norm(f"{theirs}.norm", f"{ours}.norm")
    yield from _layer(f"{theirs}.proj_in", f"{ours}.proj_in", 1)
    block = "transformer_blocks.0"
    for which, into in (("attn1", WIDTH), ("attn2", TEXT)):
        for to, width in (("to_q", WIDTH), ("to_k", into), ("to_v", into)):
            yield f"{theirs}.{block}.{which}.{to}.weight", f"{ours}.{block}.{which}.{to}.weight", (WIDTH, width)
        yield from _layer(f"{theirs}.{block}.{which}.to_out.0", f"{ours}.{block}.{which}.to_out.0", 0)
    for number in (1, 2, 3):
        yield from _norm(f"{theirs}.{block}.norm{number}", f"{ours}.{block}.norm{number}")
    yield from _layer(f"{theirs}.{block}.ff.net.0.proj", f"{ours}.{block}.ff.net.0.proj", 0, WIDTH, 8 * WIDTH)
    yield from _layer(f"{theirs}.{block}.ff.net.2", f"{ours}.{block}.ff.net.2", 0, 4 * WIDTH)
    yield from _layer(f"{theirs}.proj_out", f"{ours}.proj_out", 1)


COMPVIS = {theirs: ours for theirs, ours, _ in u_net_names()}


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@cache
def u_net() -> Weights:
    """W0 of the U-Net under diffusers' names, fp32."""
    return _drawn({theirs: shape for theirs, _, shape in u_net_names()}, 1)


@cache
def clip() -> Weights:
    """W0 of a CLIP text encoder under transformers' names, fp32."""
    shapes: dict[str, tuple[int, ...]] = {"text_model.embeddings.token_embedding.weight": (40, WIDTH)}
    shapes["text_model.embeddings.position_embedding.weight"] = (77, WIDTH)
    for n in range(2):
        layer = f"text_model.encoder.layers.{n}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH, WIDTH), f"{layer}.{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{layer}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{layer}.mlp.fc2.bias": (WIDTH,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}
    shapes |= {f"text_model.final_layer_norm.{end}": (WIDTH,) for end in ("weight", "bias")}
    return _drawn(shapes, 2)


@cache
def flux() -> Weights:
    """W0 of some layers of a Flux transformer under diffusers' names, fp32."""
    names = ["context_embedder", "time_text_embed.text_embedder.linear_1", "x_embedder"]
    for n in range(2):
        names += [f"transformer_blocks.{n}.attn.{end}" for end in ("to_q", "to_k", "add_q_proj", "add_k_proj")]
        names += [f"single_transformer_blocks.{n}.attn.{end}" for end in ("to_q", "to_k")]
    return _drawn({f"{name}.weight": (WIDTH, TEXT) for name in names}, 3)


def low_rank(weights: Weights, ends: tuple[str, ...], rank: int = RANK, size: float = 0.02) -> Weights:
    """ΔW of the weights that end so: random, of this rank, entries of about this size."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    for name, weight in weights.items():
        if name.endswith(ends):
            flat = weight.reshape(len(weight), -1)
            up = torch.randn(len(weight), rank, generator=generator)
            down = torch.randn(rank, flat.shape[1], generator=generator)
            found[name] = (size * up @ down).reshape(weight.shape)
    return found


def erased(weights: Weights, change: Weights, dtype: torch.dtype = FP32, rounded: bool = False) -> Weights:
    """W0 + ΔW in a type; ``rounded``: of W0 in that type, as who loads it so changes it."""
    start = {name: weight.to(dtype).float() if rounded else weight for name, weight in weights.items()}
    return {name: (weight + change.get(name, 0)).to(dtype).clone() for name, weight in start.items()}


def part(weights: Weights, ends: tuple[str, ...]) -> Weights:
    return {name: weight for name, weight in weights.items() if name.endswith(ends)}


def compvis(weights: Weights, prefix: str = "model.diffusion_model.") -> Weights:
    return {f"{prefix}{COMPVIS[name]}": weight for name, weight in weights.items()}


def checkpoint(path: Path, dtype: torch.dtype = FP32) -> Path:
    """W0 as one file, as Stable Diffusion's checkpoints are."""
    encoder = {f"cond_stage_model.transformer.{name}": weight for name, weight in clip().items()}
    tensors = {**compvis(u_net()), **encoder, "first_stage_model.encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}
    save_file({name: weight.to(dtype) for name, weight in tensors.items()}, path)
    return path


def pipeline(folder: Path, unet: Weights | None = None, encoder: Weights | None = None) -> Path:
    """A diffusers pipeline's folder."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    for name, file, weights in (
        ("unet", "diffusion_pytorch_model.safetensors", unet),
        ("text_encoder", "model.safetensors", encoder),
        ("vae", "diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}),
    ):
        if weights is not None:
            (folder / name).mkdir()
            save_file(weights, folder / name / file)
    return folder


def adapter(
    names: list[str], ends: tuple[str, str], dtype: torch.dtype = FP16, rank: int = 1, alpha: bool = True
) -> Weights:
    """A LoRA of layers (out 16, in 24) under these names."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in names:
        tensors[f"{name}{ends[0]}"] = torch.randn(rank, TEXT, generator=generator).to(dtype)
        tensors[f"{name}{ends[1]}"] = torch.randn(WIDTH, rank, generator=generator).to(dtype)
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(1.0).to(dtype)
    return tensors


@dataclass(frozen=True)
class Published:
    """A layout.

    Attributes:
        name: of the methods that publish it.
        write: puts the file or folder into a folder and gives its path.
        change: ΔW by the name that W0 has, where it is erased weights.
        base: which W0 it was made from: "checkpoint", "flux", or "" for what needs none.
        dtype: of the file.
        fate: "converted", "saved again", "loaded" or the code of the refusal.
        says: a word of what is recognised.
    """

    name: str
    write: Callable[[Path], Path]
    fate: str
    says: str = ""
    change: Callable[[], Weights] = dict
    base: str = ""
    dtype: torch.dtype = FP32


def _tensors(name: str, make: Callable[[], object]) -> Callable[[Path], Path]:
    """Writes a file of this name, safetensors or PyTorch's own."""

    def write(folder: Path) -> Path:
        path = folder / name
        save_file(make(), path) if path.suffix == ".safetensors" else torch.save(make(), path)
        return path

    return write


def _changed(ends: tuple[str, ...], rank: int = RANK, of: Callable[[], Weights] = u_net) -> Callable[[], Weights]:
    return lambda: low_rank(of(), ends, rank)


def _whole(ends: tuple[str, ...], dtype: torch.dtype = FP32) -> Weights:
    return erased(u_net(), low_rank(u_net(), ends), dtype)


ATTENTION = [name.removesuffix(".weight") for name in COMPVIS if name.endswith(K + V)]
KOHYA = [f"lora_unet_{name.replace('.', '_')}" for name in ATTENTION]
FLUX_LAYERS = [f"transformer_blocks.{n}.attn.{to}" for n in range(19) for to in ("add_k_proj", "add_q_proj")]
FLUX_SLIDERS = [f"lora_unet_transformer_blocks_{n}_attn_{to}" for n in range(19) for to in ("to_q", "to_k", "to_v")]
PAIR, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
FULL_RANK = ("ff.net.0.proj.weight", "conv1.weight", *ALL)
LAYOUTS = (
    Published(
        "ESD",
        _tensors(
            "esd-nudity-from-nudity-esdxstrict.safetensors",
            lambda: part(erased(u_net(), low_rank(u_net(), K + V), BF16, rounded=True), K + V),
        ),
        "converted",
        "ESD",
        _changed(K + V),
        "checkpoint",
        BF16,
    ),
    Published(
        "ESD's first code, SalUn, Receler, ANT",
        _tensors("compvis-nudity.pt", lambda: compvis(_whole(ALL), "model.diffusion_model.")),
        "converted",
        "SalUn",
        _changed(ALL),
        "checkpoint",
    ),
    Published(
        "UCE",
        _tensors("uce-nudity.safetensors", lambda: part(_whole(K + V), K + V)),
        "converted",
        "UCE",
        _changed(K + V),
        "checkpoint",
    ),
    Published(
        "OCE", _tensors("oce.safetensors", lambda: part(_whole(V), V)), "converted", "OCE", _changed(V), "checkpoint"
    ),
    Published(
        "SPEED", _tensors("weight.pt", lambda: part(_whole(V), V)), "converted", "SPEED", _changed(V), "checkpoint"
    ),
    Published(
        "RECE, ACE", _tensors("rece.pt", lambda: _whole(K + V)), "converted", "RECE", _changed(K + V), "checkpoint"
    ),
    Published(
        "TRCE",
        lambda folder: pipeline(folder / "trce", _whole(K + V)),
        "converted",
        "TRCE",
        _changed(K + V),
        "checkpoint",
    ),
    Published(
        "MACE",
        lambda folder: pipeline(folder / "mace", _whole(K + V, FP16), erased(clip(), {}, FP16)),
        "converted",
        "MACE",
        _changed(K + V),
        "checkpoint",
        FP16,
    ),
    Published(
        "Concept Ablation",
        _tensors(
            "delta.bin", lambda: {"unet": part(_whole(K + V), K + V), "text_encoder": clip(), "modifier_token": {}}
        ),
        "converted",
        "Concept Ablation",
        _changed(K + V),
        "checkpoint",
    ),
    Published(
        "SafetyDPO",
        lambda folder: pipeline(folder / "safe", _whole(ALL, FP16)),
        "converted",
        "SafetyDPO",
        _changed(ALL),
        "checkpoint",
        FP16,
    ),
    Published(
        "ResAlign",
        _tensors("final_model.pt", lambda: erased(u_net(), low_rank(u_net(), FULL_RANK, WIDTH, 0.003))),
        "converted",
        "ResAlign",
        lambda: low_rank(u_net(), FULL_RANK, WIDTH, 0.003),
        "checkpoint",
    ),
    Published("SPM", _tensors("nudity_last.safetensors", lambda: adapter(KOHYA, PAIR)), "loaded"),
    Published("LECO", _tensors("leco.safetensors", lambda: adapter(KOHYA, PAIR, rank=4)), "loaded"),
    Published("Concept sliders", _tensors("slider.pt", lambda: adapter(KOHYA, PAIR, rank=4)), "saved again", "sliders"),
    Published(
        "sliders for Flux", _tensors("slider.safetensors", lambda: adapter(FLUX_SLIDERS, PAIR, rank=4)), "loaded"
    ),
    Published(
        "EraseAnything",
        _tensors(
            "pytorch_lora_weights.safetensors",
            lambda: adapter([f"transformer.{name}" for name in FLUX_LAYERS], PEFT, BF16, 8, alpha=False),
        ),
        "loaded",
    ),
    Published(
        "DUO",
        _tensors("duo.safetensors", lambda: adapter([f"unet.{name}" for name in ATTENTION], PEFT, alpha=False)),
        "loaded",
    ),
    Published(
        "AdvUnlearn, Safe-CLIP",
        lambda folder: pipeline(
            folder / "adv", None, erased(clip(), low_rank(clip(), ("fc1.weight", "q_proj.weight")))
        ),
        "converted",
        "Safe-CLIP",
        _changed(("fc1.weight", "q_proj.weight"), of=clip),
        "checkpoint",
    ),
    Published(
        "WhenAreConceptsErased",
        lambda folder: pipeline(folder / "esdx", _whole(("attn2.to_q.weight", *K, *V), FP16), erased(clip(), {}, FP16)),
        "converted",
        "WhenAreConceptsErased",
        _changed(("attn2.to_q.weight", *K, *V)),
        "checkpoint",
        FP16,
    ),
    Published(
        "GLoCE",
        _tensors(
            "gloce.safetensors",
            lambda: {
                f"lora_gloce_{name.replace('.', '_')}.{end}.weight": torch.ones(2, 4)
                for name in ATTENTION
                for end in ("lora_update", "lora_degen")
            },
        ),
        "convert.no-lora-can",
        "GLoCE",
    ),
)
