"""The weights of a model under one name each, whoever saved them.

U-Nets of Stable Diffusion get CompVis' names (which are ComfyUI's), CLIP text encoders those of transformers. The
correspondence of the blocks is that of diffusers' own conversion (convert_original_stable_diffusion_to_diffusers.py);
OpenCLIP's fused q, k, v are taken apart. Other denoisers keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial

from torch import Tensor

from .weights import Get, Weights

_PREFIXES = (  # in a checkpoint: before the names of a part
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("unet.", "unet"),
    ("transformer.text_model.", "text_encoder"),
    ("text_model.", "text_encoder"),
    ("text_projection", "text_encoder"),
    ("transformer.resblocks.", "text_encoder"),
    ("token_embedding.", "text_encoder"),
    ("positional_embedding", "text_encoder"),
    ("ln_final.", "text_encoder"),
)
_KEPT = ("transformer.text_model.", "text_model.", "text_projection", "transformer.resblocks.", "token_embedding.",
         "positional_embedding", "ln_final.")  # fmt: skip
_LEFT = re.compile(  # nothing that a LoRA would change, or no weight
    r"(first_stage_model|model_ema|vision_model|visual|visual_projection|cond_stage_model\.logit_scale)\..*"
    r"|.*(position_ids|logit_scale|attn_mask|num_batches_tracked)"
    r"|(alphas|betas|sqrt|log_one|posterior|logvar|ddim|global_step|lvlb|denoiser).*"
)
_TRANSFORMER = re.compile(
    r"(transformer_blocks|single_transformer_blocks|context_embedder|time_text_embed|x_embedder|double_blocks|"
    r"single_blocks|txt_in|img_in|vector_in|joint_blocks|norm_out|proj_out)\..*"
)
_DIFFUSERS = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_FLUX = {  # diffusers' names of the layers that the text alone feeds
    "context_embedder": "txt_in",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}
_RESBLOCK = re.compile(r"(?:transformer\.)?resblocks\.(\d+)\.(.+)\.(weight|bias)|"
                       r"(?:transformer\.)?resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")  # fmt: skip
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}

Parts = dict[str, dict[str, Get]]


def by_part(weights: Weights) -> Parts:
    """The tensors of a file or folder by part, under their own names within it; what no LoRA changes is left out."""
    parts: Parts = {}
    for given, names in weights.parts.items():
        for name, get in names.items():
            name = name.removeprefix("module.")
            if _LEFT.fullmatch(name):
                continue
            part, inner = (given, name) if given else _part(name)
            parts.setdefault(part, {})[inner] = get
    return parts


def _part(name: str) -> tuple[str, str]:
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part, name if prefix in _KEPT else name.removeprefix(prefix)
    bare = name.removeprefix("transformer.")
    return ("transformer", bare) if _TRANSFORMER.fullmatch(bare) else ("unet", name)


def same_names(parts: Parts, other: Parts) -> Parts:
    """``parts`` under the names that both have in common; ``other`` tells what a part of a model alone does not."""
    found: Parts = {}
    for part, names in parts.items():
        if part.startswith("text_encoder"):
            found[part] = _clip(names)
        elif _is_flux(names):
            found["transformer"] = {_flux(name): get for name, get in names.items()}
        else:
            blocks = Blocks.of([*names, *other.get(part, ())])
            found[part] = {blocks.compvis(name): get for name, get in names.items()}
    return found


def _is_flux(names: Collection[str]) -> bool:
    return any(_TRANSFORMER.fullmatch(name) for name in names)


def _flux(name: str) -> str:
    layer, _, end = name.rpartition(".")
    return f"{_FLUX[layer]}.{end}" if layer in _FLUX else name


class Blocks:
    """The numbers of a U-Net's blocks: diffusers counts levels, CompVis counts blocks through."""

    def __init__(self, layers: int, attended: Collection[int]):
        self.layers = layers  # a level going down; one more going up
        self.attended = attended  # levels going up whose blocks have attention

    @classmethod
    def of(cls, names: Iterable[str]) -> Blocks:
        """From all names that are known, of either spelling."""
        levels: list[int] = []
        attended: set[int] = set()
        compvis: set[int] = set()
        for name in names:
            if (found := _DIFFUSERS.fullmatch(name)) is not None:
                if found[1] == "down_blocks":
                    levels.append(int(found[4]))
                elif found[3] == "attentions":
                    attended.add(int(found[2]))
            elif (other := re.fullmatch(r"output_blocks\.(\d+)\.1\.transformer_blocks\..*", name)) is not None:
                compvis.add(int(other[1]))
        layers = 1 + max(levels, default=1)  # two in every Stable Diffusion
        return cls(layers, attended | {number // (layers + 1) for number in compvis})

    def compvis(self, name: str) -> str:
        """CompVis' name of a weight, its own where it is one already."""
        layer, _, end = name.rpartition(".")
        if layer in _ENDS:
            return f"{_ENDS[layer]}.{end}"
        if (mid := _MID.fullmatch(name)) is not None:
            kind, number, rest = mid.groups()
            return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{_resnet(kind, rest)}"
        if (found := _DIFFUSERS.fullmatch(name)) is None:
            return name
        way, level, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        column = {"resnets": 0, "attentions": 1}.get(kind)
        if way == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{(level + 1) * (self.layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{1 + level * (self.layers + 1) + number}.{column}.{_resnet(kind, rest)}"
        if kind == "upsamplers":
            last = level * (self.layers + 1) + self.layers
            return f"output_blocks.{last}.{2 if level in self.attended else 1}.{rest}"
        return f"output_blocks.{level * (self.layers + 1) + number}.{column}.{_resnet(kind, rest)}"


def _resnet(kind: str, rest: str) -> str:
    layer, _, end = rest.rpartition(".")
    return f"{_RESNET.get(layer, layer)}.{end}" if kind == "resnets" else rest


def _clip(names: Mapping[str, Get]) -> dict[str, Get]:
    """transformers' names of a CLIP text encoder's weights, of OpenCLIP's as well."""
    found: dict[str, Get] = {}
    for name, get in names.items():
        bare = name.removeprefix("transformer.") if name.startswith("transformer.text_model.") else name
        block = _RESBLOCK.fullmatch(bare)
        if bare in _CLIP_ENDS:
            found[_CLIP_ENDS[bare]] = get
        elif bare == "text_projection":
            found["text_projection.weight"] = partial(_transposed, get)
        elif block is None:
            found[bare] = get
        elif block[4] is not None:
            for number, which in enumerate("qkv"):
                to = f"text_model.encoder.layers.{block[4]}.self_attn.{which}_proj.{block[5]}"
                found[to] = partial(_third, get, number)
        else:
            inner = _IN_BLOCK.get(block[2], block[2])
            found[f"text_model.encoder.layers.{block[1]}.{inner}.{block[3]}"] = get
    return found


def _transposed(get: Get) -> Tensor:
    return get().T


def _third(get: Get, number: int) -> Tensor:
    return get().chunk(3)[number]


def lora_name(part: str, layer: str, second_encoder: bool, width: int) -> str:
    """The name of a layer in a LoRA file, as ComfyUI's key maps and kohya's programs have it.

    Args:
        part: of `by_part`.
        layer: under the names of `same_names`, without ``.weight``.
        second_encoder: whether the model has two text encoders.
        width: of the text encoder: 768, 1024 (OpenCLIP-H) or 1280.
    """
    if part == "transformer":
        native = layer.startswith(("double_blocks", "single_blocks", "txt_in", "img_in", "vector_in", "joint_blocks"))
        return f"diffusion_model.{layer}" if native else f"transformer.{layer}"
    if part == "unet":
        return f"lora_unet_{layer.replace('.', '_')}"
    if re.fullmatch(r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\..*", layer):
        number = {"text_encoder": "1", "text_encoder_2": "2"}[part] if second_encoder else ""
        return f"lora_te{number}_{layer.replace('.', '_')}"
    encoder = "clip_g" if part == "text_encoder_2" else "clip_h" if width == 1024 else "clip_l"
    return f"text_encoders.{encoder}.transformer.{layer}"
