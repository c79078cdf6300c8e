"""Train Task LoRA, Train Safety LoRA, Dataset Report and Project Task LoRA."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io, ui

from ..comfy_host import introspection, trainer_model
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.model_folders import SAFETY_FOLDER, offered
from ..comfy_host.node_report import CATEGORY, show
from ..comfy_host.progress import NodeWatch, contact_sheet, image_tensor
from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import SafetyLora, TaskLora
from ..modular_lora.places import check_writable
from ..modular_lora.util import atomic
from ..modular_lora.util.file_state import file_state
from ..training import options, output, projection
from ..training.data import dataset
from ..training.data.config import DatasetConfig
from ..training.data.images import thumbnail
from ..training.kohya import engine as kohya
from ..training.kohya.checkout import find_engine
from ..training.options import SafetyOptions, TaskOptions
from ..training.record import Trained
from ..training.safety.train import train_safety
from ..training.task.train import configure, train_task
from .load import handles
from .sockets import SafetySocket, TaskSocket

GROUP = f"{CATEGORY}/train"
NUMBERED = re.compile(r"\d+_.*")
NAME = re.compile(r"[\w][\w .+-]*")
FROM_GRAPH = (  # files, folders and services that a graph must not name
    "output_name", "output_dir", "train_data_dir", "reg_data_dir", "dataset_config", "resume", "safety_lora",
    "safety_strength", "safety_scale", "network_weights", "known_bases", "log_with",
)  # fmt: skip
TASK = (
    "output_name", "network_dim", "network_alpha", "target", "learning_rate", "max_train_steps", "train_batch_size",
    "resolution", "seed", "optimizer_type", "lr_scheduler", "lr_warmup_steps", "mixed_precision",
    "gradient_checkpointing", "network_train_text_encoder", "min_snr_gamma", "noise_offset", "project",
    "save_every_n_steps", "sample_every_n_steps", "sample_prompts",
)  # fmt: skip
SAFETY = (
    "output_name", "concept", "synonyms", "preserve", "objective", "network_dim", "network_alpha", "target",
    "learning_rate", "max_train_steps", "train_batch_size", "train_size", "negative_guidance", "preserve_weight",
    "seed", "optimizer_type", "lr_scheduler", "lr_warmup_steps", "mixed_precision", "gradient_checkpointing",
    "save_every_n_steps", "sample_every_n_steps", "sample_prompts",
)  # fmt: skip


def option_inputs(cls: type, names: tuple[str, ...]) -> list[io.Input]:
    """Inputs of a node for the named options, with the command line's defaults and help."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return [_input(name, hints[name], fields[name]) for name in names]


def _input(name: str, hint: typing.Any, field: dataclasses.Field) -> io.Input:
    what: dict[str, typing.Any] = {"tooltip": field.metadata["description"], "default": field.default}
    if typing.get_origin(hint) is typing.Literal:
        return io.Combo.Input(name, list(typing.get_args(hint)), **what)
    if typing.get_origin(hint) is tuple:
        return io.String.Input(
            name, multiline=True, **what | {"default": "", "tooltip": f"{what['tooltip']}; one a line"}
        )
    if hint is bool:
        return io.Boolean.Input(name, **what)
    if name == "seed":  # not renewed after each run as a sampler's: the next run would train again
        return io.Int.Input(name, min=0, max=2**63 - 1, control_after_generate=False, **what)
    if hint is int:
        return io.Int.Input(name, min=0, max=1_000_000, **what)
    if hint is float:
        step = 1e-6 if field.default < 1e-2 else 0.01
        return io.Float.Input(name, min=0.0, max=10_000.0, step=step, round=False, **what)
    return io.String.Input(name, **what)


MORE = io.String.Input(
    "more_options",
    default="",
    multiline=True,
    optional=True,
    tooltip="Further options as TOML, named as on the command line (python -m training train-task --help).",
)
ENGINE = io.Combo.Input(
    "engine",
    ["embedded", "kohya"],
    default="embedded",
    optional=True,
    tooltip="embedded: on the model as loaded. kohya: a checkout of sd-scripts that the host set (SD_SCRIPTS_PATH).",
)
FILES = io.String.Input(
    "kohya_files",
    default="",
    multiline=True,
    optional=True,
    tooltip="kohya engine: further files of the model as TOML, e.g. Flux: ae = 'ae.safetensors', clip_l and t5xxl.",
)
RESUME = io.Boolean.Input(
    "resume", default=False, optional=True, tooltip="Go on from the newest saved state of this output_name."
)


