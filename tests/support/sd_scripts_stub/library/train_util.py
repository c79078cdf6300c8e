"""The arguments that all scripts share, and the drawing of one preview."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TEXTS = (
    "pretrained_model_name_or_path output_dir output_name optimizer_type lr_scheduler mixed_precision save_precision "
    "save_model_as network_module network_weights resume training_comment tokenizer_cache_dir log_with logging_dir "
    "config_file"
)
NUMBERS = (
    "learning_rate max_train_steps max_grad_norm seed network_dim network_alpha network_dropout min_snr_gamma "
    "lr_warmup_steps gradient_accumulation_steps save_every_n_steps clip_skip max_token_length unet_lr text_encoder_lr "
    "lr_scheduler_num_cycles lr_scheduler_power stub_sleep stub_fail_at"
)
SWITCHES = "sdpa gradient_checkpointing v2 v_parameterization stub_truncate"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    for name in TEXTS.split():
        parser.add_argument(f"--{name}")
    for name in NUMBERS.split():
        parser.add_argument(f"--{name}", type=float)
    for name in SWITCHES.split():
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("network_args", "optimizer_args", "base_weights"):
        parser.add_argument(f"--{name}", nargs="*")


def network_kwargs(args: argparse.Namespace) -> dict[str, str | None]:
    return {"dropout": None} | dict(text.split("=", 1) for text in args.network_args or ())


def save_dtype(args: argparse.Namespace) -> torch.dtype | None:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.save_precision)


def output_file(args: argparse.Namespace, step: int | None = None) -> str:
    name = args.output_name if step is None else f"{args.output_name}-step{step:08d}"
    return str(Path(args.output_dir) / f"{name}.safetensors")


def pause(args: argparse.Namespace, step: int) -> None:
    """What tests ask for: slow steps, a failure."""
    time.sleep(args.stub_sleep or 0)
    if args.stub_fail_at == step:
        raise RuntimeError(f"stub failure at step {step}: the device is on fire")


def sample_images(args: argparse.Namespace, step: int, pipeline) -> None:
    if not args.sample_every_n_steps or step % args.sample_every_n_steps:
        return
    folder = Path(args.output_dir) / "sample"
    folder.mkdir(exist_ok=True)
    for i, prompt in enumerate(json.loads(Path(args.sample_prompts).read_text(encoding="utf-8"))):
        sample_image_inference(None, args, pipeline, str(folder), prompt | {"enum": i}, None, step, None)


def sample_image_inference(
    accelerator, args, pipeline, save_dir, prompt_dict, epoch, steps, prompt_replacement, controlnet=None
) -> None:
    """Draws from every generator there is, as a sampler might, and writes what the U-Net makes of it."""
    text_encoder, unet = pipeline
    torch.manual_seed(prompt_dict["seed"])
    random.seed(0), np.random.seed(0)
    with torch.no_grad():
        x = unet(torch.randn(1, 4, 8, 8), text_encoder(prompt_dict["prompt"]))
    image = (x[0, :3].sigmoid() * 255).byte().permute(1, 2, 0).numpy()
    name = f"{args.output_name}_{steps:06d}_{prompt_dict['enum']:02d}_{prompt_dict['seed']}.png"
    Image.fromarray(image).save(Path(save_dir) / name)
