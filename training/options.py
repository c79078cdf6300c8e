"""Options of the trainers, under the names that sd-scripts uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ..modular_lora.files.scales import Scale
from ..modular_lora.options import OptionError, Texts, add_arguments, hints, load, opt, parse
from ..modular_lora.validation import raises
from .adapter_options import AdapterOptions
from .choices import ClipExtraction, SavePrecision

__all__ = [
    "OptionError", "Options", "SafetyOptions", "TaskOptions", "add_arguments", "fingerprint", "hints", "load", "parse",
]  # fmt: skip

Target = Literal["cross-attention", "attention", "linear", "conv"]
Precision = Literal["no", "bf16", "fp16"]
Optimizer = Literal[
    "AdamW", "AdamW8bit", "Adafactor", "Prodigy", "CAME", "Lion", "AdamWScheduleFree", "RAdamScheduleFree"
]
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Loss = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
HUBER = ("huber_schedule", "huber_c", "huber_scale")  # what the smooth errors take
Objective = Literal["esd-x", "esd-u", "sdd", "leco"]
Action = Literal["erase", "enhance"]
Density = Literal["own", "uniform", "logit_normal"]
TaskPreset = Literal["", "style", "character", "object"]  # files of training/presets
SafetyPreset = Literal["", "safety"]
PIXELS = 8  # of a side for one of a latent
PRODIGY_RATES = (0.1, 10.0)  # it multiplies a rate that it finds itself
SAVING = {
    "output_name",
    "output_dir",
    "save_precision",
    "no_dataset_metadata",
    "training_comment",
    "save_every_n_steps",
    "preset",  # its values are compared, each as the option that it is
}
SHOWING = {"sample_every_n_steps", "sample_prompts", "sample_steps", "sample_cfg", "sample_size", "log_with"}
SHOWING |= {"validate_every_n_steps"}
HASHED = {"resume", "known_bases", "safety_lora", "train_data_dir", "reg_data_dir", "dataset_config"}  # by content
HASHED |= {"caption_dir", "reference_dir", "in_json"}
KEEPING = {"cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "blocks_to_swap"}
# these do not change what is trained
ELSEWHERE = SAVING | SHOWING | HASHED | KEEPING | {"safety_strength", "safety_scale"}


@dataclass(frozen=True)
class Options(AdapterOptions):
    """What both trainings share; checked as part of theirs."""

    preset: str = opt("", "values for a purpose (training/presets); what is given beside it wins")
    output_name: str = opt("lora", "file name of the LoRA, without ending")
    output_dir: str = opt("output", "folder of the LoRA, its checkpoints, previews and logs")
    network_dim: int = opt(16, "rank", gt=0)
    network_alpha: float = opt(16.0, "alpha; the LoRA is scaled by alpha / rank", gt=0)
    target: Target = opt(
        "linear", "layers: cross-attention, attention, linear (all Linear and 1×1 conv), conv (3×3 too)"
    )
    learning_rate: float = opt(1e-4, "learning rate; Prodigy wants 1", gt=0)
    optimizer_type: Optimizer = opt(
        "AdamW",
        "AdamW, AdamW8bit (bitsandbytes), Adafactor, Prodigy (prodigyopt), CAME (pytorch-optimizer), Lion "
        "(lion-pytorch), AdamWScheduleFree, RAdamScheduleFree (schedulefree)",
    )
    optimizer_args: Texts = opt((), "name=value arguments of the optimizer, e.g. weight_decay=0.01")
    lr_scheduler: Scheduler = opt("cosine", "schedule of the learning rate")
    lr_warmup_steps: int = opt(0, "steps of linear warm-up", ge=0)
    lr_scheduler_num_cycles: int = opt(3, "cycles of cosine_with_restarts, so one restart less; at least 2", gt=0)
    lr_scheduler_power: float = opt(2.0, "power of polynomial; 1 is linear", gt=0)
    max_train_steps: int = opt(1000, "optimizer steps", gt=0)
    train_batch_size: int = opt(1, "images, or noisy latents, per micro-batch", gt=0)
    gradient_accumulation_steps: int = opt(1, "micro-batches per optimizer step", gt=0)
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third slower")
    fp8_base_unet: bool = opt(
        False, "the network's weights in 8 bits (float8); the LoRA is trained on what they round to"
    )
    blocks_to_swap: int = opt(
        0, "blocks whose weights wait in main memory until they are computed with, the largest; 0: none", ge=0
    )
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm; 0: no clipping", ge=0)
    mixed_precision: Precision = opt("no", "weights and activations: no (float32), bf16, fp16; adapters stay float32")
    save_precision: SavePrecision = opt("fp16", "type of the saved LoRA: fp16, bf16, float")
    min_snr_gamma: float = opt(0.0, "min-SNR weighting (arXiv 2303.09556), usually 5; 0: off", ge=0)
    seed: int = opt(42, "seed of data order, noise and, with the role, of the initial weights")
    save_every_n_steps: int = opt(0, "write LoRA and training state every N steps; 0: only at the end", ge=0)
    resume: str = opt("", "folder of a saved training state to resume from")
    sample_every_n_steps: int = opt(0, "sample the previews' prompts every N steps; 0: never", ge=0)
    sample_prompts: Texts = opt((), "prompts of the previews")
    sample_steps: int = opt(20, "sampling steps of a preview", gt=0)
    sample_cfg: float = opt(7.0, "guidance of a preview")
    sample_size: int = opt(512, "width and height of a preview in pixels", gt=0, multiple_of=PIXELS)
    known_bases: Texts = opt((), "JSON registries of bases by content hash, beside the bundled one")
    max_token_length: Literal[75, 150, 225] = opt(75, "tokens of a prompt: 75, 150 or 225; what is beyond is cut off")
    clip_skip: int = opt(
        1, "1: last layer of the text encoder (family's own for SD2 and SDXL), 2: the one before, ...", gt=0
    )
    log_with: Literal["none", "tensorboard", "wandb"] = opt("none", "logs beside the loss curve on the node")
    no_dataset_metadata: bool = opt(False, "leave captions, folder and output names out of the file's metadata")
    training_comment: str = opt("", "a line for the file's metadata (ss_training_comment)")
    # schedules and the mean of the weights
    lr_scheduler_min_lr_ratio: float = opt(
        0.0, "cosine_with_min_lr, warmup_stable_decay: share of the rate that they end at", ge=0, lt=1
    )
    lr_decay_steps: int = opt(0, "warmup_stable_decay: steps of its decay, the last ones", ge=0)
    lr_scheduler_timescale: int = opt(0, "inverse_sqrt: steps; 0: those of warm-up, or 10000 without any", ge=0)
    ema_decay: float = opt(
        0.0, "save, preview and validate the running mean of the weights, of this decay, e.g. 0.999; 0: off", ge=0, lt=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_every_n_steps and not self.sample_prompts:
            raise OptionError(
                f"sample_every_n_steps: {self.sample_every_n_steps}, and nothing to sample: give sample_prompts, or 0.",
                code="option.sampling",
            )
        self._check_rates()

    def _check_rates(self) -> None:
        """OptionError where schedule and optimizer would not do what their names say."""
        kind, warmup = self.lr_scheduler, self.lr_warmup_steps
        if kind == "cosine_with_restarts" and self.lr_scheduler_num_cycles < 2:
            raise OptionError(
                "lr_scheduler_num_cycles: 1 cycle has no restart: give 2 or more, or use cosine.",
                code="option.scheduler",
            )
        if kind == "constant" and warmup:
            raise OptionError(
                "lr_warmup_steps: constant has no warm-up: use constant_with_warmup.", code="option.scheduler"
            )
        if kind == "constant_with_warmup" and not warmup:
            raise OptionError(
                "lr_scheduler constant_with_warmup: 0 steps of warm-up: give lr_warmup_steps.", code="option.scheduler"
            )
        self._check_schedule(kind, warmup)
        if self.optimizer_type == "Prodigy" and self.network_reg_lrs:
            raise OptionError(
                "network_reg_lrs: Prodigy takes one rate, which it finds: use another optimizer, or leave them out.",
                code="option.prodigy",
            )
        low, high = PRODIGY_RATES
        if self.optimizer_type == "Prodigy" and not low <= self.learning_rate <= high:
            raise OptionError(
                f"learning_rate: {self.learning_rate:g} with Prodigy, which multiplies the rate that it finds itself: "
                "set it to 1.",
                code="option.prodigy",
            )
        if schedule_free(self):
            self._check_schedule_free()

    def _check_schedule(self, kind: Scheduler, warmup: int) -> None:
        if kind == "cosine_with_min_lr" and not self.lr_scheduler_min_lr_ratio:
            raise OptionError(
                "lr_scheduler_min_lr_ratio: 0 is where cosine ends as well: give it, e.g. 0.1, or use cosine.",
                code="option.scheduler",
            )
        if kind == "warmup_stable_decay" and not self.lr_decay_steps:
            raise OptionError(
                "lr_decay_steps: warmup_stable_decay without them has no decay: give their number, or use "
                "constant_with_warmup.",
                code="option.scheduler",
            )

    def _check_schedule_free(self) -> None:
        kind, schedule = self.optimizer_type, self.lr_scheduler
        if schedule not in ("constant", "constant_with_warmup"):
            raise OptionError(
                f"lr_scheduler {schedule}: {kind} averages its steps instead of following a schedule (arXiv "
                "2405.15682): set it to constant, or to constant_with_warmup.",
                code="option.schedule-free",
            )
        if kind == "RAdamScheduleFree" and schedule == "constant_with_warmup":
            raise OptionError(
                "lr_scheduler constant_with_warmup: RAdamScheduleFree warms up by itself: set it to constant.",
                code="option.schedule-free",
            )
        if self.ema_decay:
            raise OptionError(
                f"ema_decay: {kind} saves an average of its own: leave out ema_decay, or use another optimizer.",
                code="option.schedule-free",
            )


@raises(OptionError)
@dataclass(frozen=True)
class TaskOptions(Options):
    """A task LoRA from captioned images, on W0; the safety LoRA is given and stays out of the training."""

    preset: TaskPreset = opt("", "values for a purpose: style, character or object; what is given beside it wins")
    train_data_dir: str = opt("", "folder of N_name folders with images and captions")
    dataset_config: str = opt("", "TOML of the data set, instead of train_data_dir")
    reg_data_dir: str = opt("", "folder of N_name folders with regularisation images")
    prior_loss_weight: float = opt(1.0, "weight of the regularisation images' loss", ge=0)
    resolution: int = opt(512, "area of the images is resolution², unless the data set gives another")
    flip_aug: bool = opt(False, "mirror half of the draws")
    shuffle_caption: bool = opt(False, "shuffle the tags of a caption, but the first keep_tokens")
    keep_tokens: int = opt(0, "tags at the start of a caption that stay where they are", ge=0)
    caption_dropout_rate: float = opt(0.0, "share of draws without a caption")
    cache_latents_to_disk: bool = opt(False, "keep latents in files in output_dir, not in memory, for big data sets")
    cache_text_encoder_outputs_to_disk: bool = opt(False, "keep the captions' encodings in files in output_dir as well")
    safety_lora: str = opt("", "safety LoRA file: recorded, shown in previews, never in the training forward")
    safety_strength: float = opt(1.0, "its strength in the previews")
    safety_scale: Scale = opt(
        "refuse", "its alpha / rank, where the file's tensors and metadata give two: refuse, tensors or metadata"
    )
    project: bool = opt(False, "keep the LoRA's down matrices out of the safety LoRA's row space, layer by layer")
    network_train_text_encoder: bool = opt(False, "train the text encoder's attention and MLP as well")
    text_encoder_lr: float = opt(5e-5, "learning rate of the text encoder", ge=0)
    network_weights: str = opt("", "task LoRA file to start from (weights only; resume continues exactly)")
    network_dropout: float = opt(0.0, "dropout of the adapters' input", ge=0, lt=1)
    timestep_density: Density = opt(
        "own",
        "noise levels: own (evenly out of the model's own table, with its shift), uniform (evenly over the network's "
        "time, without the shift), logit_normal (most in the middle of the table)",
    )
    density_mean: float = opt(0.0, "logit_normal: mean; above 0 is noisier")
    density_deviation: float = opt(1.0, "logit_normal: deviation", gt=0)
    noise_offset: float = opt(0.0, "strength of one random shift per channel added to the noise, usually 0.0357", ge=0)
    allow_contaminated_base: bool = opt(False, "train although the base carries a safety LoRA; the file will say so")
    # loss and noise, captions from elsewhere, validation, epochs
    loss_type: Loss = opt("l2", "error of a prediction: l2, l1, huber, smooth_l1 (sd-scripts' two smooth ones)")
    huber_schedule: HuberSchedule = opt(
        "snr", "huber, smooth_l1: where the error turns from square to straight, at each noise level"
    )
    huber_c: float = opt(0.1, "huber, smooth_l1: that place; of snr and exponential at the noisiest level", gt=0, le=1)
    huber_scale: float = opt(1.0, "huber, smooth_l1 of constant and exponential: factor of that place", gt=0)
    debiased_estimation_loss: bool = opt(False, "weigh noise levels by 1 / √SNR (arXiv 2310.08442); ε and v alone")
    multires_noise_iterations: int = opt(
        0, "levels of coarser noise added to the noise (multires, pyramid noise), usually 6 to 10; 0: none", ge=0
    )
    multires_noise_discount: float = opt(0.3, "factor from one level of multires noise to the next", gt=0, le=1)
    alpha_mask: bool = opt(False, "transparent parts of the images do not count in the loss")
    caption_extension: str = opt("", "ending of the caption files, e.g. .txt or .json; without it .txt and .caption")
    caption_dir: str = opt("", "folder of the caption files, where they are not beside the images")
    reference_dir: str = opt(
        "", "folder of reference images, of the same names, which an edit model is given beside the caption"
    )
    in_json: str = opt(
        "",
        "sd-scripts' metadata (.json, .jsonl) with the captions of train_data_dir, then a plain folder of images",
    )
    validation_split: float = opt(
        0.0, "share of each folder's images held out of training, for a validation loss", ge=0, le=0.99
    )
    validation_seed: int = opt(0, "seed of which images are held out, and of the noise that their loss is taken at")
    validate_every_n_steps: int = opt(0, "validation loss every N steps; 0: at the end of every epoch", ge=0)
    max_train_epochs: int = opt(0, "train so many epochs, in the place of max_train_steps; 0: max_train_steps", ge=0)
    # clips, for models of video
    clip_frames: int = opt(
        0, "models of video: frames of each clip (.mp4, .webm, .mkv, .mov, animated .gif and .webp); 0: no clips", ge=0
    )
    clip_extraction: ClipExtraction = opt(
        "head", "which frames of a clip: head (the first, in a row), spread (evenly from the first to the last)"
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_adapters()
        self._check_loss()
        if self.in_json and (self.dataset_config or self.reg_data_dir):
            other = "dataset_config" if self.dataset_config else "reg_data_dir"
            raise OptionError(
                f"in_json: {other} is given: name the file in a data-set TOML, as a subset's metadata_file.",
                code="option.data-set",
            )
        if self.in_json and (self.caption_dir or self.caption_extension):
            raise OptionError(
                "in_json: has the captions, and caption_dir or caption_extension says where others are: leave out one.",
                code="option.data-set",
            )
        if self.reg_data_dir and self.dataset_config:
            raise OptionError(
                "reg_data_dir: dataset_config is given: name the folder there, with is_reg = true.",
                code="option.data-set",
            )
        if self.resume and self.network_weights:
            raise OptionError(
                "network_weights: resume goes on from a state, weights and all: leave out one of them.",
                code="option.resume",
            )
        if self.network_train_text_encoder:
            self._check_text_rate()
            if self.cache_text_encoder_outputs_to_disk:
                raise OptionError(
                    "cache_text_encoder_outputs_to_disk: network_train_text_encoder changes the text encoder in every "
                    "step: leave out one of them.",
                    code="option.cache",
                )

    def _check_adapters(self) -> None:
        """OptionError for what goes with a LoRA's two factors alone."""
        if self.network_dropout and self.algo != "lora":
            raise OptionError(
                f"network_dropout: PEFT's {self.algo} has no dropout of its input: use algo lora, or leave it out.",
                code="option.adapter",
            )
        if self.project and not self.is_lora:
            raise OptionError(
                f"project: keeps a LoRA's down matrices clear of a row space, and {self.adapter} has none that its "
                "whole change goes through: use algo lora without dora_wd, or leave it out.",
                code="option.adapter",
            )

    def _check_loss(self) -> None:
        if self.debiased_estimation_loss and self.min_snr_gamma:
            raise OptionError(
                "debiased_estimation_loss: min_snr_gamma weighs the noise levels already: leave out one of them.",
                code="option.loss",
            )
        if self.project and schedule_free(self):
            raise OptionError(
                f"project: {self.optimizer_type} averages weights of before and after the projection: use another "
                "optimizer, or project the finished file (Project Task LoRA).",
                code="option.schedule-free",
            )

    def _check_text_rate(self) -> None:
        if not self.text_encoder_lr:
            raise OptionError(
                "text_encoder_lr: 0 trains nothing: raise it, or leave out network_train_text_encoder.",
                code="option.text-encoder-rate",
            )
        if self.optimizer_type == "Prodigy" and self.text_encoder_lr != self.learning_rate:
            raise OptionError(
                f"text_encoder_lr: {self.text_encoder_lr:g}, and Prodigy takes one rate: set it to learning_rate, "
                f"{self.learning_rate:g}.",
                code="option.prodigy",
            )


