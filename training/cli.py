"""The command line: training, data sets and LoRA files, options as in sd-scripts.

Every option can stand in a TOML file as well (--config), under the same name; the command line goes first.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import torch

from ..comfy_host.standalone import start
from ..modular_lora.command import Lines, finish, typed
from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard import activity, concept
from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.places import check_writable
from ..modular_lora.util.terminal import open_to_all
from . import choices, inspection, options, output, presets, projection
from .convert.convert import convert
from .convert.difference import LIMIT, ConvertOptions
from .data import captions, dataset
from .kohya import engine as kohya
from .kohya.arguments import FAMILIES
from .kohya.checkout import find_engine
from .options import OptionError, SafetyOptions, TaskOptions
from .pace import Pace, curve
from .safety.closed import make as closed
from .safety.closed.combine import combine_safety as combined
from .safety.closed.options import CombineOptions, MakeOptions
from .safety.train import prepare as prepare_safety
from .safety.train import train_safety
from .task.train import configure, train_task
from .task.train import prepare as prepare_task

FILES = ("checkpoint", "text_encoder", "clip_type", "vae")  # of the model
OWN = ("command", "config", *FILES, "comfyui", "cpu", "threads", "extra")
KOHYA = ("engine", "sd_scripts", "sd_scripts_python", "accelerate_config", "family", "v_prediction", "tokenizer")
MEMORY = {"fp8_base", "cpu_offload_checkpointing"}  # sd-scripts' options for it that are its own
SECONDS = 30.0  # without a line, at most, where a step does not take longer
logger = logging.getLogger("modular_lora")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, or 1 with one line that says what is wrong and what to do."""
    open_to_all()
    made = parser()
    parsed, extra = made.parse_known_args(arguments)
    engine = getattr(parsed, "engine", "")
    if extra and engine != "kohya" and not (engine and _name(extra[0]) in MEMORY):
        made.error(f"unknown option {extra[0]}")
    chosen = vars(parsed) | {"extra": extra}
    command = {
        "project": project,
        "inspect": inspect,
        "concept-prompts": concept_prompts,
        "calibrate-safety": calibrate_safety,
        "make-safety": make_safety,
        "combine-safety": combine_safety,
        "convert-safety": convert_safety,
    }.get(chosen["command"], with_options)
    return finish(lambda: command(chosen), "where a step was done, the line above names the state to resume from")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=typed("training"), description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name, cls, help in (
        ("train-task", TaskOptions, "a task LoRA from captioned images, on W0, the safety LoRA frozen and detached"),
        ("train-safety", SafetyOptions, "a safety LoRA that erases a concept given by prompts"),
        ("dataset", TaskOptions, "look through a data set and say what is wrong with it"),
    ):
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.add_argument("--config", type=Path, metavar="TOML", help="options in a file, under the same names")
        if name != "dataset":
            _model_arguments(command, required=True)
            command.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's own choice)")
            _kohya_arguments(command)
        options.add_arguments(command, cls)
    command = commands.add_parser(
        "make-safety", help="a safety LoRA made of words in closed form, without training", allow_abbrev=False
    )
    command.add_argument("--config", type=Path, metavar="TOML", help="options in a file, under the same names")
    _model_arguments(command, required=True)
    command.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's own choice)")
    options.add_arguments(command, MakeOptions)
    command = commands.add_parser(
        "combine-safety", help="several safety LoRAs as one file, each on its own concept only", allow_abbrev=False
    )
    command.add_argument("safety", type=Path, nargs="+")
    command.add_argument("--config", type=Path, metavar="TOML", help="options in a file, under the same names")
    _model_arguments(command, required=True)
    command.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's own choice)")
    command.add_argument(
        "--concept",
        action="append",
        nargs="*",
        default=[],
        metavar="TEXT",
        help="prompts of the concept, once for each file in its order; without any: those in that file",
    )
    command.add_argument(
        "--strength", action="append", type=float, default=[], metavar="NUMBER", help="once for each file (1)"
    )
    options.add_arguments(command, CombineOptions)
    command = commands.add_parser("project", help="keep an existing task LoRA clear of a safety LoRA")
    command.add_argument("task", type=Path)
    command.add_argument("safety", type=Path, nargs="+")
    command.add_argument("--output", type=Path, required=True, help="the new LoRA file")
    command.add_argument(
        "--save_precision", choices=typing.get_args(choices.SavePrecision), help="type to save in (the file's own)"
    )
    command.add_argument(
        "--sides",
        choices=typing.get_args(choices.Sides),
        default="input",
        help="what is kept clear of the safety LoRA: the inputs that it reacts to, the outputs that it writes, or both "
        "(input)",
    )
    _model_arguments(command, required=False)
    _convert_arguments(commands)
    command = commands.add_parser("concept-prompts", help="write what a safety LoRA is for into a copy of its file")
    command.add_argument("safety", type=Path)
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a concept prompt; once for each"
    )
    command.add_argument(
        "--prompts_file", type=Path, metavar="TXT", help="UTF-8 text with a concept prompt on each line"
    )
    command.add_argument("--output", type=Path, required=True, help="the new LoRA file; no file is written over")
    command = commands.add_parser("calibrate-safety", help="measure a safety LoRA's activity, into a copy of its file")
    command.add_argument("safety", type=Path)
    _model_arguments(command, required=True)
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a concept prompt (those in the file)"
    )
    command.add_argument(
        "--preserve", action="append", default=[], metavar="TEXT", help="a prompt that is to be kept; once for each"
    )
    command.add_argument("--prompts_file", type=Path, metavar="TXT", help="UTF-8 text with a concept prompt on a line")
    command.add_argument("--preserve_file", type=Path, metavar="TXT", help="the same of prompts that are to be kept")
    command.add_argument("--size", type=int, default=512, help="width and height in pixels (512)")
    command.add_argument("--noises", type=int, default=2, help="noises for each prompt (2)")
    command.add_argument("--seed", type=int, default=0, help="seed of the noises (0)")
    command.add_argument("--strength", type=float, default=1.0, help="strength of the safety LoRA (1)")
    command.add_argument("--output", type=Path, required=True, help="the new LoRA file; no file is written over")
    command = commands.add_parser("inspect", help="say what a LoRA file is")
    command.add_argument("lora", type=Path)
    return made


