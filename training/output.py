"""LoRA files as kohya's sd-scripts writes them: names, types, ss_* and modelspec.* metadata, sshs_* hashes.

A layer is ``NAME.lora_down.weight`` (r in[ k k]), ``NAME.lora_up.weight`` (out r[ 1 1]) and ``NAME.alpha`` (0-dim, of
the same type); of other forms than LoRA, what `forms` says. Metadata is text only. sshs_model_hash and
sshs_legacy_hash are what sd-webui-additional-networks looks LoRAs up by; both are taken from the file as it would be
with its ss_* metadata alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..modular_lora.errors import GuardError, writing
from ..modular_lora.files.formats import ENDINGS, make_layers
from ..modular_lora.files.reader import LoraFile, read_lora
from ..modular_lora.guard import activity, concept
from ..modular_lora.guard.build import BASE_KEY, CONTAMINATED_KEY, ROLE_KEY
from ..modular_lora.util import atomic
from .choices import SavePrecision
from .forms import ALPHA, DOWN, LENGTHS, UP
from .metadata_keys import (
    CLIPS_KEY,
    CONCEPT_KEY,
    DATASET_KEY,
    EMA_KEY,
    ENGINE_KEY,
    INITIALISATION_KEY,
    LEAKS,
    PRESERVED_KEY,
    PROJECTED_KEY,
    SAFETY_KEY,
)
from .model import Prediction
from .options import HUBER, Options, SafetyOptions, TaskOptions
from .projection import ProjectionReport, project, residual

DTYPES: dict[SavePrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
LEGACY_START, LEGACY_SIZE = 0x100000, 0x10000  # bytes that the legacy hash looks at

SPEC_PREDICTIONS: dict[str, str] = {"epsilon": "epsilon", "v_prediction": "v"}  # all that sai_model_spec 1.0.1 names

_log = logging.getLogger("modular_lora")
_FAMILIES = (  # ComfyUI's family name, sd-scripts' base version and architecture, whose layer names the file has
    (r"SD15", "sd_v1", "stable-diffusion-v1", "diffusers"),
    (r"SD2\d", "sd_v2", "stable-diffusion-v2-512", "diffusers"),
    (r"Flux(Inpaint)?$", "flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
    (r"SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
)

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # kohya layer name -> down, up (float32), alpha
Layers = Mapping[str, Mapping[str, Tensor]]  # layer name -> end of a tensor's name -> tensor (float32; alpha float64)


@dataclass(frozen=True)
class DatasetRecord:
    """What a file says of the images that it was trained on."""

    sha256: str
    images: int
    reg_images: int = 0
    batches_per_epoch: int = 0
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder -> tag -> captions with it
    dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder -> {"n_repeats", "img_count"}
    clip_frames: tuple[int, ...] = ()  # of the clips among the images, each number once


@dataclass(frozen=True)
class Provenance:
    """Where a LoRA comes from, beside its options. Times are Unix times in seconds."""

    family: str  # ComfyUI's name: SD15, SD20, SDXL, ...
    prediction: Prediction
    base_sha256: str  # modular_lora.util.tensor_hashing.weights_sha256 of W0
    engine: str  # name and version of what trained it
    steps: int
    started: float
    finished: float
    base_name: str = ""  # file name of the checkpoint
    safety_sha256: tuple[str, ...] = ()
    contaminated_base: str = ""  # what `contamination.check_base` returned
    initialisation: str = ""
    dataset: DatasetRecord | None = None
    activity: str = ""  # a safety LoRA's calibration (modular_lora/guard/activity.py)


def metadata(options: TaskOptions | SafetyOptions, made: Provenance) -> dict[str, str]:
    """The metadata of a LoRA file, text only; without `LEAKS` where ``options.no_dataset_metadata`` says so."""
    role = "safety" if isinstance(options, SafetyOptions) else "task"
    found = _training(options, made) | _modelspec(options, made)
    found |= {ROLE_KEY: role, BASE_KEY: made.base_sha256, ENGINE_KEY: made.engine}
    found |= {
        SAFETY_KEY: ",".join(made.safety_sha256),
        CONTAMINATED_KEY: made.contaminated_base,
        INITIALISATION_KEY: made.initialisation,
    }
    if isinstance(options, SafetyOptions):
        found[CONCEPT_KEY] = ", ".join(options.concept)
        found[activity.KEY] = made.activity
        found[concept.PROMPTS_KEY] = concept.trained((*options.concept, *options.synonyms))
        if options.preserve and options.preserve_weight:
            found[PRESERVED_KEY] = json.dumps(list(options.preserve))
    if made.dataset:
        found |= _dataset(made.dataset)
    if options.no_dataset_metadata:
        found = {key: value for key, value in found.items() if key not in LEAKS}
    return {key: str(value) for key, value in found.items() if value not in ("", None)}


def projected_metadata(task: LoraFile, safety: Sequence[LoraFile], report: ProjectionReport) -> dict[str, str]:
    """Metadata of a projected file: the task LoRA's own, with what it is clear of now and how well."""
    before = filter(None, task.metadata.get(SAFETY_KEY, "").split(","))
    shas = dict.fromkeys((*before, *(lora.sha256 for lora in safety)))  # each once, in order
    return task.metadata | {SAFETY_KEY: ",".join(shas), PROJECTED_KEY: report.residuals}


