"""The second engine: an unmodified checkout of kohya-ss/sd-scripts, for every family it trains and for many GPUs.

accelerate starts entry.py, that starts the checkout's own script with our ``--network_module``. The command is
a fixed list of arguments, no shell reads it, nothing is downloaded, and several GPUs or machines are accelerate's
own configuration. Nothing counts as done before the file that was written has passed every check.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...modular_lora.command import find_comfyui
from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile, read_lora, sha256_file
from ...modular_lora.guard.build import SafetyLora
from ...modular_lora.guard.comparing import Factor, norm
from ...modular_lora.util.atomic import PART
from ...modular_lora.util.file_state import FileState, find_file_state
from .. import presets
from ..data import dataset
from ..data.config import DatasetConfig
from ..data.export import to_toml
from ..data.texts import TooLong, check_prompts
from ..loop import Watch
from ..options import Options, SafetyOptions, TaskOptions
from ..record import Trained
from ..safety.train import prepare as prepare_safety
from ..task.train import prepare as prepare_task
from ..task.train import remarks
from ..unused import unused, unused_by_kohya
from . import entry, process
from .arguments import (
    FAMILIES,
    Family,
    Run,
    check_parts,
    leco_prompts,
    safety_arguments,
    sample_prompts,
    task_arguments,
)
from .checkout import Engine
from .checks import LAYERS_KEY

CLIP_TOKENS = 77
CLIP_ALONE = ("SD15", "SD20", "SDXL")  # families whose texts sd-scripts encodes by CLIP and nothing else
COMFYUI_TOKENIZER = Path("comfy", "sd1_tokenizer")
logger = logging.getLogger("modular_lora")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, eq=False)
class KohyaResult(Trained):
    """A LoRA file that sd-scripts wrote and that passed every check; its losses are sd-scripts' moving average."""

    previews: tuple[Path, ...]
    norm: float  # ‖ΔW‖ over all layers
    engine: Engine
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """The work of one of several machines that is not the first, which has the file."""

    report: str


@dataclass(frozen=True)
class Base:
    """The checkpoint to train on: one file, as sd-scripts loads it."""

    checkpoint: Path
    family: str  # ComfyUI's name, a key of FAMILIES
    sha256: str = ""  # of its contents (tensor_hashing.weights_sha256), where it is loaded in ComfyUI as well
    v_prediction: bool = False
    tokenizer: str = ""  # folder with CLIP's vocab.json and merges.txt; "": the hub's cache must have it
    parts: Mapping[str, str] = field(default_factory=dict)  # further files of the model, see Family.parts


def train_task(
    engine: Engine,
    options: TaskOptions,
    base: Base,
    watch: Watch,
    safety: Sequence[SafetyLora] = (),
    extra: Sequence[str] = (),
    data: DatasetConfig | None = None,
) -> KohyaResult | Share:
    """Train a task LoRA with sd-scripts; ``extra`` are further arguments of its script, passed on as they are.

    ``data``: the data set that `configure` gave, where a host has judged it; else it is made from the options.

    ``safety`` is recorded, looked for in the base, shown in previews, and what projection keeps clear of. Raises
    GuardError (its last words where the script fails), OptionError or DatasetError.
    """
    config = prepare_task(options, safety, data)
    check_parts(base.family, family(base.family), base.parts, extra)
    report = dataset.scan(config, lambda done, total: watch.stage("reading images", done, total))
    said = _said(base, options, lambda too_long: remarks(options, config, report, too_long))
    if report.held_out:
        said.append(
            "sd-scripts writes the validation loss into its own output and logs (log_with): it is NOT in the report"
        )
    watch.say("\n".join([*said, dataset.format_contents(report)]))
    if report.problems:
        raise GuardError(report.problems[0], code="kohya.data-set")
    masked = any(s.alpha_mask or s.conditioning_data_dir for d in config.datasets for s in d.subsets)

    def arguments(run: Run, folder: Path) -> list[str]:
        texts = {"dataset.toml": to_toml(config, report), "prompts.json": sample_prompts(options)}
        dataset_config, prompts = (_write(folder / name, text) for name, text in texts.items())
        run = replace(run, dataset_config=dataset_config, dataset_sha256=report.dataset_sha256, masked_loss=masked)
        return task_arguments(options, replace(run, prompts=prompts), safety, extra)

    done = _train(engine, options, base, family(base.family).script, arguments, watch)
    return _with(done, [*said, dataset.format_report(report)], [*said, *dataset.findings(report)])


