"""Models of video that ComfyUI 0.33.0 knows and 0.3.75 does not, at toy size (see families.py)."""

from __future__ import annotations

from support.families import Family, Noise
from support.families_newer import NEWER_IMAGE
from support.families_video import CLIP_FEATURES, FIRST_FRAME, I2V, VIDEO, VIDEO_REFERENCE, WAN

COGVIDEO = {
    "image_model": "cogvideox",
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 16,
    "time_embed_dim": 24,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 12,
    "spatial_interpolation_scale": 1.0,
}
NEWER_VIDEOS = (
    Family("CogVideoX", "CogVideoX_T2V", COGVIDEO, VIDEO, (12, 24)),
    Family(
        "CogVideoX I2V",
        "CogVideoX_I2V",
        {
            **COGVIDEO,
            "in_channels": 32,
            "ofs_embed_dim": 24,
            "patch_size_t": 2,
            "use_rotary_positional_embeddings": True,
        },
        (16, 4, 8, 8),
        (12, 24),
        {"concat_latent_image": Noise((1, 16, 4, 8, 8))},
    ),
    Family(
        "CogVideoX inpainting",
        "CogVideoX_Inpaint",
        {**COGVIDEO, "in_channels": 48},
        VIDEO,
        (12, 24),
        {"concat_latent_image": Noise((1, 32, 3, 8, 8))},
    ),
    Family("Wan 2.1 Flow RVS", "WAN21_FlowRVS", {**WAN, "model_type": "flow_rvs"}, VIDEO, (12, 24)),
    Family(
        "Wan 2.1 SCAIL",
        "WAN21_SCAIL",
        {**WAN, "model_type": "scail", "in_dim": 20},
        VIDEO,
        (12, 24),
        {"pose_video_latent": Noise((1, 16, 3, 4, 4)), **VIDEO_REFERENCE},
        variants={
            "Wan 2.1 SCAIL without a pose": {"pose_video_latent": None, "reference_latents": None},
            "Wan 2.1 SCAIL with CLIP vision": CLIP_FEATURES,
        },
    ),
    Family(
        "Wan 2.1 SCAIL 2",
        "WAN21_SCAIL2",
        {**WAN, "model_type": "scail2", "in_dim": 20},
        VIDEO,
        (12, 24),
        {"pose_video_latent": Noise((1, 16, 3, 4, 4)), **VIDEO_REFERENCE}
        | {"driving_mask_28ch": Noise((1, 3, 28, 4, 4)), "ref_mask_28ch": Noise((1, 4, 28, 8, 8))},
        variants={"Wan 2.1 SCAIL 2 without masks": {"driving_mask_28ch": None, "ref_mask_28ch": None}},
    ),
    Family(
        "Wan 2.2 Dancer",
        "WAN22_WanDancer",
        {**I2V, "model_type": "wandancer", "num_layers": 2, "audio_inject_layers": [0, 1], "music_dim": 16}
        | {"music_feature_dim": 35, "music_latent_dim": 16, "music_heads": 2},
        VIDEO,
        (12, 24),
        {**FIRST_FRAME, **CLIP_FEATURES, "audio_embed": Noise((1, 9, 35))},
        variants={
            "Wan 2.2 Dancer without music": {"audio_embed": None, "clip_vision_output": None},
            "Wan 2.2 Dancer, another frame rate": {
                "fps": 16.0,
                "clip_vision_output_ref": {"penultimate_hidden_states": Noise((1, 5, 1280))},
            },
        },
    ),
    Family(
        "Wan Animate 2",
        "WAN_Animate2",
        {**I2V, "model_type": "animate2"},
        VIDEO,
        (12, 24),
        {**FIRST_FRAME, **CLIP_FEATURES, "pose_video_latent": Noise((1, 16, 2, 8, 8))},
        variants={"Wan Animate 2 without a pose": {"pose_video_latent": None, "clip_vision_output": None}},
    ),
    Family(
        "Wan 2.1 causal",
        "WAN21_CausalAR_T2V",
        WAN,
        VIDEO,
        (12, 24),
        variants={"Wan 2.1 causal, block by block": {"sampler": "ar_video"}},
        cfg=1.0,
    ),
)
NEWER = (*NEWER_IMAGE, *NEWER_VIDEOS)