def write(
    path: str | Path,
    layers: Factors,
    metadata: Mapping[str, str],
    precision: SavePrecision = "fp16",
    bases: Mapping[str, Tensor] | None = None,
) -> LoraFile:
    """Write a LoRA file of factors, whole or not at all, and give it as read back; see `write_layers`."""
    layers_of = {
        layer: {DOWN: down, UP: up, ALPHA: torch.tensor(alpha, dtype=torch.float64)}
        for layer, (down, up, alpha) in layers.items()
    }
    return write_layers(path, layers_of, metadata, precision, bases)


def write_layers(
    path: str | Path,
    layers: Layers,
    metadata: Mapping[str, str],
    precision: SavePrecision = "fp16",
    bases: Mapping[str, Tensor] | None = None,
) -> LoraFile:
    """Write a LoRA file of any form, whole or not at all, and give it as read back.

    DoRA's lengths stay float32, a number a row: W0 itself is multiplied by them. ``bases`` (kohya layer name -> Q, see
    projection.bases): those layers' down is projected once more in float32 just before the cast, and the largest
    residual after it goes into the metadata. Layers that are zero are left out, with a line in the log. Raises
    GuardError, naming layer and remedy, where values are not finite or the type cannot hold them, where every layer is
    zero, or where the file cannot be written.
    """
    dtype, name = DTYPES[precision], Path(path).name
    tensors: dict[str, Tensor] = {}
    residuals, zero = [], []
    for layer, values in layers.items():
        Q = (bases or {}).get(layer)
        parts = {end: value.detach().cpu() for end, value in values.items()}
        if Q is not None:
            parts[DOWN] = project(parts[DOWN].float(), Q.cpu())
        parts = {
            end: _cast(name, layer, part, torch.float32 if end == LENGTHS else dtype) for end, part in parts.items()
        }
        if _is_zero(name, layer, parts):
            zero.append(layer)
            continue
        if Q is not None:
            residuals.append(residual(parts[DOWN], Q))
        tensors |= {f"{layer}.{end}": part for end, part in parts.items()}
    if not tensors:
        raise GuardError(
            f"{name}: all {len(zero)} layers are zero in {precision}, it would change nothing: train longer or with a "
            "higher learning rate, or save as float.",
            code="train.all-zero",
        )
    if zero:
        _log.warning("%s: %d of %d layers are zero and left out (first %s)", name, len(zero), len(layers), zero[0])
    if residuals:
        metadata = {**metadata, PROJECTED_KEY: _residual(max(residuals))}
    return write_tensors(path, tensors, metadata)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoraFile:
    """Write LoRA tensors under their own names, hashes added, and give the file as read back; see `write`.

    The bytes pass `read_lora` in a temporary folder first; then they go beside ``path`` under another ending, to the
    disk, and only then take their name.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors, dict(metadata) | kohya_hashes(tensors, metadata))
    with writing(path):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / path.name
            trial.write_bytes(data)
            lora = read_lora(trial)
        atomic.write(path, data, sync=True, parents=True)
    return replace(lora, path=path)


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash, of the file as it would be with its ss_* metadata alone.

    The former is the SHA-256 of all bytes behind the header, the latter the first eight digits of the SHA-256 of
    `LEGACY_SIZE` bytes from `LEGACY_START` on (those of no bytes at all for a smaller file).
    """
    data = safetensors.torch.save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    window = data[LEGACY_START : LEGACY_START + LEGACY_SIZE]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }


def _is_zero(file: str, layer: str, parts: Mapping[str, Tensor]) -> bool:
    """Whether a layer, as it is saved, changes nothing."""
    tensors = {end: part for end, part in parts.items() if end != ALPHA}
    alphas = {ALPHA: float(parts[ALPHA])} if ALPHA in parts else {}
    roles = {ENDINGS[end]: end for end in parts}
    return make_layers({layer: roles}, None, tensors, alphas, file)[layer].is_zero


def _residual(value: float) -> str:
    return f"residual {value:.1e}"


