"""Holds the kohya engine against a real checkout of sd-scripts: what its parsers take, and what its layers are called.

    python -m tools.benchmarks.kohya CHECKOUT --comfyui COMFYUI [--python PYTHON] [--record]

For every family of the engine the checkout's own script is imported by its own interpreter, its parser reads the
arguments that the engine sends with nearly all options set, its denoiser is made without weights, and our network
module is put on it: every layer's name, numbers aside, must be one that ComfyUI loads for that family. Nothing is
trained.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from modular_lora_guard.training import cli
from modular_lora_guard.training.kohya import arguments, checkout
from modular_lora_guard.training.options import TaskOptions

from .bench import finish, parser
from .figures import ROOT

PLAIN = {  # every option that the engine sends and that can be set beside the others
    "network_dim": 4, "network_alpha": 2.0, "optimizer_args": ("weight_decay=0.01",), "lr_scheduler": "polynomial",
    "lr_warmup_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    "mixed_precision": "bf16", "min_snr_gamma": 5.0, "save_every_n_steps": 5, "sample_every_n_steps": 5,
    "sample_prompts": ("a",), "max_token_length": 225, "clip_skip": 2, "log_with": "tensorboard",
    "training_comment": "a comment", "network_dropout": 0.1, "noise_offset": 0.05, "prior_loss_weight": 0.5,
    "network_weights": "start.safetensors", "train_data_dir": "pictures",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__, "kohya.json")
    made.add_argument("checkout", type=Path)
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--python", default="", help="interpreter that sd-scripts runs with")
    made.add_argument("--families", nargs="+", default=list(arguments.FAMILIES), choices=tuple(arguments.FAMILIES))
    chosen = made.parse_args()
    engine = checkout.find_engine(str(chosen.checkout), chosen.python)
    cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True})
    named = _named(engine, {name: _sent(engine, name) for name in chosen.families})
    rows = {f"{name}, {engine}": _row(name, found) for name, found in named.items()}
    finish(rows, "kohya.json", "python -m tools.benchmarks.kohya CHECKOUT --comfyui COMFYUI --record", chosen.record)


def _sent(engine: checkout.Engine, name: str) -> list[str]:
    """The script of a family and the arguments that it is started with."""
    family = arguments.FAMILIES[name]
    parts = {part: f"{part}.safetensors" for part, _ in family.parts}
    files = {"dataset_config": "data.toml", "prompts": "prompts.json", "parts": parts}
    run = arguments.Run(Path("base.safetensors"), family, str(engine), "0", **files)
    options = TaskOptions(**PLAIN, fp8_base_unet=family.eight_bits, blocks_to_swap=4 if family.flow else 0)
    return [str(engine.script(family.script)), *arguments.task_arguments(options, run, (), ())]


def _named(engine: checkout.Engine, sent: dict[str, list[str]]) -> dict[str, list[str] | str]:
    """What `kohya_child` found, by family: its layers' names, or what was wrong; RuntimeError where it failed."""
    child = [engine.python, str(Path(__file__).with_name("kohya_child.py"))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        child, cwd=engine.checkout, env=environment, input=json.dumps(sent), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, found: list[str] | str) -> dict[str, object]:
    if isinstance(found, str):
        return {"result": f"arguments refused: {found}"}
    return {"result": f"arguments accepted, {len(found)} layers, {_compared(name, found)}"}


def _compared(name: str, names: list[str]) -> str:
    """Whether every layer's name, numbers aside, is one that ComfyUI loads for a toy of the family."""
    sys.path.append(str(ROOT / "tests"))
    from support import families, families_dit, families_image, families_video

    toys = (*families_image.IMAGE, *families_dit.DITS, *families_video.VIDEOS)
    toy = next((toy for toy in toys if toy.config == name), None)
    if toy is None:
        return "their names not compared: this ComfyUI has no such model"
    introspection = importlib.import_module("modular_lora_guard.comfy_host.introspection")
    loaded = {_form(known) for known in introspection.model_info(families.make(toy, filled=False)).key_map}
    strange = sorted({_form(one) for one in names} - loaded)
    return f"NOT ComfyUI's names: {', '.join(strange[:3])}" if strange else "all of them ComfyUI's names"


def _form(name: str) -> str:
    return re.sub(r"\d+", "N", name)


if __name__ == "__main__":
    main()
