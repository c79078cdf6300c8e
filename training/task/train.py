"""A task LoRA from captioned images, on W0; the safety LoRA is given, recorded, and out of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile, LoraLayer, read_lora
from ...modular_lora.guard.build import SafetyLora
from ...modular_lora.places import check_writable
from .. import contamination, patterns, presets
from ..adapters import Adapters, Spec, adapted
from ..checkpointing import WHY, checkpointed
from ..data import config as dataset_config
from ..data import dataset, export, texts
from ..data.batches import Plan
from ..forms import form_of
from ..layers import select
from ..loop import Job, Watch, fit
from ..model import HostModel
from ..options import OptionError, TaskOptions
from ..previews import Previews
from ..projection import bases, project
from ..record import Record, Trained
from ..state import check_state
from ..unused import DATA_SET, unused
from . import kept
from . import losses as weighting
from .denoising import Captions, Denoising, Latents
from .validation import LEVELS, Validation

ROLE = "task"


def configure(options: TaskOptions, within: Path | None = None) -> dataset_config.DatasetConfig:
    """The data set that the options name, its images not yet read; DatasetError or OptionError.

    ``within``: the folder that all of its folders have to be in, judged before any is looked at.
    """
    if bool(options.train_data_dir) == bool(options.dataset_config):
        raise OptionError("Give train_data_dir or dataset_config, and not both.", code="option.data-set")
    return _configured(options, _shared(options), within)


def _shared(options: TaskOptions) -> dict[str, object]:
    """What a data-set TOML that says nothing takes from the options; an empty text is nothing."""
    found = {name: value for name in DATA_SET if (value := getattr(options, name)) != ""}
    return found | {"batch_size": options.train_batch_size}


def _configured(
    options: TaskOptions, defaults: dict[str, object], within: Path | None = None
) -> dataset_config.DatasetConfig:
    if options.dataset_config:
        config = dataset_config.from_toml(options.dataset_config, defaults, within)
    elif options.in_json:
        config = dataset_config.from_metadata(options.train_data_dir, options.in_json, defaults, within)
    else:
        folders = options.train_data_dir, options.reg_data_dir or None
        config = dataset_config.from_folders(*folders, defaults, within)
    return dataset_config.check_folders(config)


def overridden(options: TaskOptions, config: dataset_config.DatasetConfig) -> list[str]:
    """A line for each option that was set and that the data set's TOML overrides everywhere."""
    lines, plain = [], TaskOptions()
    if options.dataset_config:
        for name, value in _shared(options).items():
            option = "train_batch_size" if name == "batch_size" else name
            default = getattr(plain, option)
            if value != default and _configured(options, _shared(replace(options, **{option: default}))) == config:
                lines.append(f"{option} {value!r} has NO effect: {Path(options.dataset_config).name} says its own")
    return lines


def prepare(
    options: TaskOptions, safety: Sequence[SafetyLora], data: dataset_config.DatasetConfig | None = None
) -> dataset_config.DatasetConfig:
    """What can be found wrong before a model is loaded; the data set, where a host has not judged ``data`` already.

    Raises GuardError, OptionError or DatasetError.
    """
    check_writable(options.output_dir, "output_dir")
    contamination.known_bases(*options.known_bases)
    if options.project and not safety:
        raise OptionError("project: needs the safety LoRA to keep clear of: give safety_lora.", code="option.project")
    if options.network_weights:
        read_lora(options.network_weights)
    if options.resume:
        check_state(Path(options.resume))
    return data or configure(options)


