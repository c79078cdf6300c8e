"""The demo world's narrow net, from the shipped assets, as a host model of the trainers (training/model.py).

It is the function that ComfyUI evaluates at stock width (README, "Train narrow, ship padded") at a quarter of the cost,
so experiments with the trainers can be run on it; LoRAs trained on it pad to stock files (lorafile.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..world import ASSETS, LIVE_WEIGHTS, SAFETY_LORA, autoencoder, base, diffusion, lorafile

TOKENS = "demo_tokens.json"  # word -> ids of CLIP's tokenizer
LENGTH = 24  # tokens that every prompt is padded to; the padding has no weight in attention


def load() -> tuple[base.Base, autoencoder.Autoencoder]:
    """U-Net with token rows, and autoencoder, with the rounding of the shipped file."""
    live = load_file(ASSETS / LIVE_WEIGHTS)
    model = base.Base(json.loads((ASSETS / TOKENS).read_text(encoding="utf-8")))
    state = {name: tensor.float() for name, tensor in live.items() if name.startswith("unet.")}
    model.load_state_dict(state | {"text.rows": live["text.rows"].float()})
    ae = autoencoder.Autoencoder()
    ae.norm = nn.Identity()
    ae.load_state_dict({k.removeprefix("vae."): v.float() for k, v in live.items() if k.startswith("vae.")})
    return model.eval().requires_grad_(False), ae.eval().requires_grad_(False)


class NarrowHostModel:
    """HostModel on a `base.Base`; ``schedule`` and ``cond`` are the pack's own classes Schedule and Cond."""

    family, patches, downscale = "SD15", 0, 8
    device, dtype, notes = torch.device("cpu"), torch.float32, ()

    def __init__(self, model: base.Base, schedule: type, cond: type):
        self.model, self.unet, self.text_encoder, self._cond = model, model.unet, nn.Identity(), cond
        self.schedule = schedule.ddpm(diffusion.ALPHA_BAR, "epsilon")
        self.unet_names = {name: lorafile.kohya_name(name) for name in lorafile.targets(model.unet)}
        self.text_names: dict[str, str] = {}
        with safe_open(ASSETS / SAFETY_LORA, "pt") as file:
            self.base_sha256 = file.metadata()["modular_lora.base_sha256"]

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return 4, height // self.downscale, width // self.downscale

    def frames_of(self, latent_frames: int) -> int:
        return 0

    def predict(self, x_t: Tensor, t: Tensor, cond) -> Tensor:
        bias = torch.cat([row.further["bias"] for row in cond.rows])
        return self.unet(x_t, t, cond.cross, bias)

    def encode(self, prompts: Sequence[str]):
        context, bias = self.model.text(list(prompts))  # b l 768, b l
        room = LENGTH - context.shape[1]
        return self._cond.of(F.pad(context, (0, 0, 0, room)), bias=F.pad(bias, (0, room), value=-torch.inf))

    def release(self, text: bool) -> None:
        """Nothing: token rows and U-Net are one module."""

    def too_long(self, prompt: str) -> bool:
        """Whether a prompt has more tokens than `encode` pads to."""
        return self.model.text([prompt])[0].shape[1] > LENGTH
