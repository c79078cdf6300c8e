"""What a training loop needs of a model; comfy_host/trainer_model.py offers it for what ComfyUI has loaded.

x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, with t an index into ᾱ (DDPM, arXiv 2006.11239, eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..modular_lora.guard.build import ModelInfo, SafetyLora

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, eq=False)
class Cond:
    """Text conditioning of b prompts, and for SDXL the picture sizes that its U-Net is told."""

    cross: Tensor  # b n d
    pooled: Tensor | None = None  # b d
    sizes: Tensor | None = None  # b 6, int64: original h w, crop top left, target h w; None: the latent's own size

    def __len__(self) -> int:
        return len(self.cross)

    def __getitem__(self, rows) -> Cond:
        pooled, sizes = (None if part is None else _rows(part, rows) for part in (self.pooled, self.sizes))
        return Cond(_rows(self.cross, rows), pooled, sizes)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Along b; longer prompts (150 or 225 tokens) do not mix with shorter ones: give them one length."""
        return Cond(torch.cat([c.cross for c in conds]), _cat(c.pooled for c in conds), _cat(c.sizes for c in conds))


def _cat(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Along b; None where the model takes no such part."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _rows(part: Tensor, rows) -> Tensor:
    """``part[rows]``; text stays where its encoder put it, often the CPU, while rows come from where x_t is."""
    return part[rows.to(part.device) if isinstance(rows, Tensor) else rows]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule of a discrete-time model."""

    alphas_cumprod: Tensor  # T, float32, on the CPU
    prediction: Prediction

    def _rows(self, values: Tensor, t: Tensor) -> Tensor:
        return values.to(t.device)[t][:, None, None, None]  # b 1 1 1

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t (b c h w) of latents x0, timesteps t (b, int64) and noise eps."""
        abar = self._rows(self.alphas_cumprod, t)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict: ε, or v = √ᾱ ε − √(1−ᾱ) x_0 (arXiv 2202.00512)."""
        if self.prediction == "epsilon":
            return eps
        abar = self._rows(self.alphas_cumprod, t)
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0

    def to_x0_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, ε) that a prediction at x_t amounts to."""
        abar = self._rows(self.alphas_cumprod, t)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        if self.prediction == "epsilon":
            return (x_t - s * prediction) / a, prediction
        return a * x_t - s * prediction, a * prediction + s * x_t

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ / (1 − ᾱ) of timesteps t (b)."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar / (1 - abar)


class HostModel(Protocol):
    """A loaded model, its weights plain tensors (not inference tensors) that never require grad.

    ``predict`` and ``encode`` keep the graph where adapters on ``unet`` or ``text_encoder`` require grad.
    """

    family: str  # ComfyUI's name: SD15, SD20, SDXL, ...
    base_sha256: str  # modular_lora.util.tensor_hashing.weights_sha256 of W0
    patches: int  # weights that a LoRA or model was merged into, where that was accepted
    unet: nn.Module
    text_encoder: nn.Module
    unet_names: Mapping[str, str]  # path of a module in unet -> kohya's layer name, every Linear and Conv2d it names
    text_names: Mapping[str, str]  # the same for text_encoder
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype  # of weights and activations; adapters are float32
    infos: tuple[ModelInfo, ModelInfo]  # key maps and layers of U-Net and text encoder, as the guard knows them
    notes: tuple[str, ...]  # what is worth a line in the report
    latent_channels: int
    downscale: int  # pixels a latent cell

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """ε or v (b c h w, float32) at x_t (b c h w, float32), timesteps t (b, int64)."""

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of prompts; the empty prompt is ''."""

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents (b c h/8 w/8, float32, model scale) of pictures (b h w 3, float32 0..1)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (b h w 3, float32 0..1) of latents."""

    def weights(self) -> Mapping[str, Tensor]:
        """The base's weights under the guard's keys; to be read before adapters go in."""

    def too_long(self, prompt: str) -> bool:
        """Whether ``encode`` cuts a prompt off."""

    def attached(self, safety: Sequence[SafetyLora]) -> AbstractContextManager[None]:
        """The safety LoRAs as frozen forward branches, as the guard serves them, while inside."""

    def release(self, text: bool) -> None:
        """Let go of what will not be asked for again: the autoencoder and, with ``text``, the text encoder."""
