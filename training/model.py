"""What a training loop needs of a model; comfy_host/trainer_model.py offers it for what ComfyUI has loaded.

Every diffusion model that ComfyUI loads mixes image and noise linearly, and so does what its network is to say:

    x_t = a_t x_0 + s_t ε,   F = c_t x_0 + d_t ε,   t an index into the model's own table of noise levels

| parameterisation | a_t | s_t | F |
|---|---|---|---|
| ε (DDPM, arXiv 2006.11239, eq. 4) | √ᾱ_t | √(1−ᾱ_t) | ε |
| v (arXiv 2202.00512) | √ᾱ_t | √(1−ᾱ_t) | √ᾱ_t ε − √(1−ᾱ_t) x_0 |
| velocity (flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003) | 1−σ_t | σ_t | ε − x_0 |
| EDM (arXiv 2206.00364, table 1; σ_d: deviation of the data) | 1 / √(σ_t²+σ_d²) | σ_t a_t | s_t x_0 / σ_d − σ_d a_t ε |

x_t is on the scale on which the network sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..modular_lora.guard.build import ModelInfo, SafetyLora

Prediction = Literal["epsilon", "v_prediction", "velocity", "sample"]


@dataclass(frozen=True, eq=False)
class Text:
    """One prompt's conditioning."""

    cross: Tensor  # 1 n d
    further: Mapping[str, Tensor | None] = field(
        default_factory=dict
    )  # what encoders made beside it, by ComfyUI's names
    size: Tensor | None = None  # 6, int64: original h w, crop top left, target h w; None: the latent's own size
    reference: Tensor | None = None  # 1 c ..., latent of a reference image in the autoencoder's scale

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.cross, *self.further.values()) if part is not None)


