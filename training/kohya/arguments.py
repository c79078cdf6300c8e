"""Options of the trainers as arguments of sd-scripts, and which further arguments may stand beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...modular_lora.guard import concept
from ...modular_lora.guard.build import SafetyLora
from ...modular_lora.options import toml_value, tomllib
from ..adapter_options import pairs
from ..optim import optimizer_arguments
from ..options import HUBER, OptionError, Options, SafetyOptions, TaskOptions, schedule_free
from ..safety.targets import Term, erased, kept
from .checks import NAMES

NETWORK_MODULE = "modular_lora_guard.training.kohya.network"
REFUSED = {  # argument of sd-scripts -> why it cannot be passed on
    "base_weights": "merges LoRAs into W0, and what is trained on that is not detached",
    "base_weights_multiplier": "merges LoRAs into W0, and what is trained on that is not detached",
    "dim_from_weights": "makes the network from a file: give network_dim",
    "network_module": "is the guard's own here, around sd-scripts' networks (for LyCORIS' forms: embedded engine)",
    "save_model_as": "is safetensors here: other formats have no metadata and can run code",
    "no_metadata": "would leave out what the file was trained on: no_dataset_metadata leaves out what is private",
    "output_config": "writes a file instead of training",
}


OPTIMIZERS = {"CAME": "pytorch_optimizer.CAME"}  # name -> sd-scripts', where that is another
DEFAULTS = {"sdpa", "cache_latents", "no_half_vae", "masked_loss", "max_data_loader_n_workers", "tokenizer_cache_dir"}


@dataclass(frozen=True)
class Family:
    """How sd-scripts trains one model family (names as ComfyUI has them)."""

    script: str
    leco: str = ""  # its erasure trainer
    version: str = ""  # ss_base_model_version
    flags: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()  # hub names of CLIP tokenizers
    parts: tuple[tuple[str, str], ...] = ()  # arguments that name further files, and their kind in ComfyUI
    whole: bool = True  # one checkpoint file can hold all parts
    pattern: str = ""  # how its network matches the whole of a name, "{}" the pattern; "": it takes none
    flow: bool = False  # flow matching; these swap blocks as well
    eight_bits: bool = True  # whether it reads fp8_base_unet


CLIP_L = "openai/clip-vit-large-patch14"
CLIP_G = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_CLIPS, _T5 = (("clip_l", "text_encoders"), ("clip_g", "text_encoders")), ("t5xxl", "text_encoders")
_AE, _VAE = ("ae", "vae"), ("vae", "vae")
_FLUX = Family(
    "flux_train_network.py",
    tokenizers=(CLIP_L,),
    parts=(_CLIPS[0], _T5, _AE),
    whole=False,
    pattern="^(?:{})$",  # it searches in the layer's name
    flow=True,
)
FAMILIES = {
    "SD15": Family("train_network.py", "train_leco.py", "sd_v1", (), (CLIP_L,)),
    "SD20": Family("train_network.py", "train_leco.py", "sd_v2", ("--v2",), ()),
    "SDXL": Family("sdxl_train_network.py", "sdxl_train_leco.py", "sdxl_base_v1-0", (), (CLIP_L, CLIP_G)),
    "SD3": Family("sd3_train_network.py", tokenizers=(CLIP_L, CLIP_G), parts=(*_CLIPS, _T5, _VAE), flow=True),
    "Flux": _FLUX,
    "FluxSchnell": _FLUX,
    "Lumina2": Family("lumina_train_network.py", parts=(("gemma2", "text_encoders"), _AE), whole=False, flow=True),
    "Anima": Family(
        "anima_train_network.py",
        parts=(("qwen3", "text_encoders"), _VAE),
        whole=False,
        pattern="{}",
        flow=True,
        eight_bits=False,
    ),
    "HunyuanImage21": Family(
        "hunyuan_image_train_network.py",
        parts=(("text_encoder", "text_encoders"), ("byt5", "text_encoders"), _VAE),
        whole=False,
        flow=True,
        eight_bits=False,  # fp8_scaled, which is passed on
    ),
}


@dataclass(frozen=True)
class Run:
    """What a run needs to know beside its options; paths are absolute."""

    checkpoint: Path
    family: Family
    engine: str
    base_file_sha256: str
    base_sha256: str = ""
    v_prediction: bool = False
    tokenizer_dir: str = ""
    dataset_config: str = ""  # file
    dataset_sha256: str = ""
    masked_loss: bool = False
    prompts: str = ""  # file: previews, or LECO's prompts
    parts: Mapping[str, str] = field(default_factory=dict)  # argument -> file, of Family.parts


def check_parts(name: str, family: Family, parts: Mapping[str, str], extra: Sequence[str]) -> None:
    """OptionError where sd-scripts would miss a file of the model, or one is named that it does not read."""
    known = [part for part, _ in family.parts]
    if strange := sorted(set(parts) - set(known)):
        raise OptionError(
            f"{strange[0]}: sd-scripts' trainer of {name} reads {', '.join(known) or 'one file alone'}.",
            code="option.kohya-files",
        )
    given = {argument[2:].partition("=")[0] for argument in extra if argument.startswith("--")} | set(parts)
    if not family.whole and (missing := [part for part in known if part not in given]):
        raise OptionError(
            f"{name}: sd-scripts reads the parts of this model from files of their own: give {', '.join(missing)} as "
            "well (--NAME FILE on the command line, kohya_files on the node).",
            code="option.kohya-files",
        )


def task_arguments(options: TaskOptions, run: Run, safety: Sequence[SafetyLora], extra: Sequence[str]) -> list[str]:
    """For train_network.py and its kin."""
    _check_task(options, run)
    network = _network(options, run, "task") | {
        "safety": os.pathsep.join(str(s.lora.path.absolute()) for s in safety),
        "safety_strength": ",".join(str(s.strength) for s in safety),
        "safety_scale": ",".join(s.lora.scale for s in safety),
        "project": "weight" if options.project else "",
        "dataset_sha256": run.dataset_sha256,
        "allow_contaminated_base": "yes" if options.allow_contaminated_base else "",
        "known_bases": os.pathsep.join(str(Path(path).absolute()) for path in options.known_bases),
    }
    flags: dict[str, object] = {
        "dataset_config": run.dataset_config,
        "network_weights": _absolute(options.network_weights),
        "network_dropout": options.network_dropout,
        "noise_offset": options.noise_offset,
        "prior_loss_weight": str(options.prior_loss_weight),
        "network_train_unet_only": not options.network_train_text_encoder,
        "text_encoder_lr": str(options.text_encoder_lr) if options.network_train_text_encoder else "",
        "masked_loss": run.masked_loss,
        "cache_latents": True,
        "cache_latents_to_disk": options.cache_latents_to_disk,
        "no_half_vae": True,
        "max_data_loader_n_workers": "0",  # the images are in the cache: worker processes would only cost memory
        "resume": _absolute(options.resume),
        "skip_until_initial_step": bool(options.resume),
        "save_state": bool(options.save_every_n_steps),
        "save_state_on_train_end": True,  # a finished training can be gone on with
    }
    flags |= _losses(options)
    for name in ("max_train_epochs", "fp8_base_unet", "blocks_to_swap"):  # unset, --fp8_base may be given beside them
        if value := getattr(options, name):
            flags[name] = value
    if options.validate_every_n_steps:
        flags |= {"validate_every_n_steps": options.validate_every_n_steps}
    if options.sample_every_n_steps and options.sample_prompts:
        flags |= {"sample_every_n_steps": options.sample_every_n_steps, "sample_prompts": run.prompts}
    return _arguments(_common(options, run) | flags, network, run, extra)


def safety_arguments(options: SafetyOptions, run: Run, extra: Sequence[str]) -> list[str]:
    """For train_leco.py and sdxl_train_leco.py, which draw x_t on policy and know no relative_error.

    OptionError for what else they do not have.
    """
    lacking = {
        "pool_size": 0, "pool_refresh_every": 0, "resume": "", "sample_every_n_steps": 0, "init": "",
        "robust_steps": 0, "ema_decay": 0.0, "fp8_base_unet": False, "blocks_to_swap": 0,
    }  # fmt: skip
    for name, wanted in ({"objective": "leco"} | lacking).items():
        if (value := getattr(options, name)) != wanted:
            raise OptionError(
                f"{name} {value!r}: sd-scripts' LECO has only {wanted!r}: use the embedded engine for it.",
                code="option.leco",
            )
    if schedule_free(options):
        raise OptionError(
            f"optimizer_type {options.optimizer_type}: whether sd-scripts' LECO saves its average is not known: use "
            "another optimizer, or the embedded engine.",
            code="option.leco",
        )
    prompts = concept.trained((*options.concept, *options.synonyms))
    network = _network(options, run, "safety") | {
        "init_seed": str(options.seed),
        "concept": ", ".join(options.concept),
        "concept_prompts": prompts.replace("=", "\\u003d"),  # sd-scripts splits its arguments there
    }
    flags: dict[str, object] = {
        "prompts_file": run.prompts,
        "max_denoising_steps": options.denoising_steps,
        "leco_denoise_guidance_scale": str(options.guidance_scale),
    }
    return _arguments(_common(options, run) | flags, network, run, extra)


def _losses(options: TaskOptions) -> dict[str, object]:
    """Error, weights of the noise levels, and noise."""
    found: dict[str, object] = {"debiased_estimation_loss": options.debiased_estimation_loss}
    if options.loss_type != "l2":
        found |= {"loss_type": options.loss_type}
    if options.loss_type in ("huber", "smooth_l1"):
        found |= {name: str(getattr(options, name)) for name in HUBER}
    if options.multires_noise_iterations:
        names = ("multires_noise_iterations", "multires_noise_discount")
        found |= {name: str(getattr(options, name)) for name in names}
    return found


def _check_task(options: TaskOptions, run: Run) -> None:
    """OptionError for what sd-scripts has not, or stops at."""
    if options.ema_decay:
        raise OptionError(
            f"ema_decay {options.ema_decay:g}: sd-scripts keeps no mean of a LoRA's weights: use the embedded engine.",
            code="option.kohya",
        )
    smooth = options.loss_type in ("huber", "smooth_l1")
    if smooth and options.huber_schedule == "snr" and run.family.flow:
        raise OptionError(
            "huber_schedule snr: sd-scripts has none for this family: set it to constant or exponential.",
            code="option.kohya",
        )
    if options.blocks_to_swap and not run.family.flow:
        raise OptionError(
            f"blocks_to_swap: {run.family.script} swaps no blocks: use the embedded engine for it.", code="option.kohya"
        )
    if options.fp8_base_unet and not run.family.eight_bits:
        raise OptionError(
            f"fp8_base_unet: {run.family.script} does not keep its weights so: use the embedded engine for it.",
            code="option.kohya",
        )
    if options.fp8_base_unet and options.mixed_precision == "no":
        raise OptionError(
            "fp8_base_unet: sd-scripts then computes in half precision alone: set mixed_precision to bf16 or fp16.",
            code="option.kohya",
        )


def leco_prompts(options: SafetyOptions) -> str:
    """LECO's prompts TOML. sd-scripts draws one entry a step, so preservation takes steps of its own.

    A preserved prompt p has neutral = p and positive = unconditional: its target is then ε_0(x_t, p), whatever the
    guidance scale.
    """
    entries = [_entry(term, options, 1.0) for term in erased(options)]
    entries += [_entry(term, options, options.preserve_weight) for term in kept(options)]
    return "\n".join(entries)


def sample_prompts(options: Options) -> str:
    """Previews as sd-scripts' JSON, each with a seed of its own that stays the same from step to step."""
    size = {"width": options.sample_size, "height": options.sample_size}
    common = size | {"sample_steps": options.sample_steps, "scale": options.sample_cfg}
    prompts = [{"prompt": p, "seed": options.seed + i} | common for i, p in enumerate(options.sample_prompts)]
    return json.dumps(prompts, ensure_ascii=False)