def _cast(file: str, layer: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(value.isfinite().all()):
        raise GuardError(
            f"{file}: layer {layer} has values that are not finite: lower the learning rate, train again.",
            code="train.not-finite",
        )
    cast = value.to(dtype, copy=True)
    if not bool(cast.isfinite().all()):
        peak = float(value.abs().max())
        raise GuardError(
            f"{file}: layer {layer} goes up to {peak:.3g}, beyond {dtype}: set save_precision to bf16.",
            code="train.out-of-range",
        )
    return cast


def base_names(family: str, prediction: Prediction) -> tuple[str, str, str]:
    """ss_base_model_version, architecture and naming of a base; a family that sd-scripts does not know as it is."""
    for pattern, version, architecture, naming in _FAMILIES:
        if re.match(pattern, family):
            if prediction != "v_prediction" or not version.startswith("sd_v"):
                return version, architecture, naming
            return f"{version}_v", architecture.replace("v2-512", "v2-768-v"), naming
    return family, family, "ComfyUI"


def _training(options: Options, made: Provenance) -> dict[str, object]:
    """The ss_* keys that apply, with sd-scripts' values."""
    version, _, _ = base_names(made.family, made.prediction)
    names = (
        "output_name learning_rate gradient_checkpointing gradient_accumulation_steps max_train_steps lr_warmup_steps "
        "lr_scheduler network_dim network_alpha mixed_precision clip_skip seed training_comment max_grad_norm"
    )
    found: dict[str, object] = {f"ss_{name}": getattr(options, name) for name in names.split()}
    optimizer: str = options.optimizer_type
    if options.optimizer_args:
        optimizer += f"({','.join(options.optimizer_args)})"
    found |= {
        "ss_session_id": int(made.started),
        "ss_training_started_at": made.started,
        "ss_training_finished_at": made.finished,
        "ss_steps": made.steps,
        "ss_base_model_version": version,
        "ss_v2": version.startswith("sd_v2"),
        "ss_network_module": "networks.lora" if options.is_lora else "lycoris.kohya",
        "ss_optimizer": optimizer,
        "ss_unet_lr": options.learning_rate,
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * options.gradient_accumulation_steps,
        "ss_cache_latents": True,
        "ss_sd_model_name": made.base_name,
        "ss_min_snr_gamma": options.min_snr_gamma or None,
        "ss_fp8_base_unet": options.fp8_base_unet or None,
        EMA_KEY: options.ema_decay or None,
    }
    if arguments := network_arguments(options):
        found["ss_network_args"] = json.dumps(arguments)
    if isinstance(options, TaskOptions):
        found |= {
            "ss_text_encoder_lr": options.text_encoder_lr if options.network_train_text_encoder else None,
            "ss_network_dropout": options.network_dropout or None,
            "ss_noise_offset": options.noise_offset or None,
            "ss_resolution": f"({options.resolution}, {options.resolution})",
        }
        found |= _loss(options)
    return found


def network_arguments(options: Options) -> dict[str, str]:
    """What sd-scripts' and LyCORIS' ``--network_args`` would be, where not the default."""
    found: dict[str, object] = {}
    if not options.is_lora:
        found |= {"algo": options.algo, "dora_wd": options.dora_wd, "use_tucker": options.use_tucker}
    if options.algo == "lokr":
        found |= {"factor": options.factor, "decompose_both": options.decompose_both}
    if options.target == "conv":
        found["conv_dim"] = options.conv_dim or options.network_dim
        found["conv_alpha"] = options.conv_alpha or options.network_alpha
    for name in ("network_reg_dims", "network_reg_lrs"):
        found[name] = ",".join(getattr(options, name))
    return {name: str(value) for name, value in found.items() if value not in (False, "")}


def _loss(options: TaskOptions) -> dict[str, object]:
    """Error, noise, validation and epochs, where they are not what they are without options."""
    smooth = options.loss_type in ("huber", "smooth_l1")
    levels, held_out = options.multires_noise_iterations, options.validation_split
    return {
        "ss_loss_type": options.loss_type if options.loss_type != "l2" else None,
        **{f"ss_{name}": getattr(options, name) if smooth else None for name in HUBER},
        "ss_debiased_estimation": options.debiased_estimation_loss or None,
        "ss_multires_noise_iterations": levels or None,
        "ss_multires_noise_discount": options.multires_noise_discount if levels else None,
        "ss_validation_split": held_out or None,
        "ss_validation_seed": options.validation_seed if held_out else None,
        "ss_num_epochs": options.max_train_epochs or None,
    }


def _modelspec(options: TaskOptions | SafetyOptions, made: Provenance) -> dict[str, object]:
    """modelspec.* (sai_model_spec 1.0.1), as sd-scripts fills it in."""
    _, architecture, naming = base_names(made.family, made.prediction)
    size = options.resolution if isinstance(options, TaskOptions) else options.train_size
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": naming,
        "modelspec.title": "LoRA" if options.no_dataset_metadata else options.output_name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.datetime.fromtimestamp(int(made.finished)).isoformat(),
        "modelspec.prediction_type": SPEC_PREDICTIONS.get(made.prediction),
        "modelspec.implementation_version": made.engine,
        "modelspec.encoder_layer": options.clip_skip if options.clip_skip > 1 else None,
    }


def _dataset(data: DatasetRecord) -> dict[str, object]:
    return {
        DATASET_KEY: data.sha256,
        CLIPS_KEY: ",".join(map(str, data.clip_frames)),
        "ss_num_train_images": data.images,
        "ss_num_reg_images": data.reg_images,
        "ss_num_batches_per_epoch": data.batches_per_epoch or None,
        "ss_tag_frequency": json.dumps(data.tag_frequency) if data.tag_frequency else None,
        "ss_dataset_dirs": json.dumps(data.dirs) if data.dirs else None,
    }