def train_task(
    host_model: HostModel,
    options: TaskOptions,
    watch: Watch,
    safety: Sequence[SafetyLora] = (),
    *,
    engine: str,
    base_name: str = "",
    data: dataset_config.DatasetConfig | None = None,
) -> Trained:
    """Train a task LoRA and write it to ``output_dir``; raises GuardError, OptionError or DatasetError.

    ``data``: the data set that `configure` gave, where a host has judged it; else it is made from the options.

    ``safety`` is recorded, shown in previews, and what projection keeps clear of; the training forward knows nothing
    of it, so the LoRA is bit for bit the same without it (projection off).
    """
    config = prepare(options, safety, data)
    weighting.check(options, host_model)
    dataset_config.check_clips(config, host_model.family, host_model.frames_of)
    found = dataset.scan(config, lambda done, total: watch.stage("reading images", done, total))
    of = presets.group(host_model.family, host_model.schedule.prediction == "velocity")
    said = [*presets.said(options, of), *remarks(options, config, found, host_model.too_long)]
    options = in_steps(options, found)
    remarked = [*said, *dataset.findings(found)]
    watch.say("\n".join([*said, dataset.format_contents(found)]))
    loras = tuple(s.lora for s in safety)
    contaminated = _check_base(host_model, options, loras, base_name)
    steps = options.max_train_steps, options.gradient_accumulation_steps
    plan = Plan(config, found, options.seed, options.prior_loss_weight, *steps)
    of_images, of_captions = kept.wanted(host_model, options)
    latents, captions = Latents(host_model, found, watch, of_images), Captions(host_model, of_captions)
    loss = Denoising(host_model, options, plan, latents, captions)
    validation = Validation(loss, found, watch.check)
    _release(host_model, options, loss, plan.fixed_captions(), [draw.caption for draw in validation.draws()])
    start = _start(host_model, options, loras)
    spec = _spec(host_model, options)
    record = Record(host_model, options, spec, engine, base_name, loras, contaminated, export.record(found))
    without = record.leaving_out("gradient_checkpointing", WHY, of, watch.say)
    with (
        adapted(host_model.unet, host_model.text_encoder, spec) as adapters,
        checkpointed(host_model.unet, options.gradient_checkpointing, without) as passed,
    ):
        if start is not None:
            adapters.load(start)
        spans = _spans(host_model, options, adapters, loras)
        job = Job(
            groups=patterns.groups(
                options, adapters, ((spec.unet, options.learning_rate), (spec.text, options.text_encoder_lr))
            ),
            loss=passed(loss.loss),
            largest=passed(loss.largest),
            write=lambda path, step, masters: record.write(path, step, adapters.tensors(masters.of), spans),
            fingerprint=record.fingerprint,
            after_step=lambda masters: _project(adapters, spans, masters.of),
            preview=Previews(host_model, adapters, options, watch.check, safety),
            validate=_validating(adapters, validation) if found.held_out else None,
            validate_every=options.validate_every_n_steps or epoch_steps(options, found),
        )
        losses = fit(job, options, host_model.device, watch)
    said += dataset.format_report(found).splitlines()
    said += [one.line for one in (of_images, of_captions) if one]
    said += patterns.lines(options, (spec.unet, spec.text))
    lines = [*job.notes, *_lines(options, safety, spans, contaminated), *said]
    return record.trained(losses, lines, [*job.notes, *remarked])


def in_steps(options: TaskOptions, found: dataset.DatasetReport) -> TaskOptions:
    """The options with ``max_train_epochs`` as steps, an epoch being whole steps, as sd-scripts counts them."""
    if not options.max_train_epochs:
        return options
    return replace(options, max_train_steps=max(1, options.max_train_epochs * epoch_steps(options, found)))


def epoch_steps(options: TaskOptions, found: dataset.DatasetReport) -> int:
    """Steps in which every image is drawn as often as it is to be in an epoch."""
    return math.ceil(found.batches / options.gradient_accumulation_steps)


def remarks(
    options: TaskOptions,
    config: dataset_config.DatasetConfig,
    found: dataset.DatasetReport,
    too_long: texts.TooLong,
) -> list[str]:
    """What is worth knowing before the first step, the data set apart: texts that are cut, options without effect."""
    lines = [*texts.cut_captions(options, found.images, too_long), *texts.cut_previews(options, too_long)]
    stepped = in_steps(options, found)
    lines += [*unused(stepped, found.regularisation), *overridden(options, config)]
    if options.max_train_epochs:
        line = f"max_train_epochs: {options.max_train_epochs} are {stepped.max_train_steps} steps"
        plain = options.max_train_steps in (TaskOptions().max_train_steps, stepped.max_train_steps)
        lines.append(line if plain else f"{line}, and max_train_steps {options.max_train_steps} has NO effect")
    if references := sum(image.reference is not None for image in found.images):
        line = f"reference images: {references}, beside captions that the text encoders read alone"
        lines.append(line + "; previews are drawn without one" * bool(options.sample_every_n_steps))
    if any(data.clip_frames for data in config.datasets) and not any(
        i.frames for i in (*found.images, *found.held_out)
    ):
        lines.append("clip_frames has NO effect: no clip of the data set has so many frames")
    if found.held_out:
        lines.append(
            f"validation loss: of {len(found.held_out)} images that are held out, each at {LEVELS} noise levels and "
            "with the same noise every time"
        )
    return lines