def _entry(term: Term, options: SafetyOptions, weight: float) -> str:
    values = {
        "target": toml_value(term.prompt),
        "positive": toml_value(term.positive if term.scale else term.unconditional),
        "unconditional": toml_value(term.unconditional),
        "neutral": toml_value(term.neutral),
        "action": toml_value("erase" if term.scale <= 0 else "enhance"),
        "guidance_scale": repr(float(abs(term.scale))),
        "resolution": str(options.train_size),
        "batch_size": str(options.train_batch_size),
        "weight": repr(float(weight)),
    }
    return "\n".join(["[[prompts]]", *(f"{name} = {value}" for name, value in values.items()), ""])


def _common(options: Options, run: Run) -> dict[str, object]:
    """Arguments of all training scripts; empty, zero and False ones are left out."""
    always = (
        "output_name network_dim network_alpha learning_rate optimizer_type lr_scheduler max_train_steps max_grad_norm "
        "mixed_precision save_precision seed"
    )
    where_set = (
        "lr_warmup_steps gradient_accumulation_steps gradient_checkpointing min_snr_gamma save_every_n_steps "
        "training_comment"
    )
    logs = options.log_with != "none"
    found: dict[str, object] = {name: str(getattr(options, name)) for name in always.split()}
    return (
        found
        | {name: getattr(options, name) for name in where_set.split()}
        | {
            "pretrained_model_name_or_path": str(run.checkpoint),
            "output_dir": _absolute(options.output_dir),
            "save_model_as": "safetensors",
            "sdpa": True,
            "tokenizer_cache_dir": run.tokenizer_dir,
            "v_parameterization": run.v_prediction,
            "max_token_length": options.max_token_length if options.max_token_length > 75 else "",
            "clip_skip": options.clip_skip if options.clip_skip > 1 else "",
            "optimizer_type": OPTIMIZERS.get(options.optimizer_type, options.optimizer_type),
            "optimizer_args": tuple(f"{name}={value!r}" for name, value in optimizer_arguments(options).items()),
            **_schedule(options),
            **run.parts,
            "log_with": options.log_with if logs else "",
            "logging_dir": str(Path(options.output_dir).absolute() / "logs") if logs else "",
        }
    )


