"""The paper's table on the demo world: trains the LoRAs that are missing, audits them, writes the figures.

    python3 run.py evidence [--cpu] [--engine processes --workers N]    writes docs/figures/evidence_unpreserved.json

safety:      W0 + ΔW_safe, from prompts alone.
task:        the gloss style on W0, as Modular LoRA has it (arXiv 2412.00357).
sequential:  the same training on W0 + ΔW_safe, the practice that the paper warns of.
Trainings are in evidence.toml (the safety recipe's prompts in recipes/safety.toml), the audit is in audit.toml.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ...audit import cli as audit
from ...modular_lora import options as optionfile
from ...modular_lora.command import finish, typed
from ...modular_lora.errors import writing
from ...modular_lora.files.reader import LoraFile, read_lora
from ...modular_lora.guard.build import TRAINED_ON_KEY, SafetyLora
from ...modular_lora.util import plain_json
from ...modular_lora.util.terminal import open_to_all
from ...training.cli import TrainingLines, comfy_host
from ...training.options import SafetyOptions, TaskOptions
from ...training.output import write_tensors
from ...training.safety.train import train_safety
from ...training.task.train import train_task
from . import ASSETS, CHECKPOINT

PACK = Path(__file__).resolve().parents[2]
PROTOCOL, AUDIT = PACK / "tools" / "world" / "evidence.toml", PACK / "tools" / "world" / "audit.toml"
FIGURES = PACK / "docs" / "figures" / "evidence_unpreserved.json"
LORAS = ASSETS / "evidence"
ROLES = ("safety", "task", "sequential")
logger = logging.getLogger("modular_lora")


def file_of(role: str, seed: int, folder: Path = LORAS) -> Path:
    return folder / f"{role}_{seed}.safetensors"


def settings(protocol: dict, role: str, seed: int, folder: Path):
    """SafetyOptions or TaskOptions of one training."""
    common = {"output_dir": str(folder), "output_name": file_of(role, seed).stem, "seed": seed}
    if role == "safety":
        recipe = PACK / "tools" / "world" / "recipes" / "safety.toml"
        return optionfile.load(SafetyOptions, recipe, protocol["safety"] | common)
    values = protocol["task"] | common
    values["train_data_dir"] = str(PACK / values["train_data_dir"])
    return optionfile.load(TaskOptions, None, values)


def missing(protocol: dict, folder: Path = LORAS) -> list[tuple[str, int]]:
    """(role, seed) of the LoRAs that are not there; safety LoRAs before what is trained on top of them."""
    wanted = [(role, seed) for role in ROLES for seed in protocol["training_seeds"]]
    return [(role, seed) for role, seed in wanted if not file_of(role, seed, folder).exists()]


def train(
    protocol: dict, role: str, seed: int, open_host_model: Callable, watch, engine: str, folder: Path = LORAS
) -> Path:
    """One LoRA, whole or not at all; ``open_host_model(options)`` gives a context with a host model."""
    under = _safety_loras(seed, folder) if role == "sequential" else []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = settings(protocol, role, seed, Path(temporary))
        with open_host_model(made) as host_model, host_model.attached(under) if under else nullcontext():
            run = train_safety if role == "safety" else train_task
            logger.info("%s", run(host_model, made, watch, engine=engine, base_name=CHECKPOINT).report)
        if under:
            _say_so(file_of(role, seed, Path(temporary)), under[0].lora)
        os.replace(file_of(role, seed, Path(temporary)), file_of(role, seed, folder))
    return file_of(role, seed, folder)


def _safety_loras(seed: int, folder: Path) -> list[SafetyLora]:
    return [SafetyLora(read_lora(file_of("safety", seed, folder)), 1.0)]


def _say_so(path: Path, safety: LoraFile) -> None:
    """The counter-example says in its metadata what was in the forward while it was trained."""
    what = {TRAINED_ON_KEY: f"base + {safety.name} {safety.sha256}"}
    write_tensors(path, load_file(path), dict(read_lora(path).metadata) | what)


def parser() -> argparse.ArgumentParser:
    """Options of the trainings and of where things go; others are the audit's."""
    made = argparse.ArgumentParser(prog=typed("tools.world"), description=__doc__.splitlines()[0])
    made.add_argument("--protocol", type=Path, default=PROTOCOL, help="TOML of training seeds and trainings")
    made.add_argument("--checkpoint", type=Path, default=PACK / ".run" / "world" / CHECKPOINT)
    made.add_argument("--comfyui", type=Path, help="folder of ComfyUI")
    made.add_argument("--cpu", action="store_true", help="train and draw on the CPU")
    made.add_argument("--loras", type=Path, default=LORAS, help="folder of the LoRAs; what is missing is trained")
    made.add_argument("--training-seeds", type=int, nargs="+", help="for a part of the work")
    made.add_argument("--output_dir", type=Path, default=PACK / "demo_output" / "evidence", help="of the audit")
    made.add_argument("--figures", type=Path, default=FIGURES, help="file of the figures")
    made.add_argument("--train-only", action="store_true", help="stop before the audit")
    return made


def main(arguments: Sequence[str]) -> int:
    open_to_all()
    chosen, more = parser().parse_known_args(arguments)
    protocol: dict[str, Any] = {}
    code = finish(lambda: _train_all(protocol, chosen), "the same command goes on from here")
    return code if code or chosen.train_only else _audit(protocol, chosen, more)


def _train_all(protocol: dict, chosen: argparse.Namespace) -> str:
    """Read the protocol and train what is missing; what there is to say of it."""
    protocol |= optionfile.parse(chosen.protocol)
    if chosen.training_seeds:
        protocol["training_seeds"] = chosen.training_seeds
    todo = missing(protocol, chosen.loras)
    host = comfy_host(vars(chosen)) if todo else None  # brings ComfyUI

    def open_host_model(made):
        return host.opened(*host.load_checkpoint(chosen.checkpoint, None, made.mixed_precision), made)

    for role, seed in todo:
        logger.info("%s, training seed %d", role, seed)
        train(protocol, role, seed, open_host_model, TrainingLines(), host.ENGINE, chosen.loras)
    return f"{len(todo)} LoRAs trained; all are in {chosen.loras}"


def _audit(protocol: dict, chosen: argparse.Namespace, more: list[str]) -> int:
    where = ["--comfyui", str(chosen.comfyui)] if chosen.comfyui else []
    where += ["--cpu"] if chosen.cpu else []
    for role in ROLES:
        where += [f"--{role}", *(str(file_of(role, seed, chosen.loras)) for seed in protocol["training_seeds"])]
    run = ["run", "--checkpoint", str(chosen.checkpoint), "--config", str(AUDIT), *where, *more]
    run += ["--output_dir", str(chosen.output_dir)]
    if code := audit.main(run):
        return code
    found = json.loads((chosen.output_dir / "evidence.json").read_text(encoding="utf-8"))
    said = ["python3", "run.py", "evidence", *(["--cpu"] if chosen.cpu else []), *more]  # no paths of this machine
    write_figures(chosen.figures, found, chosen.protocol, protocol["training_seeds"], shlex.join(said))
    return 0


def write_figures(path: Path, found: dict[str, Any], protocol: Path, seeds: Sequence[int], command: str) -> None:
    """The audit's figures with the protocol's hash and the training seeds."""
    written = [protocol, AUDIT, PACK / "tools" / "world" / "recipes" / "safety.toml"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in written)).hexdigest()
    found |= {"command": command, "protocol_sha256": digest, "training_seeds": list(seeds)}
    with writing(path):
        plain_json.write(found, path)