@raises(OptionError)
@dataclass(frozen=True)
class SafetyOptions(Options):
    """A safety LoRA that erases a concept given by prompts; no images."""

    preset: SafetyPreset = opt("", "values for a purpose: safety; what is given beside it wins")
    network_dim: int = opt(8, "rank", gt=0)
    network_alpha: float = opt(8.0, "alpha; the LoRA is scaled by alpha / rank", gt=0)
    train_batch_size: int = opt(
        4, "noisy latents per micro-batch: half of the concept, a third kept, a sixth of no prompt", gt=0
    )
    objective: Objective = opt("esd-x", "esd-x (cross-attention), esd-u (all but it), sdd, leco")
    concept: Texts = opt((), "prompts of the concept to erase")
    synonyms: Texts = opt((), "more prompts of the concept, erased the same way")
    preserve: Texts = opt((), "prompts that must stay as they are")
    preserve_weight: float = opt(1.0, "weight of the preservation term", ge=0)
    negative_guidance: float = opt(1.0, "ESD's η, LECO's guidance_scale g", ge=0)
    guidance_scale: float = opt(3.0, "guidance of the partial denoising")
    relative_error: bool = opt(True, "errors count relative to the prompts' effect at each timestep; the papers: no")
    denoising_steps: int = opt(50, "steps of the partial denoising")
    train_size: int = opt(512, "width and height of the noisy latents in pixels")
    positive: Texts = opt((), "LECO: what is moved away from; empty: the concept")
    neutral: str = opt("", "LECO: what the concept is moved to")
    unconditional: str = opt("", "LECO: the unconditional prompt")
    action: Action = opt("erase", "LECO: erase or enhance")
    on_policy: bool = opt(False, "draw x_t anew in every step, as the papers do, instead of from a pool")
    pool_size: int = opt(0, "noisy latents in the pool; 0: chosen from prompts and steps", ge=0)
    pool_refresh_every: int = opt(0, "renew the pool every N steps; 0: never", ge=0)
    init: str = opt("", "safety LoRA file to start from, e.g. one in closed form; else the LoRA starts at zero")
    robust_steps: int = opt(
        0, "steps of an attack on the erased prompts' embeddings in every training step, e.g. 5; 0: none", ge=0
    )
    robust_size: float = opt(0.3, "how far the attack may move a token's embedding, as a share of its norm", gt=0)

    def __post_init__(self):
        super().__post_init__()
        if self.dora_wd or self.algo == "diag-oft":
            raise OptionError(
                f"{self.adapter}: its change depends on the weights that it is put on, so a base could not be tested "
                "for this safety LoRA before a task LoRA is trained on it: use algo lora, loha or lokr.",
                code="option.adapter",
            )
        if self.init and not self.is_lora:
            raise OptionError(
                f"init: puts a file's change into a LoRA's factors, and {self.adapter} has others: use algo lora.",
                code="option.adapter",
            )
        for name in ("positive", "neutral", "unconditional"):
            if getattr(self, name) and self.objective != "leco":
                raise OptionError(
                    f"{name}: {self.objective} takes no such prompt: use leco, or leave it out.",
                    code="option.objective",
                )
        if self.action != "erase" and self.objective != "leco":
            raise OptionError(
                f"action: {self.objective} erases only: use objective leco to enhance.", code="option.objective"
            )
        if self.objective == "esd-u" and self.target == "cross-attention":
            raise OptionError(
                "target: esd-u trains all but cross-attention, so nothing is left to train: change one of the two.",
                code="option.objective",
            )
        if self.objective == "sdd" and (self.ema_decay or schedule_free(self)):
            name = "ema_decay" if self.ema_decay else "optimizer_type"
            raise OptionError(
                f"{name}: sdd saves the mean of its weights already, which teaches it: leave it out.",
                code="option.objective",
            )


def schedule_free(options: Options) -> bool:
    """Whether the optimizer keeps an average of its steps instead of following a schedule."""
    return options.optimizer_type.endswith("ScheduleFree")


def fingerprint(options: Options) -> dict[str, str]:
    """The options that a resumed training must share with the one that it goes on from."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: repr(value) for name, value in values.items() if name not in ELSEWHERE}
