"""A host model of a few thousand weights, for tests of the trainers that need no ComfyUI."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.guard.build import ModelInfo
from modular_lora_guard.training.model import Cond, Schedule
from torch import Tensor, nn

WIDTH, TEXT = 8, 6


class Attention(nn.Module):
    def __init__(self, context: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(context, WIDTH), nn.Linear(context, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads = (part[:, None] for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](F.scaled_dot_product_attention(*heads)[:, 0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH), Attention(TEXT)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, context)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(4, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(x)  # b c h w
        rows = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context)  # b hw c
        return self.proj_out(rows.transpose(1, 2).reshape(h.shape))


class ToyUnet(nn.Module):
    """Names as in ComfyUI's U-Nets, so that targets and kohya names can be chosen by them."""

    def __init__(self):
        super().__init__()
        residual = nn.ModuleDict({"emb_layers": nn.Linear(1, 4), "in_layers": nn.Conv2d(4, 4, 3, padding=1)})
        self.middle_block = nn.ModuleList([residual, Transformer()])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        residual, transformer = self.middle_block
        x = x + residual["in_layers"](x) + residual["emb_layers"](t[:, None] / 1000)[..., None, None]
        return x + transformer(x, context)


class ToyHostModel:
    """See training.model.HostModel; prompts are hashed to rows of noise."""

    family, base_sha256, patches = "SD15", "0" * 64, 0
    downscale, notes = 8, ("a note",)

    def __init__(self, dtype: torch.dtype = torch.float32, prediction: str = "epsilon"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet, self.text_encoder = ToyUnet().to(dtype).requires_grad_(False), nn.Linear(2, 2)
        self.dtype, self.device = dtype, torch.device("cpu")
        layers = {p: m for p, m in self.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self.unet_names = {path: f"lora_unet_{path.replace('.', '_')}" for path in layers}
        self.text_names: dict[str, str] = {}
        keys = {name: f"{path}.weight" for path, name in self.unet_names.items()}
        specs = {f"{path}.weight": layer_spec(path, module) for path, module in layers.items()}
        self.infos = (ModelInfo("SD15", keys, specs, ("",)), ModelInfo("text", {}, {}, ("",)))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.schedule = Schedule.ddpm((1 - betas).cumprod(0), prediction)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return 4, height // self.downscale, width // self.downscale

    def frames_of(self, latent_frames: int) -> int:
        return 0

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.unet(x_t.to(self.dtype), t.to(self.dtype), cond.cross.to(self.dtype)).float()

    def encode(self, prompts) -> Cond:
        rows = [torch.Generator().manual_seed(sum(prompt.encode()) * 7919 + len(prompt)) for prompt in prompts]
        return Cond.of(torch.stack([torch.randn(3, TEXT, generator=g) for g in rows]))

    def encode_images(self, images: Tensor) -> Tensor:
        small = F.avg_pool2d(images.movedim(-1, 1), self.downscale)  # b 3 h w
        return torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1

    def ask_reference(self, latent: Tensor) -> None:
        pass

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=self.downscale).movedim(1, -1).sigmoid()

    def weights(self):
        return self.unet.state_dict()

    def autoencoder_identity(self) -> str:
        return "toy"

    def text_identity(self) -> str:
        return "toy"

    def too_long(self, prompt: str) -> bool:
        return len(prompt) > 75

    def release(self, text: bool) -> None:
        self.released = text
        if text:
            self.encode = None

    def attached(self, safety):
        return nullcontext()


class Silent:
    """A watch that remembers what it heard; ``stop_at``: interrupts there."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.steps, self.images, self.said = stop_at, 0, [], ""
        self.validation: list[tuple[int, float]] = []

    def check(self) -> None:
        if self.stop_at is not None and self.steps >= self.stop_at:
            raise KeyboardInterrupt

    def stage(self, text: str, done: int, total: int) -> None:
        pass

    def step(self, step: int, total: int, losses: list[float]) -> None:
        self.steps = step

    def validated(self, losses: list[tuple[int, float]]) -> None:
        self.validation = list(losses)

    def sample(self, step: int, images: list, without: object = ()) -> None:
        self.images += images

    def say(self, text: str) -> None:
        self.said = "\n".join(filter(None, (self.said, text)))
