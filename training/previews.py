"""Previews of a training: the sample prompts with the safety LoRA attached, from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image

from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.util import atomic
from .adapters import Adapters
from .checkpointing import suspended
from .model import HostModel
from .options import Options
from .safety import sampling
from .seeds import step_generator


class Previews:
    """Draws ``options.sample_prompts``; leaves weights, random number generators and adapters as they were."""

    def __init__(
        self,
        host_model: HostModel,
        adapters: Adapters,
        options: Options,
        check: Callable[[], None],
        safety: Sequence[SafetyLora] = (),
    ):
        """``check`` is asked before every picture and may raise to interrupt."""
        self.host_model, self.adapters, self.options, self.check, self.safety = (
            host_model,
            adapters,
            options,
            check,
            safety,
        )

    @torch.no_grad()
    def __call__(self, step: int, saved: AbstractContextManager = nullcontext()) -> list[Path]:  # noqa: B008
        """One PNG a prompt, as of ``step``; inside ``saved`` the adapters are what will be saved."""
        devices = [self.host_model.device] if self.host_model.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            saved,
            suspended(self.host_model.unet),
            self.adapters.evaluating(),
            self.host_model.attached(self.safety),
        ):
            return [self._draw(step, i, prompt) for i, prompt in enumerate(self.options.sample_prompts)]

    def _draw(self, step: int, i: int, prompt: str) -> Path:
        self.check()
        host_model, options = self.host_model, self.options
        cond, empty = host_model.encode([prompt]), host_model.encode([""])
        size = (options.sample_size, options.sample_size)
        x_t = sampling.noise(host_model, size, [step_generator(options.seed, "sample", i)])
        walk = (host_model.predict, host_model.schedule, x_t, cond, empty, options.sample_cfg, options.sample_steps)
        picture = host_model.decode(sampling.sample(*walk))[0]  # h w 3
        return self._save(Image.fromarray((picture * 255).round().byte().numpy()), step, i)

    def _save(self, picture: Image.Image, step: int, i: int) -> Path:
        path = Path(self.options.output_dir) / "sample" / f"{self.options.output_name}_{step:06d}_{i:02d}.png"
        with atomic.replacing(path, parents=True) as part:
            picture.save(part, "PNG")
        return path
