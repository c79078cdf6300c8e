"""The programs whose steps ``tools.benchmarks.training`` counts, each a process of its own; one line for every step.

    python -m tools.benchmarks.training_programs PROGRAM --checkpoint FILE --comfyui COMFYUI --data TOML --steps N

| PROGRAM | a step of it |
|---|---|
| ours | `train_task`, as the command and the node call it |
| comfyui | `TrainLoraNode.execute` of the installed ComfyUI, without gradient checkpointing |
| bare | forward and backward of ComfyUI's own network, no weight of which is trained, down to x_t: nothing else |
| bare-products | the same, small 3×3 convolutions done as products of matrices, as in a training of ours |

All of them have the same U-Net, the same precision, latents 32×32 and batch 1. Beside these there is sd-scripts' own
script, and `checkpoint`, which writes the file that all of them load.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from modular_lora_guard.training import cli, options
from modular_lora_guard.training.task import train as task
from safetensors.torch import save_file
from torch import Tensor, nn

from .bench import Silent

BEGUN, STEP = "begun", "step"  # first words of the lines that are counted
RANK, RATE, PIXELS, IMAGES = 8, 1e-4, 256, 4


def said(*words: object) -> None:
    sys.stdout.write("\n" + " ".join(map(str, words)) + "\n")  # a bar may be on the line
    sys.stdout.flush()


class Steps(Silent):
    """A watch of a training that says when its latents are there, and every step."""

    def stage(self, text: str, done: int, total: int) -> None:
        if text == "caching latents" and done == total:
            said(BEGUN)

    def step(self, step: int, total: int, losses: list[float]) -> None:
        said(STEP, step)


def ours(chosen: argparse.Namespace, host) -> None:
    with tempfile.TemporaryDirectory() as folder:
        values = {"output_dir": folder, "dataset_config": str(chosen.data), "mixed_precision": chosen.precision}
        values |= {"network_dim": RANK, "network_alpha": float(RANK), "learning_rate": RATE}
        made = options.TaskOptions(**values, lr_scheduler="constant", max_train_steps=chosen.steps)
        loaded = host.load_checkpoint(chosen.checkpoint, None, made.mixed_precision)
        opened = host.opened(*loaded, made)
        del loaded  # as in the command: the trainer may let go of what it does not need
        with opened as host_model:
            task.train_task(host_model, made, Steps(), engine="benchmark")


def comfyui(chosen: argparse.Namespace, host) -> None:
    trainer = importlib.import_module("comfy_extras.nodes_train")
    model, clip, _ = host.load_checkpoint(chosen.checkpoint, None, chosen.precision)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("thing number 0"))
    of_step = trainer.TrainSampler.fwd_bwd
    done = iter(range(chosen.steps + 1))
    next(done)

    def counted(self, *args, **kwargs):
        loss = of_step(self, *args, **kwargs)
        said(STEP, next(done))  # the optimizer's step of 0.03 s falls into the next one
        return loss

    trainer.TrainSampler.fwd_bwd = counted
    words = {"no": "fp32", "bf16": "bf16"}[chosen.precision]
    values = {"batch_size": 1, "grad_accumulation_steps": 1, "steps": chosen.steps, "learning_rate": RATE}
    values |= {"rank": RANK, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": words}
    values |= {"lora_dtype": "fp32", "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]"}
    latents = [{"samples": _latents()}] * IMAGES  # it fails on a single one
    said(BEGUN)
    trainer.TrainLoraNode.execute(
        [model], latents, [positive] * IMAGES, **{name: [value] for name, value in values.items()}
    )


def bare(chosen: argparse.Namespace, host, products: bool = False) -> None:
    conditions, convolutions = (_host_module(name) for name in ("conditions", "convolutions"))
    model, _, _ = host.load_checkpoint(chosen.checkpoint, None, chosen.precision)
    importlib.import_module("comfy.model_management").load_models_gpu([model], force_full_load=True)
    network: nn.Module = model.model.diffusion_model.requires_grad_(False)
    dtype = host.DTYPES[chosen.precision]
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, 77, 768, generator=generator, dtype=dtype)
    told = conditions.transformer_options(torch.ones(1))
    said(BEGUN)
    with convolutions.small_as_products(network, products):
        for step in range(chosen.steps):
            x = torch.randn(_latents().shape, generator=generator, dtype=dtype).requires_grad_()
            y = network(x, torch.full((1,), 500.0), context=context, transformer_options=told)
            y.float().square().mean().backward()
            said(STEP, step + 1)


def checkpoint(chosen: argparse.Namespace, host) -> None:
    """SD1.5's layout at full width, random weights in fp16, of ComfyUI's own classes."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.sd1_clip import SDClipModel

    from . import speed_models

    world = speed_models.open_world("sd15", torch.float32, chosen.comfyui, True, chosen.checkpoint.parent)
    form = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    form |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    others: dict[str, nn.Module] = {
        "first_stage_model.": AutoencoderKL(ddconfig=form, embed_dim=4),
        "cond_stage_model.transformer.text_model.": SDClipModel(
            device="cpu", dtype=torch.float32
        ).transformer.text_model,
    }
    for part in others.values():
        speed_models.fill(part)
    parts = {"model.diffusion_model.": world.unet} | others
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, chosen.checkpoint)


def _latents() -> Tensor:
    """The latents of one image."""
    return torch.randn(1, 4, PIXELS // 8, PIXELS // 8, generator=torch.Generator().manual_seed(0))


def _host_module(name: str):
    return importlib.import_module(f"modular_lora_guard.comfy_host.{name}")


PROGRAMS: dict[str, Callable] = {
    "ours": ours,
    "comfyui": comfyui,
    "bare": bare,
    "bare-products": lambda chosen, host: bare(chosen, host, True),
    "checkpoint": checkpoint,
}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("program", choices=tuple(PROGRAMS))
    made.add_argument("--checkpoint", type=Path, required=True)
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--data", type=Path, help="data set of the training, a TOML")
    made.add_argument("--precision", choices=("no", "bf16"), default="no")
    made.add_argument("--steps", type=int, default=4)
    chosen = made.parse_args()
    PROGRAMS[chosen.program](chosen, cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True}))


if __name__ == "__main__":
    main()
