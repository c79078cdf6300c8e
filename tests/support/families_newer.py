"""Models that ComfyUI 0.33.0 knows and 0.3.75 does not, at toy size (see families.py)."""

from __future__ import annotations

import torch

from support.families import ONES, REFERENCE, Family, Noise
from support.families_dit import OMNIGEN, Z_IMAGE
from support.families_image import DIFFUSERS, FLUX
from support.families_video import PREDICT2, VIDEO

LENS = {
    "image_model": "lens",
    "in_channels": 128,
    "out_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "enc_hidden_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "selected_layer_index": (0, 1),
}
PIXELS = {
    **Z_IMAGE,
    "image_model": "zimage_pixel",
    "patch_size": 4,
    "in_channels": 3,
    "decoder_in_channels": 48,
    "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 1,
    "decoder_max_freqs": 4,
}
PIXELDIT = {
    "image_model": "pixeldit_t2i",
    "num_groups": 2,
    "hidden_size": 32,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2,
    "patch_depth": 2,
    "pixel_depth": 1,
    "patch_size": 4,
    "txt_embed_dim": 24,
    "txt_max_length": 12,
}
BOOGU = {k: v for k, v in OMNIGEN.items() if k != "text_feat_dim"} | {
    "image_model": "boogu",
    "instruction_feat_dim": 24,
    "num_double_stream_layers": 1,
}
IDEOGRAM = {
    "image_model": "ideogram4",
    "in_channels": 128,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "intermediate_size": 48,
    "adaln_dim": 24,
    "llm_features_dim": 24,
    "mrope_section": (4, 2, 2),
}
KREA = {
    "image_model": "krea2",
    "features": 64,
    "tdim": 16,
    "txtdim": 32,
    "heads": 2,
    "kvheads": 1,
    "layers": 2,
    "txtlayers": 2,
    "txtheads": 2,
    "txtkvheads": 2,
}
MAGE = {
    "image_model": "mage_flow",
    "in_channels": 128,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
JOY = {
    "image_model": "joyimage",
    "in_channels": 16,
    "hidden_size": 32,
    "patch_size": [1, 2, 2],
    "num_layers": 2,
    "num_attention_heads": 2,
    "text_dim": 24,
    "rope_dim_list": [4, 6, 6],
    "theta": 10000,
}
KANDINSKY = {
    "image_model": "kandinsky5",
    "in_text_dim": 24,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 48,
    "visual_embed_dim": 132,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
ERNIE = {
    "image_model": "ernie",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 48,
    "text_in_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}
LTXAV = {
    "image_model": "ltxav",
    "in_channels": 16,
    "audio_in_channels": 128,
    "cross_attention_dim": 32,
    "audio_cross_attention_dim": 16,
    "attention_head_dim": 16,
    "audio_attention_head_dim": 8,
    "num_attention_heads": 2,
    "audio_num_attention_heads": 2,
    "caption_channels": 24,
    "num_layers": 2,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
}
MINIMAX = {
    "image_model": "minimax_h3",
    "hidden_size": 64,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_hidden_size": 48,
    "text_dim": 24,
    "timestep_input_dim": 16,
    "time_embed_hidden_size": 32,
    "time_embed_dim": 16,
    "rope_inv_freq_len": 4,
}
O1 = {
    "image_model": "hidream_o1",
    "text_config_overrides": {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 32}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_dims": [6, 5, 5]},
    "vision_config_overrides": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "depth": 1}
    | {"deepstack_visual_indexes": ()},
}
TRIPOSPLAT = {
    "image_model": "triposplat",
    "q_token_length": 16,
    "model_channels": 64,
    "cond_channels": 24,
    "num_blocks": 2,
    "num_refiner_blocks": 1,
    "num_head_channels": 32,
    "cond2_channels": 16,
}
STABLE_AUDIO_3 = {
    "audio_model": "dit1.0",
    "io_channels": 256,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 1,
    "project_cond_tokens": True,
    "global_cond_dim": 768,
    "global_cond_type": "adaLN",
    "global_cond_shared_embed": True,
    "timestep_features_type": "expo",
    "local_add_cond_dim": 257,
}
ACE_15 = {
    "audio_model": "ace1.5",
    "hidden_size": 64,
    "text_hidden_dim": 24,
    "num_dit_layers": 2,
    "num_lyric_layers": 1,
    "num_timbre_layers": 1,
    "num_tokenizer_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 48,
    "fsq_dim": 64,
    "encoder_hidden_size": 64,
    "encoder_intermediate_size": 48,
    "encoder_num_heads": 2,
}
PID = {
    **PIXELDIT,
    "image_model": "pid",
    "lq_hidden_dim": 16,
    "lq_num_res_blocks": 1,
    "lq_interval": 1,
    "sr_scale": 1,
    "latent_spatial_down_factor": 4,
    "pit_lq_inject": True,
}
POOLED = {"pooled_output": Noise((1, 16))}


def seconds() -> dict:
    """Random weights of Stable Audio 3's embedder of time."""
    from comfy.ldm.audio.embedders import NumberConditioner

    state = NumberConditioner(768, fourier_features_type="expo").state_dict()
    return {f"conditioner.conditioners.seconds_total.{k}": v for k, v in state.items()}


NEWER_IMAGE = (
    Family("Lens", "Lens", LENS, (128, 4, 4), (12, 48)),
    Family(
        "LongCat Image",
        "LongCatImage",
        {**FLUX, "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
        (16, 8, 8),
        (12, 40),
        names=DIFFUSERS[:2],
    ),
    Family("Z-Image in pixels", "ZImagePixelSpace", PIXELS, (3, 16, 16), (12, 24), names=("lycoris_",)),
    Family("PixelDiT", "PixelDiTT2I", PIXELDIT, (3, 16, 16), (12, 24)),
    Family(
        "Boogu",
        "Boogu",
        BOOGU,
        (16, 8, 8),
        (12, 24),
        {"attention_mask": ONES},
        variants={"Boogu with references": REFERENCE},
    ),
    Family("Ideogram 4", "Ideogram4", IDEOGRAM, (128, 4, 4), (12, 24), bare=("embed_image_indicator",)),
    Family("Krea 2", "Krea2", KREA, (16, 1, 8, 8), (12, 64)),
    Family("Mage Flow", "MageFlow", MAGE, (128, 4, 4), (12, 24)),
    Family("JoyImage", "JoyImage", JOY, (16, 1, 8, 8), (12, 24)),
    Family("Kandinsky 5", "Kandinsky5", KANDINSKY, VIDEO, (12, 24), POOLED),
    Family(
        "Kandinsky 5 Image", "Kandinsky5Image", {**KANDINSKY, "visual_embed_dim": 64}, (16, 1, 8, 8), (12, 24), POOLED
    ),
    Family("Ernie Image", "ErnieImage", ERNIE, (128, 4, 4), (12, 24)),
    Family(
        "Anima",
        "Anima",
        {**PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024},
        (16, 1, 8, 8),
        (12, 1024),
        {"t5xxl_ids": torch.arange(5, 15), "t5xxl_weights": torch.linspace(0.5, 1.5, 10)},
        bare=(r"llm_adapter\.embed",),
        variants={"Anima without T5 tokens": {"t5xxl_ids": None}},
    ),
    Family(
        "LTX Video with sound",
        "LTXAV",
        LTXAV,
        (VIDEO, (8, 5, 16)),
        (12, 48),
        variants={"LTX Video with sound, raw text": {"unprocessed_ltxav_embeds": True}},
    ),
    Family(
        "LTX Video 2.3 with sound",
        "LTXAV",
        {**LTXAV, "caption_proj_before_connector": True, "caption_projection_first_linear": True}
        | {"cross_attention_adaln": True, "apply_gated_attention": True},
        (VIDEO, (8, 5, 16)),
        (12, 24),
    ),
    Family("MiniMax H3", "MiniMaxH3", MINIMAX, ((24, 3, 4, 4), (32, 2, 5)), (12, 24), cfg=1.0),
    Family(
        "HiDream O1",
        "HiDreamO1",
        O1,
        (3, 64, 64),
        (1, 64),
        {"text_input_ids": torch.tensor([[5, 6, 7, 8, 151673]])},
        variants={"HiDream O1 with a reference": {"reference_latents": [Noise((1, 64, 64, 3))]}},
        bare=(r"language_model\.embed_tokens", r"visual\.pos_embed"),
        cfg=1.0,
    ),
    Family(
        "TripoSplat",
        "TripoSplat",
        TRIPOSPLAT,
        ((16, 16), (1, 5)),
        (12, 24),
        variants={"TripoSplat with a reference": {"reference_latents": [Noise((1, 16, 2, 2))]}},
    ),
    Family("Stable Audio 3", "StableAudio3", STABLE_AUDIO_3, (256, 16), (12, 768), state=seconds),
    Family(
        "ACE-Step 1.5",
        "ACEStep15",
        ACE_15,
        (64, 10),
        (12, 24),
        {"conditioning_lyrics": Noise((1, 6, 24))},
        variants={
            "ACE-Step 1.5 with codes": {"audio_codes": [[1, 2]]},
            "ACE-Step 1.5 with a timbre": {"reference_audio_timbre_latents": [Noise((1, 64, 10))]},
        },
        on_meta=False,
    ),
    Family(
        "PiD",
        "PiD",
        PID,
        (3, 16, 16),
        (12, 24),
        {"lq_latent": Noise((1, 16, 4, 4)), "degrade_sigma": torch.tensor([0.1])},
    ),
)
