"""Trainings on the demo world's narrow net by the pack's own trainers, and full fine-tuning on top of a safety LoRA.

What is trained on it pads to an ordinary kohya file at stock width (lorafile.py), and what is drawn later is read from
such a file, so that it is what ComfyUI would load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from modular_lora_guard.modular_lora.files.reader import LoraFile
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.modular_lora.guard.build import TRAINED_ON_KEY
from modular_lora_guard.training import model as host_models
from modular_lora_guard.training import options, output
from modular_lora_guard.training.data import batches, dataset
from modular_lora_guard.training.loop import Watch
from modular_lora_guard.training.safety import train as safety
from modular_lora_guard.training.task import denoising
from modular_lora_guard.training.task import train as task
from torch import Tensor

from .. import CHECKPOINT, base, data, layout, lorafile, narrow
from .protocol import PACK, RECIPE, Protocol

ENGINE = "the demo world's narrow net"
PROMPTS = activity.MOST_PROMPTS  # of a calibration, of either kind at most
NOISES = 2  # of each of them


class HostModel(narrow.NarrowHostModel):
    """The narrow net with what a task training asks for, on any device."""

    infos = None, None

    def __init__(self, model: base.Base, ae: torch.nn.Module, device: torch.device):
        super().__init__(model.to(device), host_models.Schedule, host_models.Cond)
        self.ae, self.device = ae.to(device), device

    def weights(self) -> dict:
        return {}

    def too_long(self, prompt: str) -> bool:
        return False

    def encode(self, prompts: Sequence[str]):
        cond = super().encode(prompts)
        moved = ((row.cross, row.further["bias"]) for row in cond.rows)
        cross, bias = (torch.cat(parts).to(self.device) for parts in zip(*moved, strict=True))
        return host_models.Cond.of(cross, bias=bias)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return self.ae.encode(images.movedim(-1, 1).to(self.device)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.ae.decode(latents).clamp(0, 1).movedim(1, -1).cpu()


def train_safety(host_model: HostModel, protocol: Protocol, recipe: str, seed: int, path: Path, watch: Watch) -> None:
    """A safety LoRA of a recipe, with the calibration of its activity, to ``path``."""
    attach(host_model)
    with tempfile.TemporaryDirectory() as folder:
        values = dict(protocol.said["safety"]) | dict(protocol.recipes[recipe]) | _named(folder, seed)
        made = options.load(options.SafetyOptions, RECIPE, values)
        trained = safety.train_safety(host_model, made, watch, engine=ENGINE, base_name=CHECKPOINT).lora
        tensors, uncalibrated = pad(host_model, trained), Path(folder) / "padded.safetensors"
        attach(host_model, output.write_tensors(uncalibrated, tensors, trained.metadata))
        found, kept = [*made.concept, *made.synonyms][:PROMPTS], list(made.preserve)[:PROMPTS]
        sides = [measured(host_model.model, prompts, seed) for prompts in (found, kept)]
    latent = host_model.latent_shape(data.SIZE, data.SIZE)
    said = activity.encode(activity.calibrate(host_model.base_sha256, 1.0, latent, seed, *sides))
    output.write_tensors(path, tensors, dict(trained.metadata) | {activity.KEY: said})
    attach(host_model)


def train_task(
    host_model: HostModel,
    protocol: Protocol,
    name: str,
    seed: int,
    path: Path,
    watch: Watch,
    under: LoraFile | None = None,
) -> None:
    """A task LoRA to ``path``: on W0, or sequential, on W0 + the safety LoRA ``under``."""
    attach(host_model, *([under] if under else []))
    with tempfile.TemporaryDirectory() as folder:
        made = task_options(protocol, name, folder, seed)
        trained = task.train_task(host_model, made, watch, engine=ENGINE, base_name=CHECKPOINT).lora
        said = {TRAINED_ON_KEY: f"base + {under.name} {under.sha256}"} if under else {}
        output.write_tensors(path, pad(host_model, trained), dict(trained.metadata) | said)
    attach(host_model)


def train_fully(host_model: HostModel, protocol: Protocol, name: str, seed: int, under: LoraFile, watch: Watch) -> None:
    """All weights of the U-Net on top of the safety LoRA ``under``, in place: the task training with a rate of its own.

    AdamW without decay, gradients' norm at most 1, the same images, captions and noise as the LoRA's.
    """
    attach(host_model, under)
    made = task_options(protocol, name, "unused", seed)
    fully(host_model, made, protocol.said["full"]["learning_rate"], watch)
    attach(host_model)


def fully(host_model: HostModel, made: options.TaskOptions, learning_rate: float, watch: Watch) -> None:
    """`train_fully`, by the options of a task training, on whatever is attached."""
    found = dataset.scan(config := task.configure(made), lambda done, total: watch.stage("reading images", done, total))
    plan = batches.Plan(config, found, made.seed, made.prior_loss_weight, made.max_train_steps, 1)
    latents, captions = denoising.Latents(host_model, found, watch), denoising.Captions(host_model)
    loss = denoising.Denoising(host_model, made, plan, latents, captions)
    parameters = list(host_model.unet.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(made.max_train_steps):
        watch.check()
        optimizer.zero_grad(set_to_none=True)
        value = loss.loss(step, 0)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
        watch.step(step + 1, made.max_train_steps, losses)
    optimizer.zero_grad(set_to_none=True)
    host_model.unet.requires_grad_(False)


def task_options(protocol: Protocol, name: str, folder: str, seed: int) -> options.TaskOptions:
    values = dict(protocol.said["task"]) | _named(folder, seed)
    return options.load(options.TaskOptions, None, values | {"train_data_dir": str(PACK / protocol.tasks[name])})


def _named(folder: str, seed: int) -> dict[str, Any]:
    return {"output_dir": folder, "output_name": "lora", "seed": seed}


def attach(host_model: HostModel, *files: LoraFile) -> None:
    """Let the net use exactly these files, unmerged."""
    unet = host_model.unet
    lorafile.attach(unet, *(lorafile.load(file.path, unet) for file in files))


def pad(host_model: HostModel, lora: LoraFile) -> dict[str, Tensor]:
    """A LoRA file that was trained on the narrow net, at stock width."""
    live, tensors = host_model.unet.out[0].num_channels, {}
    modules = {lorafile.kohya_name(name): name for name in lorafile.targets(host_model.unet)}
    for name, layer in lora.plain.items():
        down, up = layout.pad_lora(modules[name], layer.down, layer.up, live)
        alpha = torch.tensor(layer.scale * len(down), dtype=down.dtype)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    return tensors


def measured(model: base.Base, prompts: Sequence[str], seed: int) -> list[list[float]]:
    """The activity of what is attached on every prompt, for NOISES noises, the same ones for every prompt."""
    noise = torch.randn(NOISES, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    texts = model.text([prompt for prompt in prompts for _ in range(NOISES)])
    found = activities(model, *texts, noise.repeat(len(prompts), 1, 1, 1))
    return found.reshape(len(prompts), NOISES).tolist()


@torch.no_grad()
def activities(
    model: base.Base, context: Tensor, bias: Tensor, noise: Tensor, of: lorafile.Factors | None = None
) -> Tensor:
    """Safety activity (branches/acted.py) of a LoRA that is attached, on noise (n 4 8 8), in fp64 (n).

    The mean over its layers of |z|² / |W0·x + b|², in the evaluation of a run's first step; all that is attached acts
    in it. In ComfyUI a text is 77 tokens, of which the narrow net sees the last, repeated one once, with the log of its
    count added to the attention's logits: in the layers that take the text it counts so many times here.

    Args:
        context: Of the prompts (n l 768), as `text.TextTable` makes it; ``bias`` (n l) as well.
        of: Whose z it is, where several are attached; None: of everything that is.
    """
    ratios, hooks = [], []

    def heard(name: str, own: Sequence[tuple[Tensor, Tensor, float]]):
        def hook(layer, inputs, output):
            (x,) = inputs
            z, every = (sum(s * (x @ down.T) @ up.T for down, up, s in some) for some in (own, layer.adapters))
            weights = bias.exp() if name.endswith(("attn2.to_k", "attn2.to_v")) else torch.ones(x.shape[:2])
            energy = [(part.double().square().sum(-1) * weights).sum(1) for part in (z, output - every)]
            ratios.append(energy[0] / energy[1])

        return hook

    for name, layer in lorafile.targets(model.unet).items():
        own = layer.adapters if of is None else [of[name]] if name in of else []
        if own:
            hooks.append(layer.register_forward_hook(heard(name, own)))
    try:
        model.unet(noise, torch.full((len(noise),), 999), context, bias)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(ratios).mean(0)
