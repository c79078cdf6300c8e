"""Other models of images, sound and shapes at toy size (see families.py)."""

from __future__ import annotations

import torch

from support.families import GENERIC, ONES, REFERENCE, Entries, Family, Noise

PIXART = {
    "image_model": "pixart_alpha",
    "num_heads": 2,
    "patch_size": 2,
    "hidden_size": 48,
    "in_channels": 4,
    "depth": 2,
    "caption_channels": 24,
    "model_max_length": 12,
    "micro_condition": True,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": 24,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "multiple_of": 16,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 2,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 0.5,
}
Z_IMAGE = {
    **LUMINA,
    "dim": 256,
    "n_heads": 16,
    "n_kv_heads": 16,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
HYDIT = {
    "image_model": "hydit",
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "text_states_dim": 24,
    "text_states_dim_t5": 32,
    "text_len": 12,
    "text_len_t5": 10,
}
HYDIT_COND = {
    "attention_mask": ONES,
    "conditioning_mt5xl": Noise((1, 10, 32)),
    "attention_mask_mt5xl": ONES[:, :10],
}
HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "caption_channels": [24, 40],
    "max_resolution": [16, 16],
    "in_channels": 16,
    "llama_layers": [0, 1],
    "num_attention_heads": 2,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 24,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
OMNIGEN = {
    "image_model": "omnigen2",
    "axes_dim_rope": [4, 6, 6],
    "axes_lens": [64, 64, 64],
    "ffn_dim_multiplier": None,
    "hidden_size": 64,
    "in_channels": 16,
    "multiple_of": 16,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": 24,
    "timestep_scale": 1000.0,
}
CASCADE_C = {
    "stable_cascade_stage": "c",
    "c_cond": 32,
    "c_hidden": [32, 32],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 24,
    "c_clip_text_pooled": 28,
    "c_r": 16,
}
CASCADE_B = {
    "stable_cascade_stage": "b",
    "c_cond": 32,
    "c_hidden": [16, 16, 32, 32],
    "nhead": [-1, -1, 2, 2],
    "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
    "c_clip": 28,
    "c_r": 16,
}
MORE_TRANSFORMERS = (
    Family(
        "PixArt Alpha",
        "PixArtAlpha",
        PIXART,
        (4, 34, 34),
        (12, 24),
        {"width": 64, "height": 64},
        ("transformer.", "base_model.model."),
        variants={"PixArt Alpha without sizes": {"width": None}},
    ),
    Family(
        "PixArt Sigma",
        "PixArtSigma",
        {**PIXART, "image_model": "pixart_sigma", "micro_condition": False},
        (4, 34, 34),
        (12, 24),
        names=("transformer.", "base_model.model."),
    ),
    Family("HunyuanDiT", "HunyuanDiT", HYDIT, (4, 8, 8), (12, 24), HYDIT_COND, ("base_model.model.",)),
    Family(
        "HunyuanDiT 1.0",
        "HunyuanDiT1",
        {**HYDIT, "image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        (4, 8, 8),
        (12, 24),
        HYDIT_COND,
        ("base_model.model.",),
        bare=("style_embedder",),
    ),
    Family("Lumina 2", "Lumina2", LUMINA, (16, 8, 8), (12, 24)),
    Family("Z-Image", "ZImage", Z_IMAGE, (16, 8, 8), (12, 24), names=("lycoris_", GENERIC)),
    Family(
        "HiDream",
        "HiDream",
        HIDREAM,
        (16, 8, 8),
        (12, 24),
        {"pooled_output": Noise((1, 24)), "conditioning_llama3": Noise((1, 2, 12, 40))},
        ("lycoris_", "transformer."),
        bare=(r".*\.gate",),
    ),
    Family(
        "HiDream, experts without a token",
        "HiDream",
        HIDREAM,
        (16, 2, 2),
        (1, 24),
        {"pooled_output": Noise((1, 24)), "conditioning_llama3": Noise((1, 2, 1, 40))},
        bare=(r".*\.gate",),
        cfg=1.0,
    ),
    Family(
        "Qwen-Image",
        "QwenImage",
        QWEN,
        (16, 1, 8, 8),
        (12, 24),
        names=("transformer.", "lycoris_", "lora_unet_"),
        variants={"Qwen-Image Edit": {"reference_latents": [Noise((1, 16, 1, 8, 8))]}},
    ),
    Family(
        "OmniGen2",
        "Omnigen2",
        OMNIGEN,
        (16, 8, 8),
        (12, 24),
        {"attention_mask": ONES},
        ("",),
        variants={"OmniGen2 with references": REFERENCE},
    ),
    Family(
        "Stable Cascade C",
        "Stable_Cascade_C",
        CASCADE_C,
        (16, 4, 4),
        (12, 24),
        {"pooled_output": Noise((1, 28))},
        ("lora_prior_unet_",),
        variants={
            "Stable Cascade C with a picture": {
                "unclip_conditioning": [Entries(clip_vision_output={"image_embeds": Noise((1, 768))}, strength=1.0)]
            }
        },
    ),
    Family(
        "Stable Cascade B",
        "Stable_Cascade_B",
        CASCADE_B,
        (4, 16, 16),
        (12, 24),
        {"pooled_output": Noise((1, 1, 28)), "stable_cascade_prior": Noise((1, 16, 4, 4))},
    ),
)

ACE = {
    "audio_model": "ace",
    "attention_head_dim": 16,
    "in_channels": 8,
    "inner_dim": 32,
    "max_height": 16,
    "max_position": 64,
    "max_width": 64,
    "mlp_ratio": 2.5,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 8,
    "patch_size": [16, 1],
    "rope_theta": 1000000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": 24,
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [24, 16],
    "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 64,
    "lyric_hidden_size": 1024,
}
HUNYUAN_3D = {
    "image_model": "hunyuan3d2",
    "in_channels": 16,
    "context_in_dim": 24,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "guidance_embed": False,
}


def seconds() -> dict:
    """Random weights of Stable Audio's two embedders of time."""
    from comfy.ldm.audio.embedders import NumberConditioner

    prefixes = ("seconds_start.", "seconds_total.")
    state = NumberConditioner(768).state_dict()
    return {f"conditioner.conditioners.{p}{k}": v for p in prefixes for k, v in state.items()}


OTHERS = (
    Family(
        "Stable Audio",
        "StableAudio",
        {"audio_model": "dit1.0", "embed_dim": 64, "depth": 1, "num_heads": 1, "project_cond_tokens": True},
        (64, 16),
        (12, 768),
        state=seconds,
        bare=("timestep_features",),
    ),
    Family(
        "ACE-Step",
        "ACEStep",
        ACE,
        (8, 16, 8),
        (12, 24),
        {"conditioning_lyrics": torch.arange(6)[None]},
        ("",),
        bare=("lyric_embs",),
    ),
    Family(
        "Hunyuan 3D 2",
        "Hunyuan3Dv2",
        HUNYUAN_3D,
        (16, 12),
        (12, 24),
    ),
    Family("Hunyuan 3D 2 mini", "Hunyuan3Dv2mini", {**HUNYUAN_3D, "depth": 2}, (16, 12), (12, 24)),
    Family(
        "Hunyuan 3D 2.1",
        "Hunyuan3Dv2_1",
        {"image_model": "hunyuan3d2_1", "in_channels": 16, "context_dim": 24, "hidden_size": 32, "mlp_ratio": 4.0}
        | {"num_heads": 2, "depth": 3, "qkv_bias": False, "guidance_cond_proj_dim": None, "num_moe_layers": 1},
        (16, 12),
        (12, 24),
        bare=(r"blocks\.2\.moe\.gate",),
    ),
)
DITS = (*MORE_TRANSFORMERS, *OTHERS)