def _convert_arguments(commands) -> None:
    command = commands.add_parser(
        "convert-safety",
        help="a safety LoRA from weights that a concept eraser published (ESD, UCE, SPEED, a .pt slider, ...)",
        description="A safety LoRA from weights that a concept eraser published: weights minus W0, as factors, with "
        "the proof. A LoRA in PyTorch's own format is saved again as safetensors and needs no base.",
        allow_abbrev=False,
    )
    command.add_argument("weights", type=Path, help="file (.safetensors, .pt, .bin, ...) or diffusers folder")
    command.add_argument("--base", type=Path, help="W0, which the eraser started from: checkpoint or diffusers folder")
    command.add_argument("--output", type=Path, required=True, help="the new LoRA file; no file is written over")
    command.add_argument("--base_sha256", default="", help="SHA-256 that the base must have")
    command.add_argument("--rank", type=int, default=0, help="largest rank of a layer (0: as many as --limit asks for)")
    command.add_argument("--limit", type=float, default=LIMIT, help=f"largest |W0 + UD - W_safe| / |dW| ({LIMIT:g})")
    command.add_argument(
        "--save_precision", choices=typing.get_args(choices.SavePrecision), default="float", help="type of the factors"
    )
    command.add_argument(
        "--concept", action="append", default=[], metavar="TEXT", help="a prompt of what is erased; once for each"
    )
    command.add_argument(
        "--leave_out_embeddings", action="store_true", help="leave out changed embeddings, which no LoRA carries"
    )


def _model_arguments(command: argparse.ArgumentParser, required: bool) -> None:
    why = "" if required else "; without one, layers are paired by equal names"
    command.add_argument(
        "--checkpoint", type=Path, required=required, help=f"checkpoint, or file of the diffusion model alone{why}"
    )
    command.add_argument(
        "--text_encoder",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of the text encoders, where the checkpoint has none or others are wanted",
    )
    command.add_argument(
        "--clip_type",
        default="",
        metavar="NAME",
        help="what these are for, as ComfyUI's CLIP loaders call it: flux, qwen_image, ... (what the files tell)",
    )
    command.add_argument("--vae", type=Path, help="VAE file, where the checkpoint has none or another is wanted")
    command.add_argument(
        "--comfyui", type=Path, help="folder of ComfyUI (where the pack is in its custom_nodes: found)"
    )
    command.add_argument("--cpu", action="store_true", help="train on the CPU")