def _schedule(options: Options) -> dict[str, object]:
    """What the schedule takes beside its steps; with a schedule-free optimizer sd-scripts has none."""
    kind, least = options.lr_scheduler, str(options.lr_scheduler_min_lr_ratio)
    if schedule_free(options):
        return {"lr_warmup_steps": ""}  # in optimizer_args
    if kind == "cosine_with_restarts":
        return {"lr_scheduler_num_cycles": str(options.lr_scheduler_num_cycles)}
    if kind == "polynomial":
        return {"lr_scheduler_power": str(options.lr_scheduler_power)}
    if kind == "cosine_with_min_lr":
        return {"lr_scheduler_min_lr_ratio": least}
    if kind == "warmup_stable_decay":
        return {"lr_decay_steps": str(options.lr_decay_steps), "lr_scheduler_min_lr_ratio": least}
    if kind == "inverse_sqrt" and options.lr_scheduler_timescale:
        return {"lr_scheduler_timescale": str(options.lr_scheduler_timescale)}
    return {}


def _network(options: Options, run: Run, role: str) -> dict[str, str]:
    found = {
        "role": role,
        "target": options.target,
        "base_name": run.checkpoint.name,
        "base_sha256": run.base_sha256,
        "base_file_sha256": run.base_file_sha256,
        "base_version": run.family.version + ("_v" if run.v_prediction and run.family.version == "sd_v2" else ""),
        "engine": run.engine,
        "dataset_metadata": "no" if options.no_dataset_metadata else "",
    }
    return found | _adapters(options, run.family)