def train_safety(
    engine: Engine, options: SafetyOptions, base: Base, watch: Watch, extra: Sequence[str] = ()
) -> KohyaResult | Share:
    """Train a safety LoRA with sd-scripts' LECO (0.10.2 and later), which draws x_t anew in every step.

    Raises GuardError where this checkout has none, OptionError for what it lacks; else as `train_task`.
    """
    script = family(base.family).leco
    if not script:
        raise GuardError(
            f"{base.family}: sd-scripts erases in SD15, SD20 and SDXL alone: use the embedded engine for this model.",
            code="kohya.no-eraser",
        )
    prepare_safety(options)

    def checked(too_long: TooLong) -> list[str]:
        check_prompts(options, too_long)
        return unused(options)

    if said := _said(base, options, checked):
        watch.say("\n".join(said))

    def arguments(run: Run, folder: Path) -> list[str]:
        prompts = _write(folder / "prompts.toml", leco_prompts(options))
        return safety_arguments(options, replace(run, prompts=prompts), extra)

    done = _train(engine, options, base, script, arguments, watch, stoppable=False)  # LECO has no states
    return _with(done, said, said)


def _with(done: KohyaResult | Share, said: Sequence[str], remarks: Sequence[str]) -> KohyaResult | Share:
    """The result with further lines of its report, and those that are read on the node (`Trained.remarks`)."""
    report = "\n".join([done.report, *said])
    if isinstance(done, Share):
        return replace(done, report=report)
    return replace(done, report=report, remarks=tuple(remarks))


def _said(base: Base, options: Options, remarks: Callable[[TooLong], list[str]]) -> list[str]:
    """What is worth knowing before the first step; ``remarks`` get what says whether sd-scripts cuts a text."""
    too_long = clip_counter(base, options.max_token_length)
    of = presets.group(base.family, FAMILIES[base.family].flow)
    lines = presets.said(options, of) + remarks(too_long or (lambda text: False))
    lines += unused_by_kohya(options, base.family)
    if too_long is None:
        why = "no CLIP tokenizer is at hand" if base.family in CLIP_ALONE else f"{base.family} has others than CLIP"
        lines.insert(0, f"texts were NOT held against what the text encoders take: {why}")
    return lines


def clip_counter(base: Base, most: int) -> TooLong | None:
    """Whether a text has more than ``most`` tokens of CLIP's; None where sd-scripts encodes by more than CLIP.

    The tokenizer is the base's, else ComfyUI's; None, too, where neither is at hand.
    """
    if base.family not in CLIP_ALONE:
        return None
    from transformers import CLIPTokenizer  # here, since it takes seconds

    try:
        folder = Path(base.tokenizer) if base.tokenizer else find_comfyui(None) / COMFYUI_TOKENIZER
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (GuardError, OSError, ValueError):
        return None
    return lambda text: len(tokenizer(text, truncation=False, verbose=False).input_ids) - 2 > most


def _train(
    engine: Engine,
    options: Options,
    base: Base,
    script: str,
    arguments: Callable[[Run, Path], list[str]],
    watch: Watch,
    stoppable: bool = True,
) -> KohyaResult | Share:
    path = engine.script(script)
    checkpoint = base.checkpoint.absolute()
    if not checkpoint.is_file():
        raise GuardError(f"{checkpoint}: no such checkpoint file: sd-scripts trains on one .safetensors file.")
    output = Path(options.output_dir).absolute()
    started, before = time.time(), find_file_state(output / f"{options.output_name}.safetensors")
    with tempfile.TemporaryDirectory(prefix="modular_lora_") as name:
        folder = Path(name)
        run = Run(
            checkpoint=checkpoint,
            family=family(base.family),
            engine=str(engine),
            base_file_sha256=sha256_file(checkpoint),
            base_sha256=base.sha256,
            v_prediction=base.v_prediction,
            tokenizer_dir=_tokenizers(base, folder / "tokenizers"),
            parts={name: str(Path(path).absolute()) for name, path in base.parts.items()},
        )
        argv = (*_launch(engine, options), str(path), *arguments(run, folder))
        output.mkdir(parents=True, exist_ok=True)
        try:
            stop = folder / "stop" if stoppable else None
            environment = _environment(engine) | ({entry.STOP: str(stop)} if stop else {})
            progress = process.run(argv, environment, engine.checkout, output / "sample", watch, stop)
        except BaseException:
            _say_state(output, options.output_name, started)
            raise
        finally:
            for part in output.glob(f"{PART}*-{glob.escape(options.output_name)}*.safetensors"):  # of a killed process
                part.unlink(missing_ok=True)
    if engine.machine:
        steps = len(progress.losses)
        return Share(f"machine {engine.machine}: its share of {steps} steps is done; machine 0 wrote the LoRA")
    lora, size = _check(output / f"{options.output_name}.safetensors", before)
    losses = tuple(progress.losses)
    report = _report(lora, losses, size, engine, time.time() - started)
    return KohyaResult(lora, losses, report, (), tuple(progress.previews), size, engine, argv)