def _kohya_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the kohya engine", "options unknown here are passed on to sd-scripts' script")
    group.add_argument("--engine", choices=("embedded", "kohya"), default="embedded")
    group.add_argument("--sd_scripts", default="", help="folder of a checkout (SD_SCRIPTS_PATH)")
    group.add_argument("--sd_scripts_python", default="", help="its interpreter (SD_SCRIPTS_PYTHON, or its own venv)")
    group.add_argument("--accelerate_config", default="", help="accelerate's file, for several GPUs or machines")
    group.add_argument("--family", choices=tuple(FAMILIES), default="SD15", help="of the checkpoint (SD15)")
    group.add_argument("--v_prediction", action="store_true", help="the checkpoint predicts v")
    group.add_argument("--tokenizer", default="", help="folder with CLIP's vocab.json and merges.txt, to stay offline")


def with_options(chosen: dict) -> str:
    """train-task, train-safety and dataset."""
    cls: type[TaskOptions] | type[SafetyOptions] = SafetyOptions if chosen["command"] == "train-safety" else TaskOptions
    values = {name: value for name, value in chosen.items() if name not in (*OWN, *KOHYA)}
    kohya_family = chosen["family"] if chosen.get("engine") == "kohya" else ""
    if chosen["extra"] and not kohya_family:
        raise OptionError(
            f"{_name(chosen['extra'][0])}: the embedded engine has fp8_base_unet for the network's weights, "
            "blocks_to_swap and gradient_checkpointing: use these, or --engine kohya, which passes it on.",
            code="option.memory",
        )
    of = presets.group(kohya_family, FAMILIES[kohya_family].flow) if kohya_family else presets.GROUPS[0]
    made = presets.load(cls, chosen["config"], values, of)
    if isinstance(made, TaskOptions) and chosen["command"] == "dataset":
        if made.preset:
            raise OptionError(
                "preset: dataset knows no model, whose resolution it would take: give resolution.", code="option.preset"
            )
        return dataset.format_report(dataset.scan(configure(made)))
    _check_model_files(chosen)
    safety = _safety(made)
    prepare_safety(made) if isinstance(made, SafetyOptions) else prepare_task(made, safety)
    if chosen["engine"] == "kohya":
        return _with_kohya(chosen, made, safety)
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    host = comfy_host(chosen)
    # a copy in the training's precision would take the room; which that is, a preset says when the model is known
    stored = bool(made.fp8_base_unet or made.blocks_to_swap or made.preset)
    where = chosen["checkpoint"], chosen["vae"], made.mixed_precision, stored, *_text_encoder(chosen)
    common = {"engine": host.ENGINE, "base_name": chosen["checkpoint"].name}
    loaded = host.load_checkpoint(*where)
    made = presets.load(cls, chosen["config"], values, host.preset_group(loaded[0]))
    train_text = isinstance(made, TaskOptions) and made.network_train_text_encoder
    with host.opened(*loaded, made, train_text) as host_model:
        if isinstance(made, SafetyOptions):
            return train_safety(host_model, made, TrainingLines(), **common).report
        return train_task(host_model, made, TrainingLines(), safety, **common).report


def _name(argument: str) -> str:
    """Of an option as it was typed."""
    return argument.lstrip("-").partition("=")[0]


def make_safety(chosen: dict) -> str:
    """A safety LoRA made of words."""
    made = options.load(
        MakeOptions, chosen["config"], {name: value for name, value in chosen.items() if name not in OWN}
    )
    _check_model_files(chosen)
    host, text = _text_model(chosen)
    return closed.make_safety(text, made, engine=host.ENGINE, base_name=chosen["checkpoint"].name).report


