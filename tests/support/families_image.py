"""U-Nets, MMDiTs and what descends from Flux, at toy size (see families.py)."""

from __future__ import annotations

import torch

from support.families import GENERIC, REFERENCE, Entries, Family, Noise

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
}
ADM = {**UNET, "num_classes": "sequential"}
SVD = {
    **ADM,
    "in_channels": 8,
    "context_dim": 1024,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
}
CONCAT = {"concat_latent_image": Noise((1, 4, 8, 8))}
POOLED = {"pooled_output": Noise((1, 1280))}
SMALLER_SDXL = {**ADM, "context_dim": 2048, "adm_in_channels": 2816}
UNCLIP = {**ADM, "context_dim": 1024}
DIFFUSERS_UNET = ("lora_unet_", "unet.", "lycoris_")


def seen(width: int) -> dict:
    """What unCLIPConditioning says of an image: its embedding, how strong, with how much noise."""
    image = {"image_embeds": Noise((1, width))}
    return {"unclip_conditioning": [Entries(clip_vision_output=image, strength=1.0, noise_augmentation=0.1)]}


U_NETS = (
    Family("SD1.x", "SD15", {**UNET, "use_linear_in_transformer": False, "context_dim": 768}, (4, 8, 8), (77, 768)),
    Family("SD2.x", "SD20", {**UNET, "context_dim": 1024}, (4, 8, 8), (77, 1024), names=DIFFUSERS_UNET),
    Family(
        "SDXL",
        "SDXL",
        {**ADM, "context_dim": 2048, "adm_in_channels": 2816},
        (4, 8, 8),
        (77, 2048),
        POOLED,
        names=DIFFUSERS_UNET,
    ),
    Family(
        "SDXL refiner",
        "SDXLRefiner",
        {**ADM, "context_dim": 1280, "adm_in_channels": 2560},
        (4, 8, 8),
        (77, 1280),
        POOLED,
    ),
    Family(
        "SSD-1B",
        "SSD1B",
        {**SMALLER_SDXL, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 1]}
        | {"transformer_depth_middle": -1},
        (4, 8, 8),
        (77, 2048),
        POOLED,
        names=DIFFUSERS_UNET,
    ),
    Family(
        "Segmind Vega",
        "Segmind_Vega",
        {**SMALLER_SDXL, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
        | {"transformer_depth_middle": -1},
        (4, 8, 8),
        (77, 2048),
        POOLED,
        names=DIFFUSERS_UNET,
    ),
    Family(
        "KOALA 700M",
        "KOALA_700M",
        {**SMALLER_SDXL, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2]}
        | {"transformer_depth_middle": -2},
        (4, 8, 8),
        (77, 2048),
        POOLED,
        names=DIFFUSERS_UNET,
    ),
    Family(
        "KOALA 1B",
        "KOALA_1B",
        {**SMALLER_SDXL, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2]}
        | {"transformer_depth_middle": 2},
        (4, 8, 8),
        (77, 2048),
        POOLED,
        names=DIFFUSERS_UNET,
    ),
    Family(
        "SD2.1 unCLIP L",
        "SD21UnclipL",
        {**UNCLIP, "adm_in_channels": 1536},
        (4, 8, 8),
        (77, 1024),
        seen(768),
        names=DIFFUSERS_UNET,
        variants={"SD2.1 unCLIP L without a picture": {"unclip_conditioning": None}},
    ),
    Family(
        "SD2.1 unCLIP H",
        "SD21UnclipH",
        {**UNCLIP, "adm_in_channels": 2048},
        (4, 8, 8),
        (77, 1024),
        seen(1024),
        names=DIFFUSERS_UNET,
    ),
    Family(
        "SD1.x inpainting",
        "SD15",
        {**UNET, "in_channels": 9, "use_linear_in_transformer": False, "context_dim": 768},
        (4, 8, 8),
        (77, 768),
        {"concat_latent_image": Noise((1, 4, 8, 8)), "concat_mask": torch.ones(1, 1, 8, 8)},
    ),
    Family(
        "Stable Video Diffusion",
        "SVD_img2vid",
        {**SVD, "adm_in_channels": 768},
        (4, 8, 8),
        (1, 1024),
        CONCAT,
    ),
    Family("SV3D", "SV3D_u", {**SVD, "adm_in_channels": 256}, (4, 8, 8), (1, 1024), CONCAT),
    Family("SV3D with a path", "SV3D_p", {**SVD, "adm_in_channels": 1280}, (4, 8, 8), (1, 1024), CONCAT),
    Family(
        "InstructPix2Pix",
        "SD15_instructpix2pix",
        {**UNET, "in_channels": 8, "use_linear_in_transformer": False, "context_dim": 768},
        (4, 8, 8),
        (77, 768),
        CONCAT,
    ),
    Family(
        "SDXL InstructPix2Pix",
        "SDXL_instructpix2pix",
        {**ADM, "in_channels": 8, "context_dim": 2048, "adm_in_channels": 2816},
        (4, 8, 8),
        (77, 2048),
        {**POOLED, **CONCAT},
    ),
    Family(
        "Stable Zero123",
        "Stable_Zero123",
        {**UNET, "in_channels": 8, "use_linear_in_transformer": False, "context_dim": 768},
        (4, 8, 8),
        (1, 768),
        CONCAT,
        state=lambda: {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)},
    ),
    Family(
        "SD2.x upscaler",
        "SD_X4Upscaler",
        {**UNET, "in_channels": 7, "context_dim": 1024, "num_classes": 1000}
        | {"disable_self_attentions": [True, False]},
        (4, 8, 8),
        (77, 1024),
        {"concat_image": Noise((1, 3, 8, 8)), "noise_augmentation": 0.5},
        bare=("label_emb",),
    ),
    Family("Lotus", "LotusD", {**ADM, "context_dim": 1024, "adm_in_channels": 4}, (4, 8, 8), (77, 1024)),
)