def _say_state(output: Path, name: str, started: float) -> None:
    """The newest training state that this run kept, as a line of the log."""
    states = [path for path in output.glob(f"{glob.escape(name)}-step*-state") if path.stat().st_mtime >= started]
    if states:
        logger.warning("stopped; resume from %s", max(states))


def _launch(engine: Engine, options: Options) -> list[str]:
    """accelerate, with its own configuration file or for one process, and our entry."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) - 1))  # one core for the host
    own = ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    own += ["--mixed_precision", options.mixed_precision, "--num_cpu_threads_per_process", threads]
    config = ["--config_file", engine.accelerate_config] if engine.accelerate_config else own
    return [engine.python, "-m", "accelerate.commands.launch", "--quiet", *config, str(Path(entry.__file__))]


def _environment(engine: Engine) -> dict[str, str]:
    """This process's, without its packages where the interpreter is another, and with every hub offline."""
    found = dict(os.environ)
    if Path(engine.python) != Path(sys.executable):
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"):
            found.pop(name, None)
    found |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    # a spinning OpenMP takes ten times as long as soon as another process wants a core
    return {"OMP_WAIT_POLICY": "PASSIVE"} | found | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


def _tokenizers(base: Base, folder: Path) -> str:
    """sd-scripts' --tokenizer_cache_dir from one folder of tokenizer files; "" where there is none to give.

    ComfyUI's own files say model_max_length 8192; sd-scripts pads to it, and CLIP has 77 positions.
    """
    names = family(base.family).tokenizers
    if not base.tokenizer or not names:
        return ""
    source = Path(base.tokenizer)
    for name in names:
        target = folder / name.replace("/", "_")
        target.mkdir(parents=True)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)
            elif not file.startswith("special"):
                raise GuardError(
                    f"tokenizer {source}: has no {file}: give a folder with CLIP's tokenizer.", code="kohya.tokenizer"
                )
        config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        _write(target / "tokenizer_config.json", json.dumps(config | {"model_max_length": CLIP_TOKENS}))
    return str(folder)


def family(name: str) -> Family:
    """How sd-scripts trains the family that ComfyUI calls so; GuardError where it does not."""
    if name not in FAMILIES:
        raise GuardError(
            f"{name}: the sd-scripts engine trains {', '.join(FAMILIES)}: use the embedded engine for this model.",
            code="kohya.family",
        )
    return FAMILIES[name]


def _check(path: Path, before: FileState | None) -> tuple[LoraFile, float]:
    """The file read back, and ‖ΔW‖; GuardError unless this run wrote it, whole and with something in it."""
    if find_file_state(path) in (None, before):
        raise GuardError(
            f"{path.name}: sd-scripts ended without an error and did not write it: see its output.",
            code="kohya.no-file",
        )
    lora = read_lora(path)
    said = lora.metadata.get(LAYERS_KEY, "")
    if said != str(len(lora.layers)):
        raise GuardError(
            f"{path.name}: holds {len(lora.layers)} layers, {said or 'an unknown number'} were trained: train again.",
            code="kohya.other-layers",
        )
    size = math.hypot(*(norm(Factor.of(layer)) for layer in lora.plain.values()))
    if not (math.isfinite(size) and size > 0):
        raise GuardError(f"{path.name}: ‖ΔW‖ is {size}, it would change nothing: raise the learning rate or the steps.")
    return lora, size


def _report(lora: LoraFile, losses: Sequence[float], size: float, engine: Engine, seconds: float) -> str:
    zero = f", {len(lora.zero_layers)} of them zero" if lora.zero_layers else ""
    last = f", loss {losses[-1]:.4f} (sd-scripts' average)" if losses else ""
    said = [f"{key}: {value}" for key, value in sorted(lora.metadata.items()) if key.startswith("modular_lora.")]
    head = f"{lora.name}: {len(lora.layers)} layers{zero}, ‖ΔW‖ {size:.4g}, {len(losses)} steps{last}, {seconds:.0f} s"
    return "\n".join([head, f"{engine}, file SHA-256 {lora.sha256}", *said])


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)