def _adapters(options: Options, family: Family) -> dict[str, str]:
    """What the wrapped network is to train beside a layer, by sd-scripts' names; OptionError for what it has not."""
    if not options.is_lora:
        raise OptionError(
            f"{options.adapter}: the kohya engine trains sd-scripts' LoRA networks: use the embedded engine for it.",
            code="option.kohya-adapter",
        )
    found = {}
    if options.target == "conv":
        found["conv_dim"] = str(options.conv_dim or options.network_dim)
        found["conv_alpha"] = str(options.conv_alpha or options.network_alpha)
    for name in ("network_reg_dims", "network_reg_lrs"):
        given = pairs(getattr(options, name), name, whole=name == "network_reg_dims")
        if given and not family.pattern:
            raise OptionError(
                f"{name}: {family.script} takes no patterns: use the embedded engine, or sd-scripts' own arguments for "
                "blocks (--network_args block_dims=... or down_lr_weight=...).",
                code="option.kohya-adapter",
            )
        if odd := next((pattern.pattern for pattern, _ in given if re.search("[,=]", pattern.pattern)), None):
            raise OptionError(
                f"{name}: {odd!r}: sd-scripts splits its patterns at , and =: write it without these.",
                code="option.kohya-adapter",
            )
        matching = [(family.pattern.replace("{}", pattern.pattern), value) for pattern, value in given]
        matching = [(family.pattern.replace("{}", pattern.pattern), value) for pattern, value in given]
        found[name] = ",".join(f"{pattern}={value:g}" for pattern, value in matching)
    return found


