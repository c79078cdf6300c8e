"""A safety LoRA by erasure: prompts of a concept in, no images."""

from __future__ import annotations

from pathlib import Path

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import read_lora
from ...modular_lora.places import check_writable
from .. import contamination, patterns, presets
from ..adapters import Adapters, Spec, adapted
from ..checkpointing import WHY, checkpointed
from ..data import texts
from ..forms import form_of
from ..layers import erasing, tells_text_apart
from ..loop import Job, Watch, fit
from ..model import HostModel
from ..optim import Masters
from ..options import OptionError, SafetyOptions
from ..previews import Previews
from ..record import Record, Trained
from ..state import check_state
from ..unused import unused, unused_by_embedded
from .calibrating import calibration
from .erasure import Erasure, Report
from .start import start_from
from .targets import erased

ROLE = "safety"
CALIBRATION = "calibration of safety activity"


def train_safety(
    host_model: HostModel, options: SafetyOptions, watch: Watch, *, engine: str, base_name: str = ""
) -> Trained:
    """Train a safety LoRA and write it to ``output_dir``; raises GuardError or OptionError. Objectives: erasure.py."""
    prepare(options)
    if not host_model.schedule.noise.any():
        raise GuardError(
            f"A {host_model.family} adds no noise to an image, and an erasure begins at noise: make a safety LoRA from "
            "words for it (Make Safety LoRA).",
            code="train.no-noise",
        )
    texts.check_prompts(options, host_model.too_long)
    of = presets.group(host_model.family, host_model.schedule.prediction == "velocity")
    said = [
        *presets.said(options, of),
        *texts.cut_previews(options, host_model.too_long),
        *unused(options),
        *unused_by_embedded(options),
    ]
    if said:
        watch.say("\n".join(said))
    name = base_name or host_model.family
    contaminated = contamination.check_base(
        name, host_model.base_sha256, {}, (), known=contamination.known_bases(*options.known_bases)
    )
    unet = erasing(host_model.unet_names, options.target, options.objective)
    if options.objective != "leco" and not tells_text_apart(host_model.unet_names):
        said.append(f"this {host_model.family} tells no cross-attention apart: {options.objective} takes all attention")
    remarked = list(said)
    spec = Spec(
        unet,
        {},
        options.network_dim,
        options.network_alpha,
        0.0,
        options.seed,
        ROLE,
        form_of(options),
        patterns.sizes(options, ((host_model.unet, unet),)),
    )
    said += patterns.lines(options, (unet,))
    record = Record(host_model, options, spec, engine, base_name, contaminated=contaminated)
    start = read_lora(options.init) if options.init else None
    without = record.leaving_out("gradient_checkpointing", WHY, of, watch.say)
    with (
        adapted(host_model.unet, host_model.text_encoder, spec) as adapters,
        checkpointed(host_model.unet, options.gradient_checkpointing, without) as passed,
    ):
        if start is not None:
            said.append(start_from(adapters, start))
        erasure = Erasure(
            host_model,
            options,
            adapters.off,
            adapters.parameters(),
            relative=options.relative_error,
            progress=lambda done, total: watch.stage("building the pool", done, total),
            pool_file=Path(options.output_dir) / f"{options.output_name}-pool.safetensors",
        )
        if not options.sample_every_n_steps:
            host_model.release(text=True)
        previews = Previews(host_model, adapters, options, watch.check)
        job = Job(
            groups=patterns.groups(options, adapters, ((unet, options.learning_rate),)),
            loss=passed(erasure.loss),
            write=lambda path, step, masters: _write(record, options, erasure, adapters, masters, path, step, said),
            fingerprint=record.fingerprint,
            after_step=lambda masters: erasure.after_step(masters.values),
            prepare=erasure.prepare,
            preview=lambda step: previews(step, erasure.saved_weights()),
            extra=erasure.state_dict,
            load_extra=erasure.load_state_dict,
        )
        losses = fit(job, options, host_model.device, watch)
    calibrated = [line for line in said if line.startswith(CALIBRATION)]
    lines = [*job.notes, *_lines(erasure.report()), *said]
    return record.trained(losses, lines, [*job.notes, *remarked, *calibrated])


def prepare(options: SafetyOptions) -> None:
    """What can be found wrong before a model is loaded. GuardError or OptionError."""
    check_writable(options.output_dir, "output_dir")
    contamination.known_bases(*options.known_bases)
    erased(options)
    if options.init and not Path(options.init).is_file():
        raise OptionError(f"init: there is no file {options.init!r}: name a safety LoRA's file.", code="option.init")
    if options.init and options.resume:
        raise OptionError(
            "init: resume goes on from a state, weights and all: leave out one of them.", code="option.init"
        )
    if options.resume:
        check_state(Path(options.resume))


def _write(
    record: Record,
    options: SafetyOptions,
    erasure: Erasure,
    adapters: Adapters,
    masters: Masters,
    path: Path,
    step: int,
    said: list[str],
) -> None:
    """The LoRA as of ``step`` with its calibration; ``said`` gets a line on the latter, in the place of the last."""
    average = erasure.average
    values = dict(zip(map(id, average.parameters), average.values, strict=True)) if average else {}
    layers = adapters.tensors(lambda weight: values.get(id(weight), masters.of(weight)))
    made = calibration(record.host_model, options, adapters, erasure)
    said[:] = [line for line in said if not line.startswith(CALIBRATION)]
    said.append(f"{CALIBRATION}: {made.line}")
    record.write(path, step, layers, activity=made.metadata)


def _lines(report: Report) -> list[str]:
    return [
        f"{report.erased} prompts erased, {report.kept} kept",
        f"network rows: {report.gradient_rows} with and {report.forward_rows} without gradient, of these "
        f"{report.pool_rows} for the pool ({report.pool_examples} examples, {report.pool_bytes / 2**20:.1f} MiB)",
        *report.notes,
    ]