def gathered(cls: type, values: dict, more: str, **ours: str):
    """Options of a node's inputs; multi-line texts become lists. GuardError or OptionError with the remedy."""
    policies.check_open("training")
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if typing.get_origin(hints[name]) is tuple:
            values[name] = tuple(line.strip() for line in value.splitlines() if line.strip())
    extra = options.parse(more)
    if refused := sorted(set(extra) & set(FROM_GRAPH)):
        raise GuardError(f"more_options: {refused[0]} cannot be set from a graph: use inputs, or the command line.")
    return options.load(cls, None, values | extra | ours)


def check_name(option: str, name: str, named: str) -> None:
    """GuardError for a text that cannot name a file or folder of ours on every system."""
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        raise GuardError(
            f"{option} {name!r}: letters, digits, _, spaces and . + - only, no space or mark but _ first, no dot or "
            f"space last: it names {named}."
        )


def files_of(text: str) -> dict[str, str]:
    """kohya_files as names by part; GuardError or OptionError for anything else."""
    found = options.parse(text)
    if wrong := [name for name, value in found.items() if not isinstance(value, str)]:
        raise GuardError(f"kohya_files: {wrong[0]} is no text: write {wrong[0]} = 'file name'.")
    return found


def data_sets() -> list[str]:
    """Folders of N_name folders, and data-set TOML files, in ComfyUI's input folder."""
    root = Path(folder_paths.get_input_directory())
    entries = sorted(root.iterdir(), key=lambda e: e.name) if root.is_dir() else []
    return [e.name for e in entries if e.suffix == ".toml" or (e.is_dir() and any(map(_numbered, e.iterdir())))]


def _numbered(folder: Path) -> bool:
    return folder.is_dir() and bool(NUMBERED.fullmatch(folder.name))


def data_set_option(name: str) -> dict[str, str]:
    """The option for a name in the drop-down, which ComfyUI 0.3.75 does not check a value against (0.33.0 does)."""
    if name not in data_sets():
        raise GuardError(f"Data set {name!r} is no data set in the input folder: put it there and refresh the page.")
    path = Path(folder_paths.get_input_directory()) / name
    return {"dataset_config" if path.suffix == ".toml" else "train_data_dir": str(path)}


def inside(made: TaskOptions) -> DatasetConfig:
    """The data set; DatasetError where it is outside ComfyUI's input folder, whether or not anything is there."""
    return configure(made, Path(folder_paths.get_input_directory()))


def data_set_input() -> io.Input:
    tip = "Folder of N_name folders (N repeats) with pictures and captions, or a data-set TOML, in the input folder."
    return io.Combo.Input("data_set", offered(data_sets()), tooltip=tip)


def data_set_state(name: str) -> str:
    """Changes with the data set's files, so that a cached training or report is not taken for a new one."""
    chosen = data_set_option(name)
    places = [Path(path) for path in chosen.values()]
    if "dataset_config" in chosen:
        places += inside(options.load(TaskOptions, None, chosen)).folders
    files = sorted(p for place in places for p in (place, *place.rglob("*")) if p.is_file())
    found = [(str(file), file_state(file)) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def work_folder(name: str) -> Path:
    """Where a training of that name keeps checkpoints, states, previews and logs; GuardError for what is no name."""
    check_name("output_name", name, "the file")
    return Path(folder_paths.get_output_directory()) / "modular_lora" / name


def newest_state(name: str) -> Path | None:
    """The folder of the newest saved state of a training of that name."""
    kinds = f"{name}-step*-state", f"{name}-state"  # sd-scripts' last one has no step
    states = (folder for kind in kinds for folder in work_folder(name).glob(kind))
    return max(states, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), default=None)


def state_to_resume(name: str, resume: bool) -> str:
    """Its path as an option; "" where none is wanted. GuardError where there is none."""
    found = newest_state(name) if resume else None
    if resume and found is None:
        raise GuardError(f"resume: {name} has no saved state: switch resume off, and it starts anew.")
    return str(found) if found else ""


def model_folder(kind: str) -> Path:
    return Path(folder_paths.get_folder_paths(kind)[0])


def published(trained: Trained, folder: str) -> Path:
    """A copy of the LoRA in a model folder under a name of its own, whole or not at all."""
    target = model_folder(folder)
    target.mkdir(parents=True, exist_ok=True)
    stem = trained.lora.path.stem
    free = (target / f"{stem}{f'_{i:03d}' if i else ''}.safetensors" for i in range(10_000))
    path = next(p for p in free if not p.exists())
    with atomic.replacing(path) as part:
        shutil.copyfile(trained.lora.path, part)
    return path


