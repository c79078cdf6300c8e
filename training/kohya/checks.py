"""What the network module for sd-scripts refuses, and what it writes into a file's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile
from ...modular_lora.files.scales import Scale
from ...modular_lora.guard.build import BASE_KEY, CONTAMINATED_KEY, ROLE_KEY
from ...modular_lora.guard.concept import PROMPTS_KEY
from ...modular_lora.util import plain_json
from ..contamination import check_start
from ..metadata_keys import CONCEPT_KEY, DATASET_KEY, ENGINE_KEY, INITIALISATION_KEY, LEAKS, PROJECTED_KEY, SAFETY_KEY

LAYERS_KEY = "modular_lora.layers"  # how many layers were trained; the launcher counts them in the file
STATE = "modular_lora.json"  # beside a training state that sd-scripts saves
FILE_HASH_KEY = "ss_new_sd_model_hash"  # sd-scripts: SHA-256 of the checkpoint file

SCALES: dict[str, Scale] = {word: word for word in get_args(Scale)}
_CHOICES = {
    "role": ("task", "safety"),
    "project": ("none", "weight"),
    "target": ("cross-attention", "attention", "linear", "conv"),
    "allow_contaminated_base": ("no", "yes"),
    "dataset_metadata": ("yes", "no"),
}
_LEAKS = (*LEAKS, "ss_datasets", "ss_reg_dataset_dirs", "ss_leco_preview", "ss_leco_prompts_file")


@dataclass(frozen=True)
class Settings:
    """What our network module takes from ``--network_args`` (key=value)."""

    role: str = "task"  # task or safety
    safety: str = ""  # files of the safety LoRAs, os.pathsep between them
    safety_strength: str = "1.0"  # in previews: one for all, or one each with commas between
    safety_scale: str = "refuse"  # refuse, tensors or metadata (modular_lora.files.scales.Scale), likewise
    project: str = "none"  # none or weight
    target: str = "linear"  # cross-attention, attention, linear, conv
    init_seed: str = ""  # "": --seed
    base_name: str = "the base"
    base_sha256: str = ""  # of its contents (tensor_hashing.weights_sha256), where the caller knows it
    base_file_sha256: str = ""
    base_version: str = ""  # ss_base_model_version where the script says none
    known_bases: str = ""  # registries, see contamination.known_bases, os.pathsep between them
    allow_contaminated_base: str = "no"
    dataset_sha256: str = ""
    concept: str = ""
    concept_prompts: str = ""  # the value of concept.PROMPTS_KEY
    engine: str = "sd-scripts"  # name and version, for the metadata
    dataset_metadata: str = "yes"  # no: captions, folder and output names stay out of the file

    @staticmethod
    def take(kwargs: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """Ours, and what is left for the wrapped network; GuardError for a value that does not fit."""
        settings = Settings(**{name: str(value) for name, value in kwargs.items() if name in NAMES})
        settings.check()
        return settings, {name: value for name, value in kwargs.items() if name not in NAMES}

    @property
    def safety_files(self) -> list[Path]:
        return [Path(path) for path in self.safety.split(os.pathsep) if path]

    @property
    def strengths(self) -> list[float]:
        """One for each of `safety_files`."""
        given = [float(text) for text in self.safety_strength.split(",")]
        return given * len(self.safety_files) if len(given) == 1 else given

    @property
    def scales(self) -> list[Scale]:
        """One for each of `safety_files`."""
        given = [SCALES[word] for word in self.safety_scale.split(",")]
        return given * len(self.safety_files) if len(given) == 1 else given

    def check(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise GuardError(
                    f"--network_args {name}={value}: is not one of {', '.join(choices)}: choose one.",
                    code="kohya.argument",
                )
        if self.role == "safety" and (self.safety or self.project == "weight"):
            raise GuardError(
                "--network_args role=safety: takes neither safety nor project: leave them out.", code="kohya.argument"
            )
        if self.project == "weight" and not self.safety:
            raise GuardError(
                "--network_args project=weight: no safety LoRA to project against: add safety=FILE.",
                code="kohya.argument",
            )
        try:
            count, _ = len(self.strengths), int(self.init_seed or 0)
        except ValueError as error:
            raise GuardError(
                f"--network_args safety_strength or init_seed: {error}: give numbers.", code="kohya.argument"
            ) from error
        if self.safety and count != len(self.safety_files):
            raise GuardError(
                f"--network_args safety_strength: {count} for {len(self.safety_files)} LoRAs: give one or as many.",
                code="kohya.argument",
            )
        words = self.safety_scale.split(",")
        if not SCALES.keys() >= set(words) or (self.safety and len(self.scales) != len(self.safety_files)):
            known = ", ".join(SCALES)
            raise GuardError(
                f"--network_args safety_scale={self.safety_scale}: must be one of {known} for each LoRA.",
                code="kohya.argument",
            )


NAMES = {f.name for f in fields(Settings)}


def check_arguments(args: Any) -> None:
    """GuardError for arguments of sd-scripts that would put more than W0 into the forward or lose the metadata."""
    if getattr(args, "base_weights", None):
        raise GuardError(
            f"--base_weights {args.base_weights}: merges LoRAs into W0: leave it out.", code="kohya.merges"
        )
    if getattr(args, "save_model_as", None) not in (None, "safetensors"):
        raise GuardError(
            f"--save_model_as {args.save_model_as}: has no metadata and can run code: use safetensors.",
            code="kohya.save-format",
        )


def check_weights(lora: LoraFile, settings: Settings, safety: tuple[LoraFile, ...]) -> None:
    """GuardError unless a LoRA to go on from has this role and was trained on this W0, and on nothing more."""
    if settings.role == "task":
        check_start(lora, safety)
    elif (role := lora.metadata.get(ROLE_KEY)) != settings.role:
        raise GuardError(
            f"{lora.name} is a {role or 'task'} LoRA: start from a safety LoRA, or from none.",
            code="start.other-role",
        )
    pairs = ((BASE_KEY, settings.base_sha256), (FILE_HASH_KEY, settings.base_file_sha256))
    known = [(key, lora.metadata[key], here) for key, here in pairs if lora.metadata.get(key) and here]
    if known and known[0][1] != known[0][2]:
        key, there, here = known[0]
        raise GuardError(
            f"{lora.name} was trained on another base ({key} {there[:12]}, here {here[:12]}): use a LoRA of this base.",
            code="start.other-base",
        )
    if not known and any(here for _, here in pairs):
        raise GuardError(
            f"{lora.name} names no base that can be compared with this one ({BASE_KEY}, {FILE_HASH_KEY}): start from a "
            "LoRA that does, or from none.",
            code="start.no-base",
        )


def state_of(args: Any, settings: Settings, safety: tuple[LoraFile, ...]) -> dict[str, str]:
    """Values that must match for a training state to be resumed."""
    found = {name: str(getattr(args, name, "")) for name in ("network_dim", "network_alpha", "optimizer_type")}
    names = ("role", "base_sha256", "base_file_sha256", "project", "target", "dataset_sha256")
    found |= {name: getattr(settings, name) for name in names}
    return found | {"safety_sha256": ",".join(lora.sha256 for lora in safety)}


def check_state(folder: str, record: Mapping[str, str]) -> None:
    """GuardError unless a training state to resume was saved whole by a run like this one."""
    name = Path(folder).name
    try:
        saved = plain_json.read_object(Path(folder) / STATE)
    except (OSError, ValueError) as error:
        raise GuardError(
            f"resume {name}: has no readable {STATE}, so its base and role are unknown: resume a state that this "
            "trainer saved whole, or start anew.",
            code="resume.no-state",
        ) from error
    for key, value in record.items():
        if saved.get(key) != value:
            raise GuardError(
                f"resume {name}: {key} was {saved.get(key)!r} and is {value!r} now: set it back, or start anew.",
                code="resume.changed",
            )


def metadata_of(settings: Settings, module: str, metadata: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """sd-scripts' metadata without what is ours alone or private, and the guard's keys; text only.

    ``module`` is the network module that was wrapped, ``own`` what only the network knows.
    """
    found = dict(metadata)
    if "ss_network_args" in found:
        args = json.loads(found["ss_network_args"])
        found["ss_network_args"] = json.dumps({name: value for name, value in args.items() if name not in NAMES})
    found["ss_network_module"] = module
    if settings.base_version:
        found.setdefault("ss_base_model_version", settings.base_version)
    if settings.base_file_sha256:
        found.setdefault(FILE_HASH_KEY, settings.base_file_sha256)
    if settings.dataset_metadata == "no":
        found = {key: value for key, value in found.items() if key not in _LEAKS}
        if "modelspec.title" in found:
            found["modelspec.title"] = "LoRA"
    found |= {ROLE_KEY: settings.role, BASE_KEY: settings.base_sha256, ENGINE_KEY: settings.engine}
    found |= {DATASET_KEY: settings.dataset_sha256, CONCEPT_KEY: settings.concept, **own}
    found[PROMPTS_KEY] = settings.concept_prompts
    return {key: str(value) for key, value in found.items() if value not in ("", None)}


def own_metadata(
    safety: tuple[LoraFile, ...], contaminated: str, initialisation: str, residual: float | None, layers: int
) -> dict[str, str]:
    """The guard's keys that only the network in training can fill in."""
    return {
        SAFETY_KEY: ",".join(lora.sha256 for lora in safety),
        CONTAMINATED_KEY: contaminated,
        INITIALISATION_KEY: initialisation,
        PROJECTED_KEY: "" if residual is None else f"residual {residual:.1e}",
        LAYERS_KEY: str(layers),
    }
