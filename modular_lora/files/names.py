"""The names of tensors in LoRA files: what layer and role each one means, and what is refused with its name.

They are those of kohya-ss sd-scripts, diffusers, PEFT, OneTrainer, AI-Toolkit, XLabs, LyCORIS and ComfyUI, as
ComfyUI's loader takes them (comfy/lora.py, comfy/lora_convert.py, comfy/weight_adapter).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from ..errors import LoraFileError, shown
from . import erased
from .formats import ENDINGS, LENGTHS, PATTERNS, READS, SCALED

NAME_LIMIT = 512  # characters
PEFT = "base_model.model."  # before names in PEFT's own checkpoints
_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model.", "clip_l.", "clip_g.", "t5xxl.")
_XLABS = re.compile(r"((?:double|single)_blocks\.\d+)\.processor\.((?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_XLABS_LAYERS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}
_WAN_FUN, _KOHYA = "lora_unet__", "lora_unet_"
_FLUX_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")  # BFL's, by these two names
_CONTROL = re.compile(r"(?P<layer>.+?)(?:\.lora_(?P<half>[AB])\.(?P<what>weight|bias)|(?<=_norm\.scale))")
_CONTROL_ROLES = {("A", "weight"): "down", ("B", "weight"): "up", ("B", "bias"): "diff_b", (None, None): "set"}
_EMBEDDING = "bundle_emb."

_REFUSED = (
    (re.compile(r"\.boft_\w+(\..+)?$"), "BOFT"),
    (re.compile(r"\.oft_\w+(\..+)?$"), "OFT as PEFT saves it"),
    (re.compile(r"\.rescale$"), "OFT with a rescale, which ComfyUI leaves out"),
    (re.compile(r"\.lokr_t1$"), "LoKr with a Tucker first factor"),
    (re.compile(r"\.reshape_weight$"), "a LoRA for a weight of another shape (reshape_weight)"),
    (re.compile(r"\.scalar$"), "a scalar beside the factors (LyCORIS use_scalar): export it, which multiplies it in"),
    (re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"), "GLoRA"),
    (re.compile(r"\.(on_input|ia3_l(\..+)?)$"), "IA3"),
    (re.compile(r"\.vera_\w+(\..+)?$"), "VeRA"),
    (re.compile(r"\.(lora_E|ranknum)(\..+)?$"), "AdaLoRA"),
    (re.compile(r"\.(p_layer|q_layer|lambda_layer)(\..+)?$"), "T-LoRA"),
    (re.compile(r"\.lora_up(\..+)?\.bias$"), "a LoRA with a bias of its own"),
)

_ERASED = (
    f"; or, if a concept eraser changed it, make a safety LoRA of it: {erased.COMMAND} FILE --base W0 --output NEW"
)
_CHECKPOINT = f"a checkpoint: choose it in Load Checkpoint, and its LoRA here{_ERASED}"
_DENOISER = f"a diffusion model or a part of one: choose it in Load Diffusion Model{_ERASED}"
_ENCODER = f"a text encoder: choose it in Load CLIP{_ERASED}"
_VAE = "a VAE: choose it in Load VAE"
_BLOCKS = (
    r"(?:double|single|joint|transformer|input|output|down|up|single_transformer|context_refiner)_blocks|layers|blocks"
)
_OTHERS = (  # by the name of a tensor: no LoRA in any format, and what to do with it; the first that fits
    (r"lora_controlnet", "a Control-LoRA: choose it in Load ControlNet Model"),
    (r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|text_encoders)\..*", _CHECKPOINT),
    (
        r".*\.(qweight|wscales|smooth(_orig)?|lora_down|lora_up)",
        "nunchaku's own form of a model or LoRA: use the file that it was made from",
    ),
    (
        r"(emb_params|string_to_(param|token)\..*|clip_[lg]|t5xxl)",
        "an embedding (textual inversion): put it into models/embeddings and name it in a prompt",
    ),
    (r"lllite_.*", "a ControlNet-LLLite: use the loader of its own pack"),
    (r"(ip_adapter|image_proj)\..*", "an IP-Adapter: use the loader of its own pack"),
    (
        r"(?!.*lora).*(motion_modules|temporal_transformer)\..*",
        "a motion module of AnimateDiff: use the loader of its own pack",
    ),
    (
        r"(control_model|input_hint_block|zero_convs|controlnet_cond_embedding|controlnet_blocks|controlnet_down_blocks)\..*",
        "a ControlNet: choose it in Load ControlNet Model",
    ),
    (r"(vision_model|visual|visual_projection)\..*", "a vision encoder: choose it in Load CLIP Vision"),
    (
        r"(model\.)?(conv_first|RRDB_trunk|body\.\d+\.rdb\d|\d+\.sub\.\d+)\..*",
        "an upscaler: choose it in Load Upscale Model",
    ),
    (r"(layers\.\d+\.residual_group|upsample)\..*", "an upscaler: choose it in Load Upscale Model"),
    (r"(encoder|decoder)\.(conv_in|conv_out|conv1|mid|mid_block|middle|(down|up)(_blocks|samples)?)\..*", _VAE),
    (r"(post_quant_conv|quant_conv|taesd_\w+)\..*", _VAE),
    (
        r"(transformer\.)?(text_model|text_projection|transformer\.resblocks|token_embedding|positional_embedding)(\..*|$)",
        _ENCODER,
    ),
    (r"(encoder\.block\.\d+\.layer|shared|encoder\.embed_tokens)\..*", _ENCODER),
    (r"((language_)?model\.)+(layers\.\d+\.(self_attn|mlp|input_layernorm)|embed_tokens)\..*", _ENCODER),
    (
        rf"(?!.*lora)(model\.|diffusion_model\.|unet\.|transformer\.)?"
        rf"({_BLOCKS}|middle_block|mid_block|img_in|x_embedder|time_embed|time_embedding|context_embedder|proj_out|conv_in)"
        r"\..*(weight|bias|scale)",
        _DENOISER,
    ),
)


@dataclass
class Names:
    """Tensor names by layer and role, and names that nothing uses."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)  # OneTrainer's bundled embeddings
    unread: list[str] = field(default_factory=list)  # of no format, ComfyUI leaves them out as well
    wide: str | None = None  # the layer to which the file gives more inputs

    @property
    def left_out(self) -> tuple[str, ...]:
        return (*self.unread, *self.embeddings)

    @property
    def notes(self) -> tuple[str, ...]:
        alphas = sum("alpha" in roles and roles.keys().isdisjoint(SCALED) for roles in self.layers.values())
        lines = []
        if self.embeddings:
            lines.append(f"{len(self.embeddings)} tensors of bundled embeddings (bundle_emb) are left out")
        if self.unread:
            what = f"{len(self.unread)} tensors are left out, as ComfyUI's own loader leaves them out"
            lines.append(f"{what} (first {shown(self.unread[0])})")
        if alphas:
            lines.append(f"the alpha of {alphas} full differences is left out: ComfyUI does not scale by it either")
        return tuple(lines)