@contextmanager
def going_on(node: type[io.ComfyNode], name: str) -> Iterator[None]:
    """ComfyUI's interrupt button ends what is inside; the node then says where the training can be gone on from."""
    try:
        yield
    except InterruptProcessingException:
        kept = newest_state(name)
        show(node, f"stopped; {kept.name} is kept: switch resume on to go on from it" if kept else "stopped; no state")
        raise


def outcome(node: type[io.ComfyNode], trained: Trained, path: Path, handle: object, watch: NodeWatch) -> io.NodeOutput:
    """What both trainings give: the LoRA on its socket, report, loss curve, previews."""
    report = f"saved as {path.name} in {path.parent.name}\n{trained.report}"
    show(node, report)
    curve = watch.finish(trained.losses)
    return io.NodeOutput((handle,), report, curve, watch.samples(), ui=ui.PreviewImage(curve, cls=node))


OUTPUTS = [
    io.String.Output("report", display_name="report", tooltip="What was trained, on what, and what was noticed."),
    io.Image.Output("loss", display_name="loss", tooltip="Loss of every step, and its smoothed curve."),
    io.Image.Output("samples", display_name="samples", tooltip="The last previews, safety LoRA attached."),
]


def engine_inputs() -> list[io.Input]:
    found = [name for kind in trainer_model.BASE_FOLDERS for name in folder_paths.get_filename_list(kind)]
    names = offered(found)
    tip = "kohya engine: the file of the checkpoint that is loaded, which sd-scripts reads by itself."
    return [ENGINE, io.Combo.Input("ckpt_name", ["", *names], default="", optional=True, tooltip=tip), FILES]


def _loaded_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader; it is not changed."),
        io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
        io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
    ]


class TrainTaskLora(io.ComfyNode):
    """A task LoRA on W0; the safety LoRA is recorded, shown in previews, and out of the training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraTrainTask",
            display_name="Train Task LoRA",
            category=GROUP,
            description="Trains a LoRA on captioned pictures, on the pretrained weights alone. The safety LoRA is "
            "frozen and detached: it is attached for previews only, so that they show what will be served.",
            inputs=[
                *_loaded_inputs(),
                data_set_input(),
                *option_inputs(TaskOptions, TASK),
                SafetySocket.Input("safety_lora", optional=True, tooltip="The safety LoRA it will be used with."),
                MORE,
                RESUME,
                *engine_inputs(),
            ],
            outputs=[
                TaskSocket.Output("task_lora", display_name="task_lora", tooltip="The new LoRA, for Guard Model."),
                *OUTPUTS,
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, data_set, **_):
        return data_set_state(data_set)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        data_set,
        safety_lora=(),
        more_options="",
        resume=False,
        engine="",
        ckpt_name="",
        kohya_files="",
        **values,
    ):
        safety, name = handles(safety_lora, SafetyLora), values["output_name"]
        ours = {
            "output_dir": str(work_folder(name)),
            "resume": state_to_resume(name, resume),
            **data_set_option(data_set),
        }
        made = gathered(TaskOptions, values, more_options, **ours)
        data, watch = inside(made), NodeWatch(cls)
        check_writable(model_folder("loras"), "loras folder")
        with going_on(cls, name):
            if engine == "kohya":
                base = trainer_model.kohya_base(model, clip, ckpt_name, made, files_of(kohya_files))
                trained = kohya.train_task(find_engine(), made, base, watch, safety, data=data)
            else:
                with trainer_model.opened(model, clip, vae, made, made.network_train_text_encoder) as opened:
                    trained = train_task(opened, made, watch, safety, engine=trainer_model.ENGINE, data=data)
        path = published(trained, "loras")
        return outcome(cls, trained, path, TaskLora(read_lora(path), 1.0, 1.0), watch)


class TrainSafetyLora(io.ComfyNode):
    """A safety LoRA that erases a concept given by prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraTrainSafety",
            display_name="Train Safety LoRA",
            category=GROUP,
            description="Trains a LoRA that takes a concept away, from prompts alone (ESD, SDD or LECO), and holds "
            "what is listed under preserve to what the base does.",
            inputs=[*_loaded_inputs(), *option_inputs(SafetyOptions, SAFETY), MORE, RESUME, *engine_inputs()],
            outputs=[
                SafetySocket.Output(
                    "safety_lora", display_name="safety_lora", tooltip="The new LoRA, for Guard Model."
                ),
                *OUTPUTS,
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, more_options="", resume=False, engine="", ckpt_name="", kohya_files="", **values
    ):
        name = values["output_name"]
        ours = {"output_dir": str(work_folder(name)), "resume": state_to_resume(name, resume)}
        made, watch = gathered(SafetyOptions, values, more_options, **ours), NodeWatch(cls)
        check_writable(model_folder(SAFETY_FOLDER), f"{SAFETY_FOLDER} folder")
        with going_on(cls, name):
            if engine == "kohya":
                base = trainer_model.kohya_base(model, clip, ckpt_name, made, files_of(kohya_files))
                trained = kohya.train_safety(find_engine(), made, base, watch)
            else:
                with trainer_model.opened(model, clip, vae, made) as opened:
                    trained = train_safety(opened, made, watch, engine=trainer_model.ENGINE)
        path = published(trained, SAFETY_FOLDER)
        return outcome(cls, trained, path, SafetyLora(read_lora(path), 1.0), watch)


