"""Models that the embedded trainers refuse by name, and what to do instead.

They learn from captioned images, or from prompts, so a model must take a text and give an image (a model of video
gives one of a single frame). What can be asked of the model is asked; what no model says stands in `NAMED`.
"""

from __future__ import annotations

import re

from ..modular_lora.errors import GuardError
from . import introspection, noising

_WORDS = "Make Safety LoRA makes a safety LoRA for it from words alone"
_ELSEWHERE = "a LoRA that was trained elsewhere loads with Load Task LoRA"
NAMED = {  # family (comfy.supported_models) -> why not, and what instead
    r"SVD_img2vid|SV3D_[up]|Stable_Zero123|Hunyuan3Dv2.*|Trellis2|TripoSplat": "is asked with an image and takes no "
    f"text: {_ELSEWHERE}.",
    r"SD_X4Upscaler|HunyuanVideo15_SR_Distilled|HunyuanImage21Refiner|PiD|SeedVR2": "works on a given image of low "
    f"quality, which no data set here has: train the model that draws the images; {_WORDS}.",
    r"Stable_Cascade_B": f"works on Stage C's latents, which no data set here has: train Stage C; {_WORDS}.",
    r"StableAudio3?|ACEStep(15)?|MiniMaxMusic3": f"makes sound, no images: {_ELSEWHERE}, and {_WORDS}.",
    r"LTXAV|MiniMaxH3": f"draws several latents at once, of which an image is one: {_ELSEWHERE}.",
}

STILL = r"QwenImage|CosmosT2IPredict2|Anima|Krea2|JoyImage"  # draw images, on latents of a VAE of video


def is_still(family: str) -> bool:
    """Whether a family draws still images, though its latents have frames."""
    return re.fullmatch(STILL, family) is not None


def check(model) -> None:
    """GuardError for a MODEL that no LoRA can be trained on here."""
    family, network = introspection.family(model), model.model
    found = next((why for names, why in NAMED.items() if re.fullmatch(names, family)), "")
    if not found and getattr(network.latent_format, "latent_dimensions", 2) < 2:
        found = f"draws no images: {_ELSEWHERE}."
    if not found and noising.maps_images(network.model_sampling):
        found = "turns one image into another and takes no noise away: train the model that it was made of."
    if found:
        raise GuardError(f"The embedded trainer cannot train this {family}: it {found}", code="train.family")
