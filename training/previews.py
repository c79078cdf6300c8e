"""Previews of a training: the sample prompts with the safety LoRA and without it, from the same fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.util import atomic
from .adapters import Adapters
from .checkpointing import suspended
from .model import HostModel
from .options import Options, SafetyOptions
from .safety import sampling
from .seeds import step_generator


class Drawn(NamedTuple):
    """Previews of one step, one PNG a prompt."""

    shown: list[Path]  # with the safety LoRA, where there is one
    without: list[Path]  # the same prompts without it; empty where there is none, and where they have been drawn before


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
        """``check`` is asked before every image and may raise to interrupt.

        ``safety``: what a task LoRA is seen with. A safety LoRA in training is seen beside the plain base (its adapters
        off), which is drawn once.
        """
        self.host_model, self.adapters, self.options, self.check, self.safety = (
            host_model,
            adapters,
            options,
            check,
            safety,
        )
        self._base_drawn = False

    @torch.no_grad()
    def __call__(self, step: int, saved: AbstractContextManager = nullcontext()) -> Drawn:  # noqa: B008
        """As of ``step``; inside ``saved`` the adapters are what will be saved."""
        devices = [self.host_model.device] if self.host_model.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            saved,
            suspended(self.host_model.unet),
            self.adapters.evaluating(),
        ):
            with self.host_model.attached(self.safety):
                shown = self._all(f"{step:06d}")
            return Drawn(shown, self._without(step))

    def _without(self, step: int) -> list[Path]:
        if self.safety:
            return self._all(f"{step:06d}_without")
        if not isinstance(self.options, SafetyOptions) or self._base_drawn:
            return []
        with self.adapters.off():
            drawn = self._all("without")
        self._base_drawn = True
        return drawn

    def _all(self, name: str) -> list[Path]:
        return [self._draw(name, i, prompt) for i, prompt in enumerate(self.options.sample_prompts)]

    def _draw(self, name: str, i: int, prompt: str) -> Path:
        self.check()
        host_model, options = self.host_model, self.options
        cond, empty = host_model.encode([prompt]), host_model.encode([""])
        size = (options.sample_size, options.sample_size)
        x_t = sampling.noise(host_model, size, [step_generator(options.seed, "sample", i)])
        walk = (host_model.predict, host_model.schedule, x_t, cond, empty, options.sample_cfg, options.sample_steps)
        image = host_model.decode(sampling.sample(*walk))[0]  # h w 3
        return self._save(Image.fromarray((image * 255).round().byte().numpy()), name, i)

    def _save(self, image: Image.Image, name: str, i: int) -> Path:
        path = Path(self.options.output_dir) / "sample" / f"{self.options.output_name}_{name}_{i:02d}.png"
        with atomic.replacing(path, parents=True) as part:
            image.save(part, "PNG")
        return path