class DatasetReport(io.ComfyNode):
    """A data set looked through before anything is trained on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraDatasetReport",
            display_name="Dataset Report",
            category=GROUP,
            description="Counts and names what a data set holds: pictures, captions, buckets; broken pictures, empty "
            "or missing captions, duplicates.",
            inputs=[data_set_input(), *option_inputs(TaskOptions, ("resolution", "train_batch_size"))],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="Counts and names."),
                io.Image.Output("pictures", display_name="pictures", tooltip="The first 48 pictures."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, data_set, **_):
        return data_set_state(data_set)

    @classmethod
    def execute(cls, data_set, resolution, train_batch_size) -> io.NodeOutput:
        values = {"resolution": resolution, "train_batch_size": train_batch_size, **data_set_option(data_set)}
        found = dataset.scan(inside(options.load(TaskOptions, None, values)), NodeWatch(cls).read)
        report = dataset.format_report(found)
        show(cls, report)
        sheet = contact_sheet([thumbnail(p.path, 96) for p in found.pictures[:48]], 96, 8)
        picture = image_tensor(sheet)
        return io.NodeOutput(report, picture, ui=ui.PreviewImage(picture, cls=cls))


class ProjectTaskLora(io.ComfyNode):
    """An existing task LoRA kept clear of a safety LoRA's row space, as a new file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraProjectTask",
            display_name="Project Task LoRA",
            category=GROUP,
            description="Takes out of a task LoRA what answers to the safety LoRA's inputs: on each layer, and for "
            "inputs in the safety LoRA's row space, the two together then answer as the safety LoRA alone.",
            inputs=[
                io.Model.Input("model", tooltip="The model that gives the layers their names; it is not changed."),
                io.Clip.Input("clip", tooltip="Its CLIP, for layers of the text encoder."),
                TaskSocket.Input("task_lora", tooltip="One task LoRA, from Load Task LoRA."),
                SafetySocket.Input("safety_lora", tooltip="From Load Safety LoRA."),
                io.Combo.Input(
                    "save_precision", list(output.DTYPES), default="fp16", tooltip="Type of the new file's numbers."
                ),
            ],
            outputs=[
                TaskSocket.Output("task_lora_out", display_name="task_lora", tooltip="The new LoRA, for Guard Model."),
                io.String.Output("report", display_name="report", tooltip="Energy removed, layer by layer."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, task_lora, safety_lora, save_precision) -> io.NodeOutput:
        tasks, safety = handles(task_lora, TaskLora), handles(safety_lora, SafetyLora)
        if len(tasks) != 1:
            raise GuardError(
                f"Project Task LoRA got {len(tasks)} task LoRAs: connect one, and project the others apart."
            )
        task, loras = tasks[0], [s.lora for s in safety]
        infos = (introspection.model_info(model), introspection.clip_info(clip))
        tensors, report = projection.project_file(task.lora, loras, infos, output.DTYPES[save_precision])
        path = model_folder("loras") / f"{task.lora.path.stem}_projected.safetensors"
        lora = output.write_tensors(path, tensors, output.projected_metadata(task.lora, loras, report))
        text = projection.format_projection(report)
        show(cls, f"saved as {path.name}\n" + projection.format_projection(report, rows=False))
        return io.NodeOutput((dataclasses.replace(task, lora=lora),), text)