def _arguments(flags: Mapping[str, object], network: Mapping[str, str], run: Run, extra: Sequence[str]) -> list[str]:
    found = list(run.family.flags)
    others, theirs = _checked(extra, flags)
    overridden = {argument[2:].partition("=")[0] for argument in others if argument.startswith("--")}
    for name, value in flags.items():
        if name in overridden:
            continue
        if isinstance(value, tuple):
            found += [f"--{name}", *map(str, value)] if value else []
        elif value is True:
            found.append(f"--{name}")
        elif value not in (False, "", 0):
            found += [f"--{name}", str(value)]
    ours = [f"{name}={value}" for name, value in network.items() if value]
    return [*found, *others, "--network_module", NETWORK_MODULE, "--network_args", *ours, *theirs]


def _checked(extra: Sequence[str], flags: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """(other arguments, --network_args of the user); OptionError for one that contaminates or says a thing twice."""
    others: list[str] = []
    theirs: list[str] = []
    into = others
    for argument in extra:
        if not argument.startswith("--"):
            into.append(argument)
            continue
        name, _, value = argument[2:].partition("=")
        # argparse takes any unambiguous beginning of a name for the name
        for refused, why in REFUSED.items():
            if name and refused.startswith(name):
                raise OptionError(f"--{name}: {refused} {why}: leave it out.", code="option.kohya-argument")
        if name not in DEFAULTS and (own := next((flag for flag in flags if flag.startswith(name)), None)):
            raise OptionError(
                f"--{name}: the trainer itself sets {own}: set its own options instead.", code="option.kohya-argument"
            )
        into = theirs if name == "network_args" else others
        if into is others:
            others.append(argument)
        elif value:
            theirs.append(value)
    for argument in theirs:
        if argument.partition("=")[0] in NAMES:
            raise OptionError(
                f"--network_args {argument}: is set by the trainer's own options: leave it out.",
                code="option.kohya-argument",
            )
    _check_config(others)
    return others, theirs


def _check_config(arguments: Sequence[str]) -> None:
    """--config_file can set any argument, in a section or outside."""
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0] != "--config_file":
            continue
        given = argument.partition("=")[2] or "".join(arguments[index + 1 : index + 2])
        path = Path(given if given.endswith(".toml") else f"{given}.toml")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(
                f"--config_file {path}: cannot be read as TOML ({error}): mend the file.", code="option.kohya-config"
            ) from error
        for name, value in table.items():
            for key in value if isinstance(value, dict) else (name,):
                if key in REFUSED:
                    raise OptionError(
                        f"--config_file {path.name}: {key} {REFUSED[key]}: take it out of the file.",
                        code="option.kohya-config",
                    )


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""
