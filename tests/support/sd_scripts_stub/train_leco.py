"""An erasure script with the arguments of sd-scripts' own, whose loss is a stand-in."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from library import models, train_util
from tqdm import tqdm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    train_util.add_common_arguments(parser)
    parser.add_argument("--prompts_file", required=True)
    parser.add_argument("--max_denoising_steps", type=int, default=40)
    parser.add_argument("--leco_denoise_guidance_scale", type=float, default=3.0)
    return parser


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(int(args.seed))
    accelerator = Accelerator(cpu=True)
    text_encoder, unet = models.load(args.pretrained_model_name_or_path)
    prompts = tomllib.loads(Path(args.prompts_file).read_text(encoding="utf-8"))["prompts"]
    module, kwargs = importlib.import_module(args.network_module), train_util.network_kwargs(args)
    network = module.create_network(
        1.0, int(args.network_dim), args.network_alpha, None, text_encoder, unet, neuron_dropout=None, **kwargs
    )
    network.apply_to(text_encoder, unet, apply_text_encoder=False, apply_unet=True)
    if args.network_weights:
        network.load_weights(args.network_weights)
    groups, _ = network.prepare_optimizer_params(None, args.unet_lr, args.learning_rate)
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(groups))
    accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)
    bar = tqdm(total=int(args.max_train_steps), desc="steps")
    for step in range(1, int(args.max_train_steps) + 1):
        entry = prompts[step % len(prompts)]
        x = torch.randn(1, 4, 8, 8)
        loss = (
            (unet(x, text_encoder(entry["target"])) - unet(x, text_encoder(entry["neutral"])).detach()).square().mean()
        )
        accelerator.backward(loss * entry["weight"] + sum(p.square().sum() for p in network.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        bar.update(1)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        train_util.pause(args, step)
    found = {"ss_leco_prompt_count": str(len(prompts)), "ss_network_module": args.network_module}
    accelerator.unwrap_model(network).save_weights(train_util.output_file(args), train_util.save_dtype(args), found)


if __name__ == "__main__":
    train(setup_parser().parse_args())
