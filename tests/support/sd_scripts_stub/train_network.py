"""A training script that honours the ``--network_module`` contract, step for step in sd-scripts' order."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from library import models, train_util
from tqdm import tqdm


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    train_util.add_common_arguments(parser)
    for name in ("dataset_config", "sample_prompts"):
        parser.add_argument(f"--{name}")
    for name in ("noise_offset", "prior_loss_weight", "max_data_loader_n_workers", "sample_every_n_steps"):
        parser.add_argument(f"--{name}", type=float)
    switches = "cache_latents no_half_vae network_train_unet_only masked_loss save_state save_state_on_train_end "
    switches += "skip_until_initial_step"
    for name in switches.split():
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def make_network(args: argparse.Namespace, text_encoder, unet):
    module = importlib.import_module(args.network_module)
    for file in args.base_weights or ():
        module.create_network_from_weights(1, file, None, text_encoder, unet, for_inference=True)
    rank, kwargs = int(args.network_dim or 4), train_util.network_kwargs(args)
    network = module.create_network(
        1.0, rank, args.network_alpha, None, text_encoder, unet, neuron_dropout=None, **kwargs
    )
    if hasattr(network, "prepare_network"):
        network.prepare_network(args)
    network.apply_to(text_encoder, unet, not args.network_train_unet_only, True)
    if args.network_weights:
        network.load_weights(args.network_weights)
    return network


def metadata(args: argparse.Namespace, step: int) -> dict[str, str]:
    private = {"ss_tag_frequency": '{"1_secret": {"secret": 1}}', "ss_output_name": args.output_name}
    found = private | {"ss_steps": str(step), "ss_network_module": args.network_module, "ss_datasets": "[secret]"}
    return found | {"ss_network_args": json.dumps(train_util.network_kwargs(args)), "modelspec.title": args.output_name}


def train(args: argparse.Namespace) -> None:
    seed = int(args.seed)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    text_encoder, unet = models.load(args.pretrained_model_name_or_path)
    network = make_network(args, text_encoder, unet)
    groups, _ = network.prepare_optimizer_params(None, None, args.learning_rate)
    optimizer = torch.optim.AdamW(groups)
    network, optimizer = accelerator.prepare(network, optimizer)
    accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)
    done = {"step": 0}  # sd-scripts' current_step: steps that were done when the one in hand began

    def count(models, weights, folder):  # it is saved at the end of a step, so plus one
        Path(folder, "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": done["step"] + 1}))

    accelerator.register_save_state_pre_hook(count)
    first = 1
    if args.resume:
        accelerator.load_state(args.resume)
        first += json.loads(Path(args.resume, "train_state.json").read_text())["current_step"]
    steps = int(args.max_train_steps)
    for i in tqdm(range(3), desc="caching"):
        sys.stdout.write(f"picture {i}\n")
    bar = tqdm(range(steps - first + 1), desc="steps")
    accelerator.unwrap_model(network).on_epoch_start(text_encoder, unet)
    for step in range(first, steps + 1):
        done["step"] = step - 1
        accelerator.unwrap_model(network).on_step_start(text_encoder, unet)
        x, eps = torch.randn(2, 1, 4, 8, 8)
        shift = random.random() + np.random.rand()
        loss = (unet(x + shift * eps, text_encoder(f"picture {step}")) - eps).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(accelerator.unwrap_model(network).get_trainable_params(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.update(1)
        train_util.sample_images(args, step, (text_encoder, unet))
        bar.set_postfix(avr_loss=loss.item())
        if args.save_every_n_steps and step % args.save_every_n_steps == 0:
            save(args, accelerator, network, step, train_util.output_file(args, step))
            if args.save_state:
                accelerator.save_state(os.path.join(args.output_dir, f"{args.output_name}-step{step:08d}-state"))
        train_util.pause(args, step)
    if args.save_state or args.save_state_on_train_end:
        accelerator.save_state(os.path.join(args.output_dir, f"{args.output_name}-state"))
    save(args, accelerator, network, steps, train_util.output_file(args))
    if args.stub_truncate:
        path = Path(train_util.output_file(args))
        path.write_bytes(path.read_bytes()[:-100])


def save(args: argparse.Namespace, accelerator: Accelerator, network, step: int, file: str) -> None:
    accelerator.unwrap_model(network).save_weights(file, train_util.save_dtype(args), metadata(args, step))


if __name__ == "__main__":
    train(setup_parser().parse_args())
