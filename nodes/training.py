"""What the training nodes share: inputs made of the command line's options, and the outputs of a training."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path

from comfy_api.latest import io, ui

from ..comfy_host.answers import answer
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.model_folders import offered
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.progress import NodeWatch
from ..comfy_host.training_files import data_sets
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.summary import warnings
from ..training import options

if typing.TYPE_CHECKING:
    from ..training.kohya.engine import Share
    from ..training.record import Trained

GROUP = f"{CATEGORY}/train"
FROM_GRAPH = (  # files, folders and services that a graph must not name
    "output_name", "output_dir", "train_data_dir", "reg_data_dir", "dataset_config", "resume", "safety_lora",
    "safety_strength", "safety_scale", "network_weights", "init", "known_bases", "log_with", "caption_dir", "in_json",
    "reference_dir",
)  # fmt: skip


def option_inputs(cls: type, names: tuple[str, ...], **more: typing.Any) -> list[io.Input]:
    """Inputs of a node for the named options, with the command line's defaults and help, and ``more`` of each."""
    hints = options.hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return [_input(name, hints[name], fields[name], more) for name in names]


def _input(name: str, hint: typing.Any, field: dataclasses.Field, more: dict[str, typing.Any]) -> io.Input:
    what: dict[str, typing.Any] = {"tooltip": field.metadata["description"], "default": field.default, **more}
    if typing.get_origin(hint) is typing.Literal:
        return io.Combo.Input(name, list(typing.get_args(hint)), **what)
    if typing.get_origin(hint) is tuple:
        return io.String.Input(
            name, multiline=True, **what | {"default": "", "tooltip": f"{what['tooltip']}; one per line"}
        )
    if hint is bool:
        return io.Boolean.Input(name, **what)
    if name == "seed":  # not renewed after each run as a sampler's: the next run would train again
        return io.Int.Input(name, min=0, max=2**63 - 1, control_after_generate=False, **what)
    if hint is int:
        return io.Int.Input(name, min=0, max=1_000_000, **what)
    if hint is float:
        step = 1e-6 if what["default"] < 1e-2 else 0.01
        return io.Float.Input(name, min=0.0, max=10_000.0, step=step, round=False, **what)
    return io.String.Input(name, **what)


RESUME = io.Boolean.Input(
    "resume", default=False, optional=True, tooltip="Resume from the newest saved state of this output_name."
)


def more_input(command: str) -> io.Input:
    """The field for options as TOML; ``command`` is the command of ``run.py lora`` that takes the same options."""
    tip = f"Further options as TOML, named as on the command line (python3 run.py lora {command} --help)."
    return io.String.Input("more_options", default="", multiline=True, optional=True, tooltip=tip)


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a widget that hold anything."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def gathered(cls: type, values: dict, more: str, **ours: str):
    """Options of a node's inputs; multi-line texts become lists. GuardError or OptionError with the remedy."""
    policies.check_open("training")
    hints = options.hints(cls)
    for name, value in values.items():
        if typing.get_origin(hints[name]) is tuple:
            values[name] = lines_of(value)
    return options.load(cls, None, values | more_of(more) | ours)


def more_of(text: str) -> dict[str, typing.Any]:
    """What more_options says; OptionError where it is no TOML, GuardError for what a graph must not name."""
    found = options.parse(text)
    refuse_from_graph("more_options", found)
    return found


def refuse_from_graph(where: str, found: Iterable[str]) -> None:
    """GuardError for the name of an option that a graph must not set."""
    if refused := sorted(set(found) & set(FROM_GRAPH)):
        raise GuardError(
            f"{where}: {refused[0]} cannot be set from a graph: use inputs, or the command line.",
            code="train.option-refused",
        )


def of_this_machine(found: Trained | Share) -> Trained:
    """What sd-scripts gave; GuardError on a machine that has done its share of the work and has no file."""
    from ..training.kohya.engine import Share

    if isinstance(found, Share):
        raise GuardError(f"{found.report}: load it there.", code="kohya.other-machine")
    return found


def outcome(
    node: type[io.ComfyNode],
    trained: Trained,
    path: Path,
    handle: object,
    watch: NodeWatch,
    lines: Iterable[str] = (),
) -> io.NodeOutput:
    """What both trainings give: the LoRA on its socket, report with further ``lines``, loss curve, previews.

    On the node is what somebody should know who reads no report; hashes, layers and the data set are in the report.
    """
    steps = len(trained.losses)
    line = f"Trained in {steps} step{'s' * (steps != 1)} and saved."
    head = (saved_as(path), *lines)
    report = "\n".join((*head, trained.report))
    more = "\n".join((*head, *warnings(trained.report), *trained.remarks))
    curve = watch.finish(trained.losses)
    shown = answer(line, more, **ui.PreviewImage(curve, cls=node).as_dict())
    return io.NodeOutput((handle,), f"{line}\n{report}", curve, watch.samples(), watch.samples_without(), ui=shown)


def saved_as(path: Path) -> str:
    return f"saved as {path.name} in {path.parent.name}"


def data_set_input() -> io.Input:
    tip = "Folder of N_name folders (N repeats) with images and captions, or a data-set TOML, in the input folder."
    return io.Combo.Input("data_set", offered(data_sets()), tooltip=tip)


OUTPUTS = [
    io.String.Output(
        "report", display_name="report", tooltip="What was trained, on which data, and with which warnings."
    ),
    io.Image.Output("loss", display_name="loss", tooltip="Loss of every step, and its smoothed curve."),
    io.Image.Output("samples", display_name="samples", tooltip="The last previews, with the safety LoRA attached."),
    io.Image.Output(
        "samples_without", display_name="samples_without", tooltip="The same previews without the safety LoRA."
    ),
]


def loaded_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader; it is not changed."),
        io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
        io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
    ]