def combine_safety(chosen: dict) -> str:
    """Several safety LoRAs as one file."""
    own = (*OWN, "safety", "concept", "strength")
    made = options.load(CombineOptions, chosen["config"], {n: value for n, value in chosen.items() if n not in own})
    check_files(*chosen["safety"])
    _check_model_files(chosen)
    strengths = chosen["strength"] or [1.0] * len(chosen["safety"])
    if len(strengths) != len(chosen["safety"]) or not all(map(_above_zero, strengths)):
        raise GuardError(
            f"--strength: {len(strengths)} numbers for {len(chosen['safety'])} files, and each must be above 0: give "
            "one for each file in its order, or none.",
            code="combine.strength",
        )
    safety = [SafetyLora(read_lora(path), by) for path, by in zip(chosen["safety"], strengths, strict=True)]
    host, text = _text_model(chosen)
    names = {"engine": host.ENGINE, "base_name": chosen["checkpoint"].name}
    return combined(text, safety, chosen["concept"], made, **names).report


def _above_zero(strength: float) -> bool:
    return math.isfinite(strength) and strength > 0


def _text_model(chosen: dict):
    """The module for checkpoints, and the checkpoint as a model of texts."""
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    host, texts = comfy_host(chosen), comfy_host(chosen, "text_inputs")
    return host, texts.opened(*_without_vae(host, chosen))


def _without_vae(host, chosen: dict) -> tuple:
    """(MODEL, CLIP) in ComfyUI's own precision."""
    return host.load_checkpoint(chosen["checkpoint"], None, None, False, *_text_encoder(chosen), pictures=False)[:2]


def _text_encoder(chosen: dict) -> tuple[list[Path], str]:
    return chosen["text_encoder"], chosen["clip_type"]


def _check_model_files(chosen: dict) -> None:
    check_files(chosen["checkpoint"], *chosen["text_encoder"], chosen["vae"])
    if chosen["text_encoder"] and not chosen["checkpoint"]:
        raise OptionError(
            "text_encoder: is that of a diffusion model: give its file as --checkpoint.", code="option.text-encoder"
        )
    if chosen["clip_type"] and not chosen["text_encoder"]:
        raise OptionError(
            "clip_type: says what the files of --text_encoder are for: give these as well, or neither.",
            code="option.clip-type",
        )


def check_files(*paths: Path | None) -> None:
    """GuardError for a file that is not there, before anything that takes long."""
    for path in filter(None, paths):
        if not path.is_file():
            raise GuardError(f"{path}: no such file: check the path.", code="train.no-such-file")


def _safety(made: TaskOptions | SafetyOptions) -> list[SafetyLora]:
    if not (isinstance(made, TaskOptions) and made.safety_lora):
        return []
    return [SafetyLora(read_lora(made.safety_lora, scale=made.safety_scale), made.safety_strength)]


def _with_kohya(chosen: dict, made: TaskOptions | SafetyOptions, safety: list[SafetyLora]) -> str:
    engine = find_engine(chosen["sd_scripts"], chosen["sd_scripts_python"], chosen["accelerate_config"])
    parts, extra = _kohya_files(chosen)
    base = kohya.Base(
        chosen["checkpoint"],
        chosen["family"],
        v_prediction=chosen["v_prediction"],
        tokenizer=chosen["tokenizer"],
        parts=parts,
    )
    if isinstance(made, SafetyOptions):
        return kohya.train_safety(engine, made, base, TrainingLines(), extra).report
    return kohya.train_task(engine, made, base, TrainingLines(), safety, extra).report


def _kohya_files(chosen: dict) -> tuple[dict[str, str], list[str]]:
    """The model's files that sd-scripts' options call as ours do: those of its family, and further arguments."""
    encoders, vae, extra = chosen["text_encoder"], chosen["vae"], list(chosen["extra"])
    if chosen["clip_type"] or len(encoders) > 1:
        raise OptionError(
            f"{'clip_type' if chosen['clip_type'] else 'text_encoder'}: the kohya engine takes one file for each of "
            "sd-scripts' own options (--clip_l, --t5xxl, ...): give these.",
            code="option.kohya-files",
        )
    parts = {"text_encoder": str(encoders[0])} if encoders else {}
    if vae is not None and FAMILIES[chosen["family"]].parts:
        parts["vae"] = str(vae)
    elif vae is not None:
        extra += ["--vae", str(vae.absolute())]
    return parts, extra