def _check_base(host_model: HostModel, options: TaskOptions, safety: Sequence[LoraFile], name: str) -> str:
    known = contamination.known_bases(*options.known_bases)
    where = (name or host_model.family, host_model.base_sha256, host_model.weights())
    found = contamination.check_base(
        *where, safety, host_model.infos, known=known, allow=options.allow_contaminated_base
    )
    if host_model.patches:  # accepted by the host
        found = "; ".join(filter(None, [found, f"a LoRA or model was merged into {host_model.patches} of its weights"]))
    return found


def _spec(host_model: HostModel, options: TaskOptions) -> Spec:
    unet = select(host_model.unet_names, options.target)
    text = host_model.text_names if options.network_train_text_encoder else {}
    if options.network_train_text_encoder and not text:
        raise GuardError(
            f"network_train_text_encoder: no layer of this {host_model.family}'s text encoders has a name that readers "
            "of LoRA files know: leave it out.",
            code="train.no-text-layers",
        )
    return Spec(
        unet=unet,
        text=text,
        rank=options.network_dim,
        alpha=options.network_alpha,
        dropout=options.network_dropout,
        seed=options.seed,
        role=ROLE,
        form=form_of(options),
        sizes=patterns.sizes(options, ((host_model.unet, unet), (host_model.text_encoder, text))),
    )


def _validating(adapters: Adapters, validation: Validation) -> Callable[[], float]:
    """The loss without dropout."""

    def validate() -> float:
        with adapters.evaluating():
            return validation()

    return validate


def _release(
    host_model: HostModel, options: TaskOptions, loss: Denoising, captions: list[str] | None, held_out: list[str]
) -> None:
    """Keep VAE and text encoder only where previews or captions that vary will ask for them."""
    if options.sample_every_n_steps:
        return
    if captions is None or options.network_train_text_encoder:
        host_model.release(text=False)
        return
    loss.captions.of([*captions, *held_out])
    host_model.release(text=True)


def _start(host_model: HostModel, options: TaskOptions, safety: Sequence[LoraFile]) -> LoraFile | None:
    """The file that is gone on from, if any; GuardError where that is, or holds, a safety LoRA."""
    if not options.network_weights:
        return None
    start = read_lora(options.network_weights)
    contamination.check_start(start, safety, host_model.infos, host_model.weights())
    return start


def _spans(
    host_model: HostModel, options: TaskOptions, adapters: Adapters, safety: Sequence[LoraFile]
) -> dict[str, Tensor]:
    """The bases Q that projection keeps clear of, by layer name."""
    if not options.project:
        return {}
    pairs = {name: adapters.pair(name) for name in adapters.layers}
    layers = {name: LoraLayer(name, down.detach(), up.detach(), None) for name, (down, up) in pairs.items()}
    spans = {name: Q.to(host_model.device) for name, Q in bases(layers, safety, host_model.infos).items()}
    _project(adapters, spans, lambda weight: weight)
    return spans


@torch.no_grad()
def _project(adapters: Adapters, spans: Mapping[str, Tensor], value_of: Callable[[nn.Parameter], Tensor]) -> None:
    """A ← A − (A Q) Qᵀ on every layer that the safety LoRA changes as well."""
    downs = adapters.downs() if spans else {}
    for name, Q in spans.items():
        A = value_of(downs[name])
        A.copy_(project(A, Q))


def _lines(
    options: TaskOptions, safety: Sequence[SafetyLora], spans: Mapping[str, Tensor], contaminated: str
) -> list[str]:
    shown = "previews show it attached" if options.sample_every_n_steps else "no previews were drawn"
    lines = [
        f"safety LoRA {s.lora.name} {s.lora.sha256[:12]}: frozen, in no optimizer group, not in the training; {shown}"
        for s in safety
    ]
    if not safety:
        alone = ": the previews show the task LoRA alone" if options.sample_every_n_steps else ""
        lines.append(f"no safety LoRA was given{alone}")
    if spans:
        lines.append(f"projection: {len(spans)} layers kept clear of the safety LoRA's row space after every step")
    if contaminated:
        lines.append(f"WARNING: trained on a base that {contaminated} (allow_contaminated_base); the file says so")
    return lines
