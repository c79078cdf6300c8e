"""The parts of ComfyUI's diffusion models and text encoders that do not run exactly once an evaluation, and why.

A part is a sub-module; it is counted by itself, a guarded layer inside must run as often as the part does, and the part
between the given limits (modular_lora/branches/attachment.py). What is not named here must run once. Found by running
every family with and without its optional inputs (tests/comfy/guard/test_families.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..modular_lora.branches.attachment import Times

OPTIONAL = Times(0, 1)  # works on an input that a prompt may leave out
TWICE = Times(1, 2)  # once more for a second input
ANY = Times(1, None)  # once for each of several inputs or tiles
FREELY = Times(0, None)  # works on prompts, once a run (or once an evaluation), before the model itself is called
NEVER = Times(0, 0)  # kept from training, not called when ComfyUI samples

# class of the diffusion model (and of what derives from it) -> path of a part inside it, how often it runs
PARTS: dict[str, tuple[tuple[str, Times], ...]] = {
    "Flux": ((r"guidance_in", OPTIONAL),),  # FluxDisableGuidance
    "ChromaRadiance": ((r"nerf_image_embedder|nerf_blocks\.\d+", ANY),),  # images are drawn in tiles
    "HunyuanVideo": (
        (r"guidance_in|byt5_in|vision_in", OPTIONAL),  # guidance, glyphs, a first frame's features
        (r"time_r_in", OPTIONAL),  # mean flow, where the sampler's next step is known
        (r"time_in|img_in", TWICE),  # a first frame kept clean, a reference image
    ),
    "WanModel": ((r"img_emb|ref_conv", OPTIONAL),),  # CLIP vision, a reference image
    "VaceWanModel": ((r"vace_blocks\.\d+", ANY),),  # once a control video
    "CameraWanModel": ((r"control_adapter", OPTIONAL),),  # a camera path
    "HumoWanModel": (
        (r"patch_embedding", TWICE),  # a reference image
        (r"audio_proj|blocks\.\d+\.audio_cross_attn_wrapper", OPTIONAL),  # sound
    ),
    "WanModel_S2V": (
        (r"patch_embedding", TWICE),  # a reference image
        (r"casual_audio_encoder|audio_injector\.(injector|injector_adain_layers)\.\d+", OPTIONAL),  # sound
        (r"casual_audio_encoder\.encoder\.conv[23]", Times(0, 2)),  # once a frame and once for all
        (r"cond_encoder|frame_packer", OPTIONAL),  # a pose video, frames of the video before
    ),
    "AnimateWanModel": (
        (r"pose_patch_embedding", OPTIONAL),  # a pose video
        (r"face_encoder|face_adapter\.fuser_blocks\.\d+", OPTIONAL),  # a face video
    ),
    "OmniGen2Transformer2DModel": ((r"ref_image_patch_embedder|ref_image_refiner\.\d+", OPTIONAL),),
    "HunYuanDiTPlain": ((r"blocks\.\d+\.moe\.experts\.\d+", OPTIONAL),),  # an expert to which no token is sent
    "ACEStepTransformer2DModel": (
        (r"projectors\.\d+|transformer_blocks\.\d+\.cross_attn\.(add_[qkv]_proj|to_add_out)", NEVER),
    ),
    # what 0.33.0 has besides
    "BooguTransformer2DModel": ((r"ref_image_patch_embedder|ref_image_refiner\.\d+", OPTIONAL),),
    "PixDiT_T2I": ((r"pixel_blocks\.\d+\.mlp", ANY),),  # pixels in chunks
    "Anima": ((r"llm_adapter", FREELY),),
    "LTXAVModel": ((r"(audio|video)_embeddings_connector|(audio_)?caption_projection", FREELY),),
    "MiniMaxH3Model": ((r"condition_proj|token_refiner", FREELY),),
    "HiDreamO1Transformer": ((r"visual", OPTIONAL),),  # reference images, in a run's first evaluation
    "LatentSeqMMFlowModel": ((r"cond_embedder2", OPTIONAL),),  # a reference image
    "AceStepConditionGenerationModel": (
        (r"tokenizer\.(audio_acoustic_proj|attention_pooler|quantizer\.project_in)", OPTIONAL),  # no codes given
    ),
    "SCAILWanModel": ((r"patch_embedding_pose", OPTIONAL),),
    "SCAIL2WanModel": ((r"patch_embedding_mask", Times(0, 2)),),  # of the pose video, of the references
    "WanDancerModel": (
        (r"(patch_embedding|head)(_global)?", OPTIONAL),  # one for 30 frames a second, one for any other rate
        (r"img_emb_refimage", OPTIONAL),  # CLIP vision of a reference image
        (r"music_projection|music_encoder\.\d+|music_injector\.injector\.\d+", OPTIONAL),  # music
    ),
    "WanAnimate2Model": (  # once more for a pose video
        (r"patch_embedding|text_embedding|time_embedding|time_projection", TWICE),
        (r"img_emb", Times(0, 2)),  # CLIP vision
        (r"blocks\.\d+\.(self_attn\.(q|k|v|o|norm_q|norm_k)|cross_attn|norm3|ffn)", TWICE),
    ),
    "CausalWanModel": ((r"blocks\.\d+\.cross_attn\.(k|v|norm_k)", OPTIONAL),),  # kept for a run
    # text encoders: the last norm works on the last layer's output, and on an earlier one's (CLIP skip, SD2.x)
    "CLIPTextModel_": ((r"final_layer_norm", TWICE),),
    "T5Stack": ((r"final_layer_norm", TWICE),),
    "Llama2_": ((r"norm", TWICE), (r"lm_head", NEVER)),  # the head is for writing text, and read as a weight (0.33.0)
}


def parts(diffusion_model: nn.Module, root: str) -> dict[str, Times]:
    """How often each declared part of a diffusion model runs, by its path under ``root``; subclasses override."""
    rules = [rule for cls in reversed(type(diffusion_model).__mro__) for rule in PARTS.get(cls.__name__, ())]
    patterns = [(re.compile(pattern), times) for pattern, times in rules]
    paths = (path for path, _ in diffusion_model.named_modules()) if patterns else ()  # there are thousands
    found = {path: times for path in paths for p, times in patterns if p.fullmatch(path)}
    found |= dict(_repeated(diffusion_model))
    return {f"{root}.{path}": times for path, times in found.items()}


def text_parts(encoders: nn.Module) -> dict[str, Times]:
    """The same of text encoders, which hold the declared classes somewhere inside."""
    declared = (name for name, module in encoders.named_modules() if type(module).__name__ in PARTS)
    return {part: times for name in declared for part, times in parts(encoders.get_submodule(name), name).items()}


def _repeated(model: nn.Module) -> Iterator[tuple[str, Times]]:
    """Stable Cascade's stage B runs a level once more for each of its mappers (StageB)."""
    for side in ("down", "up") if type(model).__name__ == "StageB" else ():
        levels = zip(getattr(model, f"{side}_blocks"), getattr(model, f"{side}_repeat_mappers"), strict=True)
        for i, (blocks, mappers) in enumerate(levels):
            times = Times(len(mappers) + 1, len(mappers) + 1)
            yield from ((f"{side}_blocks.{i}.{j}", times) for j in range(len(blocks)) if mappers)