def project(chosen: dict) -> str:
    """The task LoRA's file projected clear of the safety LoRAs, written to --output."""
    check_writable(chosen["output"].absolute().parent, "--output")
    _check_model_files(chosen)
    task, safety = read_lora(chosen["task"]), [read_lora(path) for path in chosen["safety"]]
    infos = ()
    if chosen["checkpoint"]:
        infos = comfy_host(chosen).checkpoint_infos(chosen["checkpoint"], *_text_encoder(chosen))
    dtype = output.DTYPES[chosen["save_precision"]] if chosen["save_precision"] else None
    tensors, report = projection.project_file(task, safety, infos, dtype, chosen["sides"])
    output.write_tensors(chosen["output"], tensors, output.projected_metadata(task, safety, report))
    return projection.format_projection(report)


def convert_safety(chosen: dict) -> str:
    """A safety LoRA from an eraser's published weights."""
    o = ConvertOptions(
        rank=chosen["rank"],
        limit=chosen["limit"],
        save_precision=chosen["save_precision"],
        concept=tuple(chosen["concept"]),
        base_sha256=chosen["base_sha256"],
        leave_out_embeddings=chosen["leave_out_embeddings"],
    )
    return convert(chosen["weights"], chosen["base"], chosen["output"], o).report


def concept_prompts(chosen: dict) -> str:
    """A copy of a safety LoRA's file with its concept prompts, by which its functional strength is measured."""
    listed = captions.read(chosen["prompts_file"]).splitlines() if chosen["prompts_file"] else []
    made = concept.write_copy(chosen["safety"], chosen["output"], [*chosen["prompt"], *listed])
    return concept.written(made, chosen["output"])


def calibrate_safety(chosen: dict) -> str:
    """A copy of a safety LoRA's file with its activity on a checkpoint, by which a guarded run judges a prompt."""
    check_files(chosen["safety"])
    _check_model_files(chosen)
    check_writable(chosen["output"].absolute().parent, "--output")
    for name, least in (("size", 8), ("noises", 1), ("seed", 0)):
        if chosen[name] < least:
            raise GuardError(f"--{name} {chosen[name]}: give at least {least}.", code="activity.option")
    about, preserved = (
        [*chosen[one], *(_listed(chosen[file]))]
        for one, file in (("prompt", "prompts_file"), ("preserve", "preserve_file"))
    )
    safety = SafetyLora(read_lora(chosen["safety"]), chosen["strength"])
    host = comfy_host(chosen)
    model, clip = _without_vae(host, chosen)
    calibrating = importlib.import_module("..comfy_host.calibrating", __package__)
    latent = calibrating.latent_of(model, chosen["size"])
    sampled = latent, chosen["noises"], chosen["seed"], TrainingLines()
    found = calibrating.calibrated(model, clip, safety, about, preserved, *sampled)
    made = activity.write_copy(safety.lora, chosen["output"], found)
    return f"{activity.format_copy(made, str(chosen['output']))}\n{activity.format_calibration(found)}"


def _listed(path: Path | None) -> list[str]:
    lines = captions.read(path).splitlines() if path else []
    return [line.strip() for line in lines if line.strip()]


def inspect(chosen: dict) -> str:
    return inspection.format_inspection(inspection.inspect(chosen["lora"]))


class TrainingLines(Lines):
    """See loop.Watch."""

    def __init__(self) -> None:
        super().__init__()
        self._pace, self._at = Pace(), 0.0

    def step(self, step: int, total: int, losses: list[float]) -> None:
        pace, now = self._pace(step, total), time.monotonic()
        if step == total or step % 10 == 0 or now - self._at >= SECONDS:
            self._at, window = now, losses[-50:]
            mean = sum(window) / len(window)
            logger.info("step %d of %d  loss %.4f  %s  %s", step, total, mean, curve(losses), pace)

    def validated(self, losses: list[tuple[int, float]]) -> None:
        logger.info("step %d: validation loss %.4f", *losses[-1])

    def sample(self, step: int, images: list[Path], without: Sequence[Path] = ()) -> None:
        logger.info("step %d: previews %s", step, ", ".join(map(str, images)))
        if without:
            logger.info("the same without the safety LoRA: %s", ", ".join(map(str, without)))

    def say(self, text: str) -> None:
        logger.info(text)


def comfy_host(chosen: dict, module: str = "trainer_model"):
    """The ``module`` that touches ComfyUI, with ComfyUI importable and its argument parsing off."""
    start(chosen["comfyui"], chosen["cpu"])
    return importlib.import_module(f"..comfy_host.{module}", __package__)
