"""The layouts of LoRA files that people publish: tensor names as they are, on toy models (see test_published_names.py).

Names are from the issues of ComfyUI and the trainers on "lora key not loaded" and from the code of sd-scripts,
musubi-tuner, AI-Toolkit, OneTrainer, SimpleTuner, LightX2V, KJNodes, LyCORIS, PEFT and diffusers (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RANK = 2
PAIRS = {  # form -> ends of a pair's names
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "A/B": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": (".lora_A", ".lora_B"),
    "dots": (".lora.down.weight", ".lora.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "XLabs": (".down.weight", ".up.weight"),
}
FP16, BF16, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
Shape = tuple[int, ...]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A layout: ``layers`` in one ``form``, with ``alpha`` where a number is given, and ``further`` tensors."""

    label: str
    model: str  # a Family
    layers: Names
    form: str = "A/B"
    alpha: float | None = None
    further: Mapping[str, Shape] = field(default_factory=dict)
    encoder: str | None = None  # of encoder_toys.ENCODERS
    dtype: torch.dtype = torch.float32
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of layers that fit no weight of the model
    left: int = 0  # tensors that ComfyUI leaves out
    known: Mapping[str, str] = field(default_factory=dict)  # what makes them names that it knows: they are read here
    unfit: int = 0  # layers that no branch can take: of another shape, of an embedding, a second one of a weight

    def tensors(self, shape: Callable[[str], Shape]) -> dict[str, Tensor]:
        """The file; ``shape``: of the weight that a layer's name means."""
        generator = torch.Generator().manual_seed(0)
        made = dict(self.further)
        for layer in self.layers:
            made |= self._parts(layer, self.shapes.get(layer) or shape(layer))
        drawn = {name: torch.rand(size, generator=generator) + 0.1 for name, size in made.items()}
        if self.alpha is not None:
            drawn |= {f"{layer}.alpha": torch.tensor(self.alpha) for layer in self.layers}
        return {name: tensor.to(self.dtype) for name, tensor in drawn.items()}

    def as_known(self, name: str) -> str:
        for old, new in self.known.items():
            name = name.replace(old, new)
        return name

    def _parts(self, layer: str, shape: Shape) -> dict[str, Shape]:
        out, fan_in, *kernel = shape
        if self.form == "LoKr":
            return {f"{layer}.lokr_w1": (2, 2), f"{layer}.lokr_w2": (out // 2, fan_in // 2, *kernel)}
        if self.form == "OFT":
            return {f"{layer}.oft_blocks": (out // 4, 4, 4)}
        if self.form == "LoHa":
            ends = {"a": (out, RANK), "b": (RANK, fan_in)}
            return {f"{layer}.hada_w{i}_{end}": size for i in (1, 2) for end, size in ends.items()}
        down, up = PAIRS["kohya" if self.form == "DoRA" else self.form]
        ones = (1,) * len(kernel)
        pair = {layer + down: (RANK, fan_in, *kernel), layer + up: (out, RANK, *ones)}
        return pair | ({f"{layer}.dora_scale": (out, 1, *ones)} if self.form == "DoRA" else {})


def under(prefix: str, names: Names) -> Names:
    return tuple(prefix + name for name in names)


def flat(prefix: str, names: Names) -> Names:
    return tuple(prefix + name.replace(".", "_") for name in names)


BLOCK, UNTIL = "down_blocks_0_attentions_0_", "_text_model_encoder_layers_0_mlp_fc1"
UNET = (f"{BLOCK}proj_in", "mid_block_attentions_0_proj_out")
UNET += under(f"{BLOCK}transformer_blocks_0_", ("attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2"))
RESNET = under("down_blocks_0_", ("resnets_0_conv1", "resnets_0_time_emb_proj", "downsamplers_0_conv"))
RESNET += ("down_blocks_1_resnets_0_conv_shortcut", "up_blocks_0_upsamplers_0_conv", "conv_in", "conv_out")
LDM = under("input_blocks_", ("1_0_in_layers_2", "1_0_emb_layers_1", "2_0_op", "1_1_proj_in"))
LDM += ("out_2", "label_emb_0_0", "time_embed_0", "middle_block_1_transformer_blocks_0_ff_net_2")
D_BLOCK = "down_blocks.0.attentions.0."
DIFFUSERS = under(D_BLOCK, ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0", "proj_in"))
OLD = under(f"{D_BLOCK}transformer_blocks.0.attn1.processor.", ("to_q", "to_out"))
CLIP = ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1")
T5 = "encoder_block_0_layer_0_SelfAttention_q"
FLUX = under("single_transformer_blocks.0.", ("attn.to_q", "proj_mlp", "proj_out"))
FLUX += under("transformer_blocks.0.", ("attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "norm1.linear"))
FLUX += ("x_embedder", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1")
BFL = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1", "img_in")
XLABS = ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.proj_lora2")
USO = (*XLABS, "single_blocks.1.processor.proj_lora")
XLABS_SHAPES = {USO[0]: (96, 32), USO[2]: (32, 160)}
USO += ("double_blocks.18.processor.qkv_lora2", "single_blocks.37.processor.qkv_lora")  # by which ComfyUI knows it
SD3 = (*under("transformer_blocks.0.", ("attn.to_q", "attn.add_v_proj", "ff.net.0.proj")), "proj_out")
WAN = ("blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.1.cross_attn.o", "blocks.1.ffn.0")
WAN_TEXT = ("text_embedding.0", "time_embedding.2", "time_projection.1")
HUNYUAN = ("double_blocks.0.img_attn_qkv", "double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mod.linear")
HUNYUAN += ("single_blocks.0.linear1", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv")
QWEN = under("transformer_blocks.0.", ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "img_mlp.net.0.proj"))
QWEN += ("transformer_blocks.1.txt_mod.1",)
Z = under("layers.0.attention.", ("to_q", "to_k", "to_v", "to_out.0"))
Z += ("layers.0.feed_forward.w1", "noise_refiner.0.attention.to_q")
HIDREAM = ("double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.0.block.ff_i.experts.0.w1")
LTX_BLOCK, LTX_SOUND = "transformer_blocks.0.", ("audio_attn1.to_q", "audio_to_video_attn.to_k")
LTX = under(LTX_BLOCK, ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj"))
PIXART = under("transformer_blocks.0.", ("attn1.to_q", "attn2.to_k", "ff.net.0.proj"))

KOHYA, MODEL = "lora_unet_", "diffusion_model."
NORM = {f"lora_unet_{BLOCK}norm.{end}": (32,) for end in ("w_norm", "b_norm")}
FULL = {"lora_unet_input_blocks_1_1_norm.diff": (32,), "lora_unet_input_blocks_1_1_norm.diff_b": (32,)}
EXTRACTED = {  # beside the pairs, as LightX2V and KJNodes extract a LoRA of Wan
    **{f"{MODEL}{n}.diff_b": (32,) for n in ("blocks.0.self_attn.q", "blocks.0.norm3", "patch_embedding")},
    **{f"{MODEL}blocks.0.{n}.diff": (32,) for n in ("norm3", "self_attn.norm_q", "cross_attn.norm_k")},
    f"{MODEL}head.head.diff": (64, 32),
    f"{MODEL}blocks.0.diff_m": (1, 6, 32),
    f"{MODEL}head.diff_m": (1, 2, 32),
}
IMAGE_LAYERS = {f"{MODEL}blocks.0.cross_attn.norm_k_img.diff": (32,), f"{MODEL}img_emb.proj.4.diff": (32,)}
OF_T2V = EXTRACTED | {f"{MODEL}patch_embedding.diff": (32, 16, 1, 2, 2)}
OF_I2V = EXTRACTED | IMAGE_LAYERS | {f"{MODEL}patch_embedding.diff": (32, 36, 1, 2, 2)}
SD1, XL, SD3_TEXT = "CLIP-L (SD1.x)", "CLIP-L and CLIP-G (SDXL)", "CLIP-L, CLIP-G and T5-XXL (SD3)"
FLUX_TEXT, T5_TEXT, CASCADE = "CLIP-L and T5-XXL (Flux)", "T5-XXL (PixArt, Chroma)", "CLIP-G (Stable Cascade)"
FLUX_TE = (f"lora_te1{UNTIL}", f"lora_te3_{T5}")
ONE_TE = (f"lora_te1{UNTIL}", f"lora_te2_{T5}")
SD3_TE = (f"lora_te1{UNTIL}", f"lora_te2{UNTIL}", f"lora_te3_{T5}")
DOTTED = "lora_te1.text_model.encoder.layers.8.mlp.fc1"
TRAINED_NORM = {"transformer.transformer_blocks.0.attn.norm_q.weight": (16,)}
CASCADE_LAYERS = ("lora_prior_unet_down_blocks_0_2_kv_mapper_1", f"lora_prior_te{UNTIL}")
FAST = under(MODEL, ("double_blocks.0.img_attn.proj", "guidance_in.in_layer"))
FUN = flat(f"{KOHYA}_", WAN)
EMBEDDED = under(
    "text_encoders.clip_l.transformer.text_model.", ("embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
)
MAGNITUDE = {f"{KOHYA}{BLOCK}transformer_blocks_0_attn1.to_q.lora_magnitude_vector": (32,)}
TWICE = under(f"{MODEL}layers.0.attention.", ("qkv", "out", "to_out.0"))
BUNDLED = {"bundle_emb.me.clip_l": (2, 9)}
FAST_BIAS = {f"{FAST[0]}.diff_b": (32,)}
LIGHT = under(MODEL, WAN + WAN_TEXT)
MOTION = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
POSE = {"dwpose_embedding.0.weight": (4, 3, 3), "dwpose_embedding.0.bias": (4,)}

PEFT = "base_model.model."
PROCESSOR = {".to_out.0": ".to_out", ".to_": ".processor.to_"}
XLABS_KNOWN = {"double_": f"{MODEL}double_", "processor.qkv_lora1.": "img_attn.qkv.lora_"}
XLABS_KNOWN |= {"processor.proj_lora2.": "txt_attn.proj.lora_"}

P = Published
U_NETS = (
    P("kohya SD1.5", "SD1.x", (*under(KOHYA, UNET), f"lora_te{UNTIL}"), "kohya", 1.0, encoder=SD1),
    P("LCM-LoRA SD1.5", "SD1.x", under(KOHYA, UNET + RESNET), "kohya", 2.0, dtype=FP16),
    P("LCM-LoRA SDXL", "SDXL", under(KOHYA, UNET + RESNET), "kohya", 2.0, dtype=FP16),
    P("SDXL offset example", "SDXL", under(KOHYA, LDM), "kohya", 2.0),
    P("kohya SDXL", "SDXL", (*under(KOHYA, LDM), f"lora_te1{UNTIL}", f"lora_te2{UNTIL}"), "kohya", 1.0, encoder=XL),
    P("slider", "SDXL", under(KOHYA, LDM[3:4]), "kohya", 1.0),
    P("IP-Adapter FaceID LoRA", "SD1.x", under(KOHYA, UNET), "kohya"),
    P("LyCORIS LoCon with norms", "SD1.x", under(KOHYA, UNET + RESNET), "kohya", 1.0, NORM),
    P("LyCORIS LoHa", "SDXL", under(KOHYA, UNET), "LoHa", 1.0),
    P("LyCORIS with full differences", "SDXL", under(KOHYA, LDM), "kohya", 1.0, FULL),
    P("OneTrainer DoRA", "SDXL", (*under(KOHYA, UNET), f"lora_te1{UNTIL}"), "DoRA", 1.0, encoder=XL),
    P("OneTrainer, bundled embedding", "SDXL", under(KOHYA, UNET), "kohya", 1.0, BUNDLED, left=1),
    P("diffusers SD1.5, 2023", "SD1.x", OLD, "processor"),
    P("diffusers SDXL", "SDXL", under("unet.", DIFFUSERS), left=4, known=PROCESSOR),
    P("diffusers SDXL, 2023", "SDXL", under("unet.", DIFFUSERS), "dots", left=4, known=PROCESSOR),
    P("diffusers SDXL, text encoders", "SDXL", CLIP, "linear", encoder=XL),
    P("diffusers SDXL, advanced DoRA script", "SDXL", under(KOHYA, UNET), "kohya", 2.0, MAGNITUDE, left=1),
    P("PEFT checkpoint SDXL", "SDXL", under(PEFT, DIFFUSERS), left=6, known={PEFT: "unet.", **PROCESSOR}),
    P(
        "PEFT checkpoint SDXL, adapter named",
        "SDXL",
        under(PEFT, DIFFUSERS),
        "default",
        left=6,
        known={PEFT: "unet.", **PROCESSOR},
    ),
    P("ComfyUI's extraction from a CLIP", "SD1.x", EMBEDDED, "kohya", encoder=SD1, unfit=1),
)
TRAINED = under(f"{MODEL}input_blocks.1.", ("0.in_layers.2", "1.proj_in", "1.transformer_blocks.0.attn1.to_q"))
BESIDE = {f"{MODEL}input_blocks.1.1.norm.{end}": (32,) for end in ("diff", "diff_b")}
BESIDE |= {f"{TRAINED[0]}.diff_b": (32,)}
U_NETS += tuple(  # kernels are flat
    P(f"ComfyUI's Train LoRA, {kind}", "SD1.x", TRAINED, form, 1.0, BESIDE, shapes={TRAINED[0]: (32, 288)})
    for kind, form in {"LoRA": "kohya", "LoHa": "LoHa", "LoKr": "LoKr", "OFT": "OFT"}.items()
)
FLUXES = (
    P("Flux, diffusers, AI-Toolkit, Turbo", "Flux dev", under("transformer.", FLUX), dtype=BF16),
    P("Flux, Kontext, Fill, BFL's names", "Flux dev", under(MODEL, BFL)),
    P("Flux, diffusers, trained norms", "Flux dev", under("transformer.", FLUX), further=TRAINED_NORM, left=1),
    P("Flux, kohya", "Flux dev", (*flat(KOHYA, BFL), *FLUX_TE), "kohya", encoder=FLUX_TEXT),
    P("Flux, kohya, on Chroma", "Chroma", (*flat(KOHYA, BFL), *FLUX_TE), "kohya", encoder=T5_TEXT, left=4),
    P("Flux, AI-Toolkit, text encoder", "Flux dev", (*under(MODEL, BFL), DOTTED), encoder=FLUX_TEXT, left=2),
    P("Flux, OneTrainer", "Flux dev", (*flat("lora_transformer_", FLUX), *ONE_TE), "kohya", 1.0, encoder=FLUX_TEXT),
    P("Flux, SimpleTuner LyCORIS", "Flux dev", flat("lycoris_", FLUX), "LoKr", 1.0),
    P("Flux, AI-Toolkit LoKr, alpha inf", "Flux dev", under(MODEL, BFL), "LoKr", 9999999999.0, dtype=FP16),
    P("Flux, SimpleTuner, 2024", "Flux dev", under("transformer.base_model.model.", FLUX), left=20, known={PEFT: ""}),
    P("Flux, Kontext, fal", "Flux dev", under(PEFT, BFL), left=8, known={PEFT: MODEL}),
    P("Flux, XLabs", "Flux dev", XLABS, "XLabs", shapes=XLABS_SHAPES, left=4, known=XLABS_KNOWN),
    P("Flux, USO", "Flux dev", USO, "XLabs", shapes=XLABS_SHAPES, left=4),
    P("Flux, dev's img_in on Fill", "Flux Fill", under(MODEL, BFL), shapes={f"{MODEL}img_in": (32, 64)}, unfit=1),
    P("Flux 2, AI-Toolkit", "Flux 2", under(MODEL, ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"))),
    P("Chroma, kohya", "Chroma", flat(KOHYA, (*BFL, "distilled_guidance_layer.in_proj")), "kohya", 1.0),
)
OTHERS = (
    P("SD3, kohya", "SD3", (f"{KOHYA}joint_blocks_0_x_block_attn_qkv", *SD3_TE), "kohya", 1.0, encoder=SD3_TEXT),
    P("SD3, diffusers", "SD3", under("transformer.", SD3)),
    P("SD3, Flash", "SD3", under(PEFT, SD3)),
    P("SD3, OneTrainer", "SD3", flat("lora_transformer_", SD3), "kohya", 1.0),
    P("SD3.5, SimpleTuner LyCORIS", "SD3.5 medium", ("lycoris_transformer_blocks_0_attn2_to_q",), "LoKr", 1.0),
    P("Stable Cascade", "Stable Cascade C", CASCADE_LAYERS, "kohya", 1.0, encoder=CASCADE),
    P("AuraFlow", "AuraFlow", under("transformer.", ("joint_transformer_blocks.0.attn.to_q", "context_embedder"))),
    P("PixArt, diffusers", "PixArt Sigma", under("transformer.", PIXART)),
    P("PixArt, PEFT", "PixArt Sigma", under(PEFT, PIXART)),
    P("HunyuanDiT", "HunyuanDiT", under("base_model.model.blocks.0.", ("attn1.Wqkv", "attn2.q_proj"))),
    P("Lumina 2", "Lumina 2", under(MODEL, ("layers.0.attention.qkv", "layers.0.feed_forward.w1"))),
    P("Z-Image, AI-Toolkit", "Z-Image", under(MODEL, Z)),
    P("Z-Image, musubi-tuner", "Z-Image", flat(KOHYA, Z), "kohya", 1.0, left=15),
    P(
        "Z-Image, musubi-tuner, converted",
        "Z-Image",
        under(f"{KOHYA}layers_0_attention_", ("qkv", "out")),
        "kohya",
        6.0,
    ),
    P("Z-Image, SimpleTuner LyCORIS", "Z-Image", flat("lycoris_", Z), "LoKr", 1.0),
    P("Z-Image, a layer under two names", "Z-Image", TWICE, "dots", unfit=1),
    P("HiDream, AI-Toolkit", "HiDream", under(MODEL, HIDREAM)),
    P("HiDream, SimpleTuner LyCORIS", "HiDream", flat("lycoris_", HIDREAM), "LoKr", 1.0),
    P("Qwen-Image, Lightning", "Qwen-Image", QWEN, "kohya", 2.0, dtype=BF16),
    P("Qwen-Image and Edit, AI-Toolkit", "Qwen-Image", under(MODEL, QWEN), dtype=BF16),
    P("Qwen-Image, diffusers", "Qwen-Image", under("transformer.", QWEN)),
    P("Qwen-Image, musubi-tuner", "Qwen-Image", flat(KOHYA, QWEN), "kohya", 1.0),
    P("Qwen-Image, DiffSynth", "Qwen-Image", QWEN, "default"),
    P("Qwen-Image, PEFT checkpoint", "Qwen-Image", under(PEFT, QWEN), left=10, known={PEFT: ""}),
    P("Qwen-Image, SimpleTuner LyCORIS", "Qwen-Image", flat("lycoris_", QWEN), "LoKr", 1.0),
    P("OmniGen 2", "OmniGen2", ("layers.0.attn.to_q", "layers.0.feed_forward.linear_1")),
    P("ACE-Step", "ACE-Step", ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.cross_attn.to_q")),
)
VIDEO = (
    P("Hunyuan Video, diffusion-pipe", "Hunyuan Video", under("transformer.", HUNYUAN)),
    P("Hunyuan Video, 2024", "Hunyuan Video", under(MODEL, HUNYUAN)),
    P("Hunyuan Video, FastVideo, fp8", "Hunyuan Video", FAST, "kohya", further=FAST_BIAS, dtype=FP8),
    P("Hunyuan Image, sd-scripts, converted", "Hunyuan Image 2.1", flat(KOHYA, BFL[:1]), "kohya", 1.0),
    P("Wan, AI-Toolkit, diffusion-pipe, SVI", "Wan 2.1 T2V", under(MODEL, WAN)),
    P("Wan, musubi-tuner", "Wan 2.1 T2V", flat(KOHYA, WAN), "kohya", 1.0),
    P("Wan, DiffSynth", "Wan 2.1 T2V", WAN, "default", left=8, known={"blocks.": "diffusion_model.blocks."}),
    P("Wan, Fun rewards", "Wan 2.1 T2V", FUN, "kohya", 2.0),
    P("Wan, lightx2v, CausVid, AccVideo", "Wan 2.1 T2V", LIGHT, "kohya", further=OF_T2V, dtype=FP16, left=2),
    P("Wan, lightx2v, T2V's on I2V", "Wan 2.1 I2V", LIGHT, "kohya", further=OF_T2V, left=2, unfit=1),
    P("Wan, lightx2v, I2V's on T2V", "Wan 2.1 T2V", LIGHT, "kohya", further=OF_I2V, left=4, unfit=1),
    P("Wan, lightx2v, I2V 2.1's on 2.2", "Wan 2.2 I2V A14B", LIGHT, "kohya", further=OF_I2V, left=4),
    P("Wan, UniAnimate", "Wan 2.1 T2V", under(MODEL, WAN), further=POSE, left=2),
    P("Wan, VACE", "Wan 2.1 VACE", under(MODEL, ("vace_blocks.0.self_attn.q", "vace_patch_embedding"))),
    P("LTX Video, IC-LoRA", "LTX Video", under(MODEL, LTX)),
    P("Mochi", "Mochi", under("blocks.0.attn.", ("qkv_x", "proj_x")), "bare"),
    P("Cosmos Predict2", "Cosmos Predict2", under(MODEL, ("blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1"))),
)
LAYOUTS = (*U_NETS, *FLUXES, *OTHERS, *VIDEO)
FLUX_2 = under("transformer_blocks.0.", ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.linear_in"))
FLUX_2 += ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",)
NEWER = (  # that ComfyUI 0.33.0 loads and 0.3.75 does not
    P("Flux, DiffSynth", "Flux dev", FLUX, "default"),
    P("Flux 2, diffusers", "Flux 2", under("transformer.", FLUX_2)),
    P("Flux 2, SimpleTuner LyCORIS", "Flux 2", flat("lycoris_", FLUX_2), "LoKr", 1.0),
    P("Z-Image, diffusers", "Z-Image", under("transformer.", Z)),
    P("Z-Image, DiffSynth", "Z-Image", Z, "default"),
    P("Krea 2, diffusers", "Krea 2", under("transformer.transformer_blocks.0.", ("attn.to_q", "ff.up"))),
    P("Anima, sd-scripts", "Anima", flat(f"{KOHYA}blocks_0_", ("self_attn.q_proj", "mlp.layer1")), "kohya", 1.0),
    P("LTX Video, without a prefix", "LTX Video", LTX),
    P("LTX 2, AI-Toolkit", "LTX Video with sound", under(MODEL, (*LTX, *under(LTX_BLOCK, LTX_SOUND)))),
    P("ACE-Step 1.5", "ACE-Step 1.5", under(f"{PEFT}layers.0.", ("self_attn.q_proj", "cross_attn.o_proj"))),
)
NOWHERE = (  # of which ComfyUI loads nothing either
    P("AnimateDiff motion LoRA", "SD1.x", (f"{MOTION}.attention_blocks.0.processor.to_q",), "processor"),
    P("Flux, trained through sd-scripts' SD code", "Flux dev", (f"{KOHYA}transformer_blocks_0_attn_to_q_",), "kohya"),
    P("Hunyuan Video, diffusers", "Hunyuan Video", ("transformer.single_transformer_blocks.0.attn.to_q",)),
    P("Wan, diffusers", "Wan 2.1 T2V", ("transformer.blocks.0.attn1.to_q", "transformer.blocks.0.ffn.net.0.proj")),
)
