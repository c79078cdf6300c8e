"""Previews of a training: the sample prompts with the safety LoRA attached, from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image

from ..modular_lora.guard import SafetyLora
from ..modular_lora.util import atomic
from . import sampling
from .adapters import Adapters
from .checkpointing import suspended
from .options import Options
from .seeds import step_generator
from .trainee import Trainee


class Previews:
    """Draws ``options.sample_prompts``; leaves weights, random number generators and adapters as they were."""

    def __init__(
        self,
        trainee: Trainee,
        adapters: Adapters,
        options: Options,
        check: Callable[[], None],
        safety: Sequence[SafetyLora] = (),
    ):
        """``check`` is asked before every picture and may raise to interrupt."""
        self.trainee, self.adapters, self.options, self.check, self.safety = trainee, adapters, options, check, safety

    @torch.no_grad()
    def __call__(self, step: int, saved: AbstractContextManager = nullcontext()) -> list[Path]:  # noqa: B008
        """One PNG a prompt, as of ``step``; inside ``saved`` the adapters are what will be saved."""
        devices = [self.trainee.device] if self.trainee.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            saved,
            suspended(self.trainee.unet),
            self.adapters.evaluating(),
            self.trainee.attached(self.safety),
        ):
            return [self._draw(step, i, prompt) for i, prompt in enumerate(self.options.sample_prompts)]

    def _draw(self, step: int, i: int, prompt: str) -> Path:
        self.check()
        trainee, options = self.trainee, self.options
        cond, empty = trainee.encode([prompt]), trainee.encode([""])
        size = (options.sample_size, options.sample_size)
        x_t = sampling.noise(trainee, size, [step_generator(options.seed, "sample", i)])
        walk = (trainee.predict, trainee.schedule, x_t, cond, empty, options.sample_cfg, options.sample_steps)
        picture = trainee.decode(sampling.sample(*walk))[0]  # h w 3
        return self._save(Image.fromarray((picture * 255).round().byte().numpy()), step, i)

    def _save(self, picture: Image.Image, step: int, i: int) -> Path:
        path = Path(self.options.output_dir) / "sample" / f"{self.options.output_name}_{step:06d}_{i:02d}.png"
        with atomic.replacing(path, parents=True) as part:
            picture.save(part, "PNG")
        return path