@dataclass(frozen=True, eq=False)
class Cond:
    """Text conditioning of b prompts, row by row: many encoders give every text a length of its own."""

    rows: tuple[Text, ...]

    @classmethod
    def of(cls, cross: Tensor, **further: Tensor) -> Cond:
        """Of b texts of one length: cross (b n d), and what goes with them (b ...)."""
        parts = {name: part.split(1) for name, part in further.items()}
        return cls(
            tuple(Text(row, {name: part[i] for name, part in parts.items()}) for i, row in enumerate(cross.split(1)))
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Cond:
        return Cond(tuple(self.rows[int(i)] for i in rows))

    @property
    def cross(self) -> Tensor:
        """b n d, of texts of one length."""
        return torch.cat([row.cross for row in self.rows])

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def of_images(self, sizes: Tensor, references: Sequence[Tensor | None]) -> Cond:
        """With images' sizes (b 6) and the latents (1 c ... each) of what an edit model is given beside the text."""
        rows = zip(self.rows, sizes, references, strict=True)
        return Cond(tuple(replace(row, size=size, reference=reference) for row, size, reference in rows))

    def crossing(self, cross: Sequence[Tensor]) -> Cond:
        """With other cross-attention rows (1 n d each)."""
        return Cond(tuple(replace(row, cross=own) for row, own in zip(self.rows, cross, strict=True)))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Along b."""
        return Cond(tuple(row for cond in conds for row in cond.rows))


@dataclass(frozen=True, eq=False)
class Schedule:
    """The table of noise levels of a model, from the cleanest to the noisiest, and what its network says at each.

    All of it (T, float32) on the CPU. x_0 = ``x0_of_x`` x_t + ``x0_of_said`` F; ε = ``noise_of_x`` x_t +
    ``noise_of_said`` F; F = ``said_of_x0`` x_0 + ``said_of_noise`` ε.
    """

    signal: Tensor  # a_t
    noise: Tensor  # s_t
    x0_of_x: Tensor
    x0_of_said: Tensor
    noise_of_x: Tensor
    noise_of_said: Tensor
    said_of_x0: Tensor
    said_of_noise: Tensor
    times: Tensor  # what the network is told as its time
    start: float  # deviation of x at the noisiest level where an image begins as noise alone
    prediction: Prediction

    @classmethod
    def of(
        cls, signal: Tensor, noise: Tensor, x0_of_x: Tensor, x0_of_said: Tensor, times: Tensor, start: float = 1.0
    ) -> Schedule:
        """From x_t = a x_0 + s ε and x_0 = α x_t + β F (all T, in float64, as the differences lose digits)."""
        a, s, alpha, beta = (part.double() for part in (signal, noise, x0_of_x, x0_of_said))
        of_x0, of_noise = (1 - alpha * a) / beta, -alpha * s / beta
        return cls(
            signal=a.float(),
            noise=s.float(),
            x0_of_x=alpha.float(),
            x0_of_said=beta.float(),
            noise_of_x=((1 - a * alpha) / s).float(),
            noise_of_said=(-a * beta / s).float(),
            said_of_x0=of_x0.float(),
            said_of_noise=of_noise.float(),
            times=times.float(),
            start=float(start),
            prediction=_prediction(of_x0, of_noise),
        )

    @classmethod
    def ddpm(cls, alphas_cumprod: Tensor, prediction: Prediction = "epsilon") -> Schedule:
        """Of ᾱ (T), which falls, with ε- or v-prediction."""
        abar = alphas_cumprod.double()
        a, s = abar.sqrt(), (1 - abar).sqrt()
        said = (1 / a, -s / a) if prediction == "epsilon" else (a, -s)
        return cls.of(a, s, *said, torch.arange(len(a)))

    @classmethod
    def flow(cls, sigmas: Tensor) -> Schedule:
        """Of flow matching at σ (T), which rises to 1."""
        sigmas = sigmas.double()
        return cls.of(1 - sigmas, sigmas, torch.ones_like(sigmas), -sigmas, sigmas)

    def __len__(self) -> int:
        return len(self.signal)

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t (b c ...) of latents x0, timesteps t (b, int64) and noise eps."""
        return _rows(self.signal, t, x0) * x0 + _rows(self.noise, t, x0) * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should say, F."""
        return _rows(self.said_of_x0, t, x0) * x0 + _rows(self.said_of_noise, t, x0) * eps

    def to_x0_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, ε) that a prediction at x_t amounts to."""
        x0 = _rows(self.x0_of_x, t, x_t) * x_t + _rows(self.x0_of_said, t, x_t) * prediction
        eps = _rows(self.noise_of_x, t, x_t) * x_t + _rows(self.noise_of_said, t, x_t) * prediction
        return x0, eps

    def snr(self, t: Tensor) -> Tensor:
        """(a_t / s_t)² of timesteps t (b)."""
        return (self.signal.to(t.device)[t] / self.noise.to(t.device)[t]).square()

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Weights (b) of |ΔF|² that make min(SNR, γ) |Δx_0|² of it (arXiv 2303.09556, section 3.4); 1 where γ is 0.

        |Δx_0|² = β² |ΔF|²: min(SNR, γ) / SNR for ε, / (SNR + 1) for v, times σ² for flow matching.
        """
        if not gamma:
            return torch.ones(len(t), device=t.device)
        return self.snr(t).clamp(max=gamma) * self.x0_of_said.to(t.device)[t].square()


def _rows(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """b 1 ..., of as many dimensions as ``like``."""
    return values.to(t.device)[t].view(-1, *[1] * (like.dim() - 1))


def _prediction(of_x0: Tensor, of_noise: Tensor) -> Prediction:
    """The name of F = c x_0 + d ε."""

    def are(c: float, d: float) -> bool:
        pairs = ((of_x0, c), (of_noise, d))
        return all(torch.allclose(part, torch.full_like(part, value), rtol=1e-3, atol=1e-3) for part, value in pairs)

    if are(0, 1):
        return "epsilon"
    if are(-1, 1):
        return "velocity"
    return "sample" if are(1, 0) else "v_prediction"


def per_row(values: Tensor) -> Tensor:
    """Mean of every row (b) of b c ... ."""
    return values.mean(tuple(range(1, values.dim())))


class HostModel(Protocol):
    """A loaded model, its weights plain tensors (not inference tensors) that never require grad.

    ``predict`` and ``encode`` keep the graph where adapters on ``unet`` or ``text_encoder`` require grad.
    """

    family: str  # ComfyUI's name: SD15, SD20, SDXL, ...
    base_sha256: str  # modular_lora.util.tensor_hashing.weights_sha256 of W0
    patches: int  # weights that a LoRA or model was merged into, where that was accepted
    unet: nn.Module  # the network, U-Net or transformer
    text_encoder: nn.Module
    unet_names: Mapping[str, str]  # path of a module in unet -> its layer's name, every Linear and Conv2d it names
    text_names: Mapping[str, str]  # the same for text_encoder
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype  # of weights and activations; adapters are float32
    infos: tuple[ModelInfo, ModelInfo]  # key maps and layers of U-Net and text encoder, as the guard knows them
    notes: tuple[str, ...]  # what is worth a line in the report
    downscale: int  # pixels a latent cell

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """c [f] h w of an image's latent, from its pixels; models of video see it as one frame, and clips of more."""

    def frames_of(self, latent_frames: int) -> int:
        """How many frames of a clip so many of a latent are; 0 of a model of still images."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network says (b c ..., float32) at x_t (b c ..., float32), timesteps t (b, int64)."""

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of prompts; the empty prompt is ''."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (b c [f] h/8 w/8, float32, model scale) of images (b h w 3, float32 0..1) or clips (b t h w 3)."""

    def encode_reference(self, image: Tensor) -> Tensor:
        """Latent (1 c ..., float32, the autoencoder's own scale) of a reference image (h w 3, float32 0..1)."""

    def ask_reference(self, latent: Tensor) -> None:
        """Find out how the network is given a reference image, of which this is a latent, before ``predict`` is.

        Raises GuardError where it takes no such image.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b h w 3, float32 0..1) of latents."""

    def weights(self) -> Mapping[str, Tensor]:
        """The base's weights under the guard's keys; to be read before adapters go in."""

    def autoencoder_identity(self) -> str:
        """The same for the same latents of the same images: weights, precision, the latents' scale."""

    def text_identity(self) -> str:
        """The same for the same conditioning of the same texts: weights, layer, length."""

    def too_long(self, prompt: str) -> bool:
        """Whether ``encode`` cuts a prompt off."""

    def attached(self, safety: Sequence[SafetyLora]) -> AbstractContextManager[None]:
        """The safety LoRAs as frozen forward branches, as the guard serves them, while inside."""

    def release(self, text: bool) -> None:
        """Let go of what will not be asked for again: the autoencoder and, with ``text``, the text encoder."""
