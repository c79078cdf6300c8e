"""A host model of two linear maps, for tests of erasure whose every answer can be recomputed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from modular_lora_guard.training.model import Cond, Schedule
from modular_lora_guard.training.options import SafetyOptions
from modular_lora_guard.training.safety.erasure import Erasure
from torch import nn

TOTAL, CHANNELS, SIDE = 100, 2, 2
ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.1, TOTAL, dtype=torch.float64), 0).float()
DISTURBED = torch.linspace(-1, 1, 64).view(16, 4)
PROMPTS = ("car", "bus", "cat", "dog", "thing", "nothing")


class Toy:
    """A HostModel of two linear maps; the adapter is a rank-4 change of the first, which can be turned off."""

    base_sha256, family, downscale = "toy", "SD15", 8
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, prediction: str = "epsilon") -> None:
        g, n = torch.Generator().manual_seed(1), CHANNELS * SIDE * SIDE
        self.schedule = Schedule.ddpm(ABAR, prediction)
        self.first, self.second = torch.randn(16, 2 * n + 1, generator=g) / 3, torch.randn(n, 16, generator=g) / 3
        self.words = {"": torch.zeros(n)} | {p: torch.randn(n, generator=g) for p in PROMPTS}
        self.down = nn.Parameter(torch.randn(4, 2 * n + 1, generator=g) / 3)
        self.up = nn.Parameter(torch.zeros(16, 4))
        self.on, self.calls = True, []

    def latent_shape(self, height, width):
        return CHANNELS, height // self.downscale, width // self.downscale

    def predict(self, x_t, t, cond):
        self.calls.append(SimpleNamespace(x_t=x_t, t=t, cond=cond, on=self.on, grad=torch.is_grad_enabled()))
        features = torch.cat([x_t.flatten(1), cond.cross[:, 0], t[:, None] / TOTAL], 1)
        weight = self.first + self.up @ self.down if self.on else self.first
        return (torch.tanh(features @ weight.T) @ self.second.T).view_as(x_t)

    def base(self, x_t, t, *prompts):
        """ε_0 of the plain network, computed apart from ``predict``."""
        features = torch.cat([x_t.flatten(1), torch.stack([self.words[p] for p in prompts]), t[:, None] / TOTAL], 1)
        return (torch.tanh(features @ self.first.T) @ self.second.T).view_as(x_t)

    def encode(self, prompts):
        return Cond.of(torch.stack([self.words[p] for p in prompts])[:, None])

    @contextlib.contextmanager
    def off(self):
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was

    @property
    def parameters(self):
        return [self.down, self.up]

    def disturb(self):
        """A LoRA that does something."""
        with torch.no_grad():
            self.up.copy_(DISTURBED)
        return self

    def names(self, cond):
        return [next(p for p, v in self.words.items() if torch.equal(v, row[0])) for row in cond.cross]

    def trained(self):
        """The call of the last loss: what the student was asked."""
        return next(call for call in reversed(self.calls) if call.grad)


def options(**changes) -> SafetyOptions:
    usual = {"objective": "esd-x", "concept": ("car",), "preserve": ("cat", "dog"), "denoising_steps": 5,
             "train_size": SIDE * 8, "train_batch_size": 6, "max_train_steps": 10}  # fmt: skip
    return SafetyOptions(**usual | changes)


def erasure(toy: Toy, relative: bool = False, **changes) -> Erasure:
    more = {name: changes.pop(name) for name in ("progress", "pool_file", "ema_decay") if name in changes}
    return Erasure(toy, options(**changes), toy.off, toy.parameters, relative=relative, **more)


def noise(b: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
