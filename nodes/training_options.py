"""Task and Safety Training Options: every option of a training that its node does not show, each as the preset has it
until it is set; and how a training node puts together what it was asked for.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..comfy_host.enforcement import policy as policies
from ..comfy_host.model_folders import BASE_FOLDERS, file_names
from ..comfy_host.prompt_inputs import unlisted
from ..modular_lora.errors import GuardError
from ..training import options, presets
from ..training.options import Options, SafetyOptions, TaskOptions
from .search_words import found_by
from .sockets import SafetyOptionsSocket, TaskOptionsSocket, rarely
from .training import FROM_GRAPH, GROUP, lines_of, more_input, more_of, refuse_from_graph

AS_PRESET, YES, NO = "preset", "yes", "no"
NONE = "none"  # of the presets
UNSET = -1  # of a number; below zero are only the default of factor, and
BELOW_ZERO = {"density_mean"}  # which more_options takes
TASK_SHOWN = ("preset", "data_set", "output_name", "max_train_steps", "seed", "resume")  # on the training nodes
SAFETY_SHOWN = ("preset", "output_name", "concept", "preserve", "max_train_steps", "seed", "resume")
OFTEN = {  # what is not folded away; see sockets.rarely
    "algo", "network_dim", "network_alpha", "learning_rate", "train_batch_size", "resolution", "train_size",
    "objective", "synonyms", "mixed_precision", "gradient_checkpointing", "save_every_n_steps", "sample_every_n_steps",
    "sample_prompts", "sample_size",
}  # fmt: skip


@dataclass(frozen=True)
class Handed:
    """What an options node hands to a training node: the options that were set there, and the engine."""

    values: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "embedded"
    ckpt_name: str = ""
    kohya_files: str = ""


@dataclass(frozen=True)
class Asked:
    """What a training node was asked for; ``lines`` belong on its report."""

    options: Any  # TaskOptions or SafetyOptions
    handed: Handed
    lines: tuple[str, ...]


class TaskTrainingOptions(io.ComfyNode):
    """The options of Train Task LoRA that it does not show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema("Task", TaskOptions, TASK_SHOWN, TaskOptionsSocket)

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(_handed(TaskOptions, given))


class SafetyTrainingOptions(io.ComfyNode):
    """The options of Train Safety LoRA that it does not show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema("Safety", SafetyOptions, SAFETY_SHOWN, SafetyOptionsSocket)

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(_handed(SafetyOptions, given))


def _schema(kind: str, cls: type[Options], shown: tuple[str, ...], socket: type[io.ComfyTypeIO]) -> io.Schema:
    names = [f.name for f in dataclasses.fields(cls) if f.name not in {*shown, *FROM_GRAPH, *BELOW_ZERO}]
    inputs = [*_inputs(cls, names), more_input(f"train-{kind.lower()}"), *_engine_inputs()]
    tip = f"For the options input of Train {kind} LoRA."
    return io.Schema(
        node_id=f"ModularLora{kind}TrainingOptions",
        **found_by("training options", "learning rate", "rank", "optimizer", "train lora", "kohya"),
        display_name=f"{kind} Training Options",
        category=GROUP,
        description=f"What Train {kind} LoRA does not show. An input that is left at preset, -1 or empty is as the "
        "preset says and, where that says nothing, at the option's default; one that is set wins over the preset.",
        inputs=rarely(inputs, *(one.id for one in inputs if one.id not in OFTEN)),
        outputs=[socket.Output("options", display_name="options", tooltip=tip)],
    )


def _inputs(cls: type[Options], names: list[str]) -> list[io.Input]:
    hints = options.hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return [_input(name, hints[name], fields[name]) for name in names]


def _input(name: str, hint: Any, of: dataclasses.Field) -> io.Input:
    tip = of.metadata["description"]
    if hint is bool:
        return io.Combo.Input(name, [AS_PRESET, YES, NO], default=AS_PRESET, optional=True, tooltip=tip)
    if typing.get_origin(hint) is typing.Literal:
        choices = [AS_PRESET, *map(str, typing.get_args(hint))]
        return io.Combo.Input(name, choices, default=AS_PRESET, optional=True, tooltip=tip)
    if typing.get_origin(hint) is tuple:
        return io.String.Input(name, multiline=True, default="", optional=True, tooltip=f"{tip}; one per line")
    if hint is int:
        return io.Int.Input(name, min=UNSET, max=1_000_000, default=UNSET, optional=True, tooltip=tip)
    if hint is float:
        default: Any = of.default
        step, most = 1e-6 if default < 1e-2 else 0.01, 10_000.0
        limits: dict[str, Any] = {"min": float(UNSET), "max": most, "step": step, "round": False}
        return io.Float.Input(name, default=float(UNSET), optional=True, tooltip=tip, **limits)
    return io.String.Input(name, default="", optional=True, tooltip=tip)


def _engine_inputs() -> list[io.Input]:
    engine_tip = (
        "embedded: on the model as loaded. kohya: a checkout of sd-scripts that the host set (SD_SCRIPTS_PATH)."
    )
    name_tip = "kohya engine: the file of the loaded checkpoint, which sd-scripts reads itself."
    files_tip = "kohya engine: further files of the model as TOML, e.g. Flux: ae = 'ae.safetensors', clip_l and t5xxl."
    names = ["", *file_names(*BASE_FOLDERS)]
    return [
        io.Combo.Input("engine", ["embedded", "kohya"], default="embedded", optional=True, tooltip=engine_tip),
        io.Combo.Input("ckpt_name", names, default="", optional=True, tooltip=name_tip),
        io.String.Input("kohya_files", default="", multiline=True, optional=True, tooltip=files_tip),
    ]


def _handed(cls: type[Options], given: dict[str, Any]) -> Handed:
    more, engine = more_of(given.pop("more_options", "")), _engine_of(given)
    hints, values = options.hints(cls), {}
    for name, value in _written(given).items():
        if value not in (AS_PRESET, UNSET):
            values[name] = _value(hints[name], value)
    return Handed(values | more, **engine)


def _engine_of(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given.pop(name) for name in ("engine", "ckpt_name", "kohya_files") if name in given}


def _written(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without those whose text is empty: nothing was given there."""
    return {name: value for name, value in inputs.items() if not isinstance(value, str) or value.strip()}