def is_text(name: str) -> bool:
    """Whether a file's layer belongs to a text encoder, by its prefix."""
    return name.removeprefix(PEFT).startswith(_TEXT)


def refuse_other_files(tensors: Collection[str], name: str) -> None:
    """LoraFileError with the kind of a file that is no LoRA in any format, where its names tell it."""
    if any(_place(tensor) for tensor in tensors):
        return
    layout = erased.recognise(tensors)
    if layout is not None and not layout.whole:
        part = "a part of a diffusion model" if layout.convertible else "an eraser with a forward of its own"
        saved = f"{layout.what}, as saved by {layout.named}"
        raise LoraFileError(
            f"{name}: is {part} ({saved}) and no LoRA: {erased.remedy(layout, name)}", code="file.another-kind"
        )
    for pattern, kind in _OTHERS:
        if any(re.fullmatch(pattern, tensor[:NAME_LIMIT]) for tensor in tensors):
            what, _, remedy = kind.partition(": ")
            raise LoraFileError(f"{name}: is {what} and no LoRA: {remedy}", code="file.another-kind")


def sort_names(tensors: Collection[str], name: str) -> Names:
    """Sort the tensor names of the file `name`; LoraFileError for another format's and for a role that comes twice.

    Names of no format are left out where they stand beside the layers, not in one (Wan's ``diff_m``, its modulation, a
    trainer's step counter), whatever their dtype and values are.
    """
    control = all(mark in tensors for mark in _FLUX_CONTROL)
    found, adapters = Names(wide="diffusion_model.img_in" if control else None), {}
    for tensor in tensors:
        if tensor.startswith(_EMBEDDING):
            found.embeddings.append(tensor)
            continue
        place = _control_place(tensor) if control else _place(tensor)
        if place is None:
            _refuse_kinds(tensor, name, tensors)
            found.unread.append(tensor)
            continue
        layer, role, adapter = place
        roles = found.layers.setdefault(layer, {})
        if role in roles:
            raise LoraFileError(
                f"{name}: tensor {shown(tensor)}: a second {role} of its layer: keep one adapter",
                code="file.two-adapters",
            )
        roles[role] = tensor
        if adapter:
            adapters[adapter] = tensor
    if len(adapters) > 1:
        what = f"{len(adapters)} adapters ({', '.join(shown(a) for a in sorted(adapters)[:3])}) in one file"
        raise LoraFileError(f"{name}: {what}: save each to a file of its own", code="file.two-adapters")
    if not found.layers:
        refuse_other_files(tensors, name)
    _leave_orphans(found)
    for tensor in found.unread:
        if not found.layers or _layer_of(tensor) in found.layers:
            raise LoraFileError(
                f"{name}: tensor {shown(tensor)}: is not a LoRA tensor: {READS}", code="file.unknown-tensor"
            )
    if not found.layers:
        raise LoraFileError(f"{name}: holds no layer: {READS}", code="file.no-layer")
    return found