MMDIT = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}
DIFFUSERS = ("lora_unet_", "transformer.", "lora_transformer_", "lycoris_")
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 24,
    "context_in_dim": 40,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
FLUX2 = {
    **FLUX,
    "image_model": "flux2",
    "axes_dim": [4, 4, 4, 4],
    "mlp_ratio": 3.0,
    "theta": 2000,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "global_modulation": True,
    "vec_in_dim": None,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CHROMA = {k: v for k, v in FLUX.items() if k not in ("guidance_embed", "vec_in_dim")} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 32,
    "hidden_dim": 40,
    "n_layers": 2,
}
RADIANCE = {
    **CHROMA,
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 4,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 2,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 8,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
}
FLUX_COND = {"pooled_output": Noise((1, 24)), "guidance": 3.5}

IMAGE_TRANSFORMERS = (
    Family("SD3", "SD3", MMDIT, (16, 8, 8), (12, 24), {"pooled_output": Noise((1, 32))}, DIFFUSERS[1:]),
    Family(
        "SD3.5 medium",
        "SD3",
        {**MMDIT, "x_block_self_attn_layers": [0, 1]},
        (16, 8, 8),
        (12, 24),
        {"pooled_output": Noise((1, 32))},
        ("lora_unet_", "transformer."),
    ),
    Family(
        "Flux dev",
        "Flux",
        FLUX,
        (16, 8, 8),
        (12, 40),
        FLUX_COND,
        (*DIFFUSERS, GENERIC),
        variants={"Flux Kontext": REFERENCE, "Flux dev, guidance off": {"guidance": None}},
    ),
    Family("Flux schnell", "FluxSchnell", {**FLUX, "guidance_embed": False}, (16, 8, 8), (12, 40), FLUX_COND),
    Family(
        "Flux Fill",
        "FluxInpaint",
        {**FLUX, "in_channels": 96},
        (16, 8, 8),
        (12, 40),
        {**FLUX_COND, "concat_latent_image": Noise((1, 16, 8, 8)), "concat_mask": torch.ones(1, 1, 64, 64)},
        ("transformer.",),
    ),
    Family("Flux 2", "Flux2", FLUX2, (128, 4, 4), (12, 40), FLUX_COND, ("lora_unet_", GENERIC)),
    Family("Chroma", "Chroma", CHROMA, (16, 8, 8), (12, 40), {"pooled_output": Noise((1, 24))}, DIFFUSERS),
    Family("Chroma Radiance", "ChromaRadiance", RADIANCE, (3, 16, 16), (12, 40), {"pooled_output": Noise((1, 24))}),
    Family(
        "AuraFlow",
        "AuraFlow",
        {"dim": 32, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": 24, "max_seq": 64, "n_double_layers": 1}
        | {"n_layers": 2},
        (4, 8, 8),
        (12, 24),
        names=("transformer.", "lora_unet_"),
    ),
)
IMAGE = (*U_NETS, *IMAGE_TRANSFORMERS)