def _value(hint: Any, value: Any) -> Any:
    """The value of an option that an input's value stands for."""
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        return lines_of(value)
    if typing.get_origin(hint) is typing.Literal:
        return next((one for one in typing.get_args(hint) if str(one) == value), value)
    return value == YES if hint is bool and value in (YES, NO) else value


def asked(
    node: type[io.ComfyNode],
    cls: type[Options],
    given: dict[str, Any],
    handed: Handed | None,
    group: Callable[[], str],
    **ours: str,
) -> Asked:
    """The options of a training: the preset's, over these the options node's, over these the node's own.

    An input of a text or a list that is empty asks for nothing, whatever is asked for elsewhere.

    Inputs that the training nodes had until they showed a preset are options still: programs and saved prompts that
    give them by name get what they ask for, and a line says so of each name that is none.

    Args:
        node: The training node, as it runs.
        cls: Which options.
        given: Its inputs beside those that bring objects, and linked ones that its schema does not have.
        handed: What an options node gave.
        group: Gives the group of the model (training/presets); asked where there is a preset.
        ours: Options that no graph sets.
    """
    policies.check_open("training")
    hints, handed = options.hints(cls), handed or Handed()
    listed = {one.id for one in node.define_schema().inputs}
    further = unlisted(node, listed) | {name: given.pop(name) for name in set(given) - listed}
    engine, more = _engine_of(further), more_of(further.pop("more_options", ""))
    strange = sorted(set(further) - set(hints))
    refuse_from_graph("the node", further)
    former = {name: value for name, value in _written(further).items() if name in hints} | more
    if given.get("max_train_steps") == 0:
        del given["max_train_steps"]  # as the preset says
    if given.get("preset") == NONE:
        del given["preset"]
    asked_for = dict(handed.values) | former | _written(given)
    values = {name: _value(hints.get(name), value) for name, value in asked_for.items()}
    made = presets.load(cls, None, values | ours, group() if "preset" in values else presets.GROUPS[0])
    lines = tuple(f"input {name}: Train nodes have none of that name, NOTHING was done with it" for name in strange)
    return Asked(made, dataclasses.replace(handed, **engine), lines)


def files_of(text: str) -> dict[str, str]:
    """kohya_files as names by part; GuardError or OptionError for anything else."""
    found = options.parse(text)
    if wrong := [name for name, value in found.items() if not isinstance(value, str)]:
        raise GuardError(f"kohya_files: {wrong[0]} is not text: write {wrong[0]} = 'file name'.")
    return found


def preset_input(cls: type[Options]) -> io.Input:
    """The presets of a training; a prompt without one has the options' own defaults, as before there were presets."""
    names = [name for name in typing.get_args(options.hints(cls)["preset"]) if name]
    tip = "Option values for a purpose, by the model's family; what is set here or on an options node wins over them."
    return io.Combo.Input("preset", [NONE, *names], default=names[0], optional=True, tooltip=tip)


def steps_input() -> io.Input:
    tip = "Optimizer steps; 0: as the preset says."
    return io.Int.Input("max_train_steps", min=0, max=1_000_000, default=0, tooltip=tip)


def options_input(socket: type[io.ComfyTypeIO], kind: str) -> io.Input:
    return socket.Input("options", optional=True, tooltip=f"All other options, from {kind} Training Options.")