def _leave_orphans(found: Names) -> None:
    """A scale without the weights that it scales goes unread: some tools write it under another name than theirs."""
    orphans = [layer for layer, roles in found.layers.items() if roles.keys() <= {"alpha", *LENGTHS}]
    for layer in orphans if len(orphans) < len(found.layers) else ():
        found.unread += found.layers.pop(layer).values()


def _place(tensor: str) -> tuple[str, str, str | None] | None:
    """Layer, role and PEFT's adapter name of a tensor; None where it is none of a format that is read."""
    if len(tensor) > NAME_LIMIT or not tensor.isprintable():
        return None
    layer, _, end = tensor.rpartition(".")
    if end == "weight":
        layer, _, before = layer.rpartition(".")
        end = f"{before}.weight"
    if layer and end in ENDINGS:
        if layer.startswith(_WAN_FUN):
            layer = _KOHYA + layer.removeprefix(_WAN_FUN)
        return layer, ENDINGS[end], None
    if found := _XLABS.fullmatch(tensor):
        return f"diffusion_model.{found[1]}.{_XLABS_LAYERS[found[2]]}", found[3], None
    for pattern, role in PATTERNS:
        if found := pattern.fullmatch(tensor):
            return found["layer"], role, found.groupdict().get("adapter")
    return None


def _control_place(tensor: str) -> tuple[str, str, None] | None:
    """The same in a Flux control LoRA: names without a prefix, biases beside the factors, norms to be replaced."""
    if (found := _CONTROL.fullmatch(tensor)) is None:
        return None
    role = _CONTROL_ROLES.get((found["half"], found["what"]))
    return (f"diffusion_model.{found['layer']}", role, None) if role else None


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[0]


def _refuse_kinds(tensor: str, name: str, tensors: Collection[str]) -> None:
    """LoraFileError for a tensor of a kind that is known and not read."""
    text = tensor[-NAME_LIMIT:]
    if kind := next((kind for pattern, kind in _REFUSED if pattern.search(text)), None):
        refuse_other_files(tensors, name)
        raise LoraFileError(f"{name}: tensor {shown(tensor)}: is {kind}: {READS}", code="file.unread-format")
