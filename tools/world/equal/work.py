"""One cell of the protocol: trainings where their files are not there, images, and what the judge says of them."""

from __future__ import annotations

import datetime
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files.reader import LoraFile, read_lora
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.modular_lora.guard.safety_first import PARTS
from modular_lora_guard.training import output, projection
from modular_lora_guard.training.cli import TrainingLines

from ...benchmarks.figures import machine
from .. import ASSETS, DETECTOR, detector, lorafile, narrow
from . import drawing, training
from .drawing import Seen
from .protocol import PACK, Cell, Image, Protocol
from .results import Result

LORAS = ASSETS / "equal"
NOISE = 0x5AFE  # that safety first finds g with (comfy_host/safety_first.py), which no image's own noise has a part in


@dataclass(frozen=True)
class Bench:
    """What every cell is made with.

    Attributes:
        loras: Folder of the safety and task LoRAs; what is missing is trained.
        work: Folder of what one cell alone needs: sequential and projected LoRAs.
    """

    protocol: Protocol
    host_model: training.HostModel
    eye: detector.Detector
    loras: Path
    work: Path

    @classmethod
    def opened(cls, protocol: Protocol, loras: Path, work: Path) -> Bench:
        host_model = training.HostModel(*narrow.load(), torch.device("cpu"))
        return cls(protocol, host_model, detector.load(ASSETS / DETECTOR), loras, work)

    def run(self, cell: Cell, done: Mapping[Cell, Result]) -> Result:
        """Train what is missing, draw, judge. ``done`` has the cells before it. Raises GuardError."""
        begun, files = time.process_time(), self._files(cell, done)
        shas = {role: lora.sha256 for role, lora in files.items()}
        extra: dict[str, tuple] = {}
        if cell.arm == "safety_first":
            seen, extra["share"] = self._safety_first(cell, files, done)
        elif cell.arm == "sequential_full":
            seen = self._fully(cell, files["safety"])
        else:
            loras = [(self._factors(lora), 1.0) for lora in files.values()]
            seen = self._seen(loras, self.protocol.images())
        if cell.arm == "safety":
            extra["activity"] = self._activity(files["safety"])
        said = {"date": datetime.date.today().isoformat(), "machine": machine()}
        return Result(cell, shas, seen, time.process_time() - begun, machine=said, **extra)

    def _files(self, cell: Cell, done: Mapping[Cell, Result]) -> dict[str, LoraFile]:
        """The LoRA files of an arm by role, in the order in which they are added."""
        files: dict[str, LoraFile] = {}
        if cell.recipe:
            safety = Cell("safety", cell.recipe, "", self.protocol.safety_seed(cell.recipe, cell.training_seed))
            files["safety"] = _same(self._safety(cell.recipe, safety.training_seed), "safety", done.get(safety))
        if cell.arm in ("task", "modular", "projected", "safety_first"):
            task = Cell("task", "", cell.task, cell.training_seed)
            files["task"] = _same(self._task(cell.task, cell.training_seed), "task", done.get(task))
        if cell.arm == "projected":
            files["projected"] = self._projected(files.pop("task"), files["safety"])
        if cell.arm == "sequential":
            path = self.work / f"{slug(cell.recipe)}_{cell.task}_{cell.training_seed}.safetensors"
            files["sequential"] = self._task(cell.task, cell.training_seed, path, files["safety"])
        return files

    def _safety(self, recipe: str, seed: int) -> LoraFile:
        if given := self.protocol.recipes[recipe].get("file"):
            return read_lora(PACK / given)
        path = self.loras / f"{slug(recipe)}_{seed}.safetensors"
        if not path.exists():
            training.train_safety(self.host_model, self.protocol, recipe, seed, path, TrainingLines())
        return read_lora(path)

    def _task(self, name: str, seed: int, path: Path | None = None, under: LoraFile | None = None) -> LoraFile:
        path = path or self.loras / f"{name}_{seed}.safetensors"
        if not path.exists():
            training.train_task(self.host_model, self.protocol, name, seed, path, TrainingLines(), under)
        return read_lora(path)

    def _projected(self, task: LoraFile, safety: LoraFile) -> LoraFile:
        """The task LoRA projected clear of what the safety LoRA reads, as the audit and the trainer do it."""
        path = self.work / f"{task.path.stem}_clear_of_{safety.path.stem}.safetensors"
        tensors, said = projection.project_file(task, [safety])
        return output.write_tensors(path, tensors, output.projected_metadata(task, [safety], said))

    def _factors(self, lora: LoraFile) -> lorafile.Factors:
        return lorafile.load(lora.path, self.host_model.unet)

    def _seen(self, loras: list[tuple[lorafile.Factors, float]], images: tuple[Image, ...]) -> Seen:
        model = self.host_model
        with drawing.folded(model.unet, *loras):
            return drawing.seen(model.model, model.ae, self.eye, images, self.protocol.said["images"]["batch"])

    def _activity(self, safety: LoraFile) -> tuple[float, ...]:
        """Of the safety LoRA on every image's prompt, as safety first finds it: no task LoRA acts, and one noise."""
        prompts = [image.prompt for image in self.protocol.images()]
        different, batch = list(dict.fromkeys(prompts)), self.protocol.said["images"]["batch"]
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(NOISE))
        training.attach(self.host_model, safety)
        found: dict[str, float] = {}
        for start in range(0, len(different), batch):
            some = different[start : start + batch]
            texts = self.host_model.model.text(some)
            values = training.activities(self.host_model.model, *texts, noise.expand(len(some), -1, -1, -1)).tolist()
            found |= {prompt: float(f"{value:.5g}") for prompt, value in zip(some, values, strict=True)}
        training.attach(self.host_model)
        return tuple(found[prompt] for prompt in prompts)

    def _safety_first(
        self, cell: Cell, files: Mapping[str, LoraFile], done: Mapping[Cell, Result]
    ) -> tuple[Seen, tuple[int, ...]]:
        """Images of safety alone where g = 0, of modular where g = 1 (the same, bit for bit); others are drawn."""
        safety = done[Cell("safety", cell.recipe, "", self.protocol.safety_seed(cell.recipe, cell.training_seed))]
        modular = done[Cell("modular", cell.recipe, cell.task, cell.training_seed)]
        calibration = activity.read(files["safety"])
        if isinstance(calibration, str):
            said = f"{files['safety'].name}: safety first needs a calibration, and {calibration}."
            raise GuardError(said, code="evidence.calibration")
        shares = tuple(math.floor(PARTS * calibration.share(value)) for value in safety.activity)
        images, columns = self.protocol.images(), {}
        for share in sorted(set(shares)):
            places = [i for i, one in enumerate(shares) if one == share]
            if share in (0, PARTS):
                columns[share] = iter_rows((safety if share == 0 else modular).seen.picked(places))
                continue
            loras = [(self._factors(files["safety"]), 1.0), (self._factors(files["task"]), share / PARTS)]
            columns[share] = iter_rows(self._seen(loras, tuple(images[i] for i in places)))
        rows = [next(columns[share]) for share in shares]
        return Seen(*(tuple(column) for column in zip(*rows, strict=True))), shares

    def _fully(self, cell: Cell, safety: LoraFile) -> Seen:
        unet = self.host_model.unet
        kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        try:
            training.train_fully(self.host_model, self.protocol, cell.task, cell.training_seed, safety, TrainingLines())
            return self._seen([(self._factors(safety), 1.0)], self.protocol.images())
        finally:
            unet.load_state_dict(kept)


def iter_rows(seen: Seen):
    """Image after image: hit, top, style, ink."""
    return iter(zip(seen.hit, seen.top, seen.style, seen.ink, strict=True))


def slug(name: str) -> str:
    """A recipe's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _same(lora: LoraFile, role: str, before: Result | None) -> LoraFile:
    """GuardError where an earlier cell of the same training was drawn with another file."""
    if before and before.loras[role] != lora.sha256:
        raise GuardError(
            f"{lora.name}: its SHA-256 {lora.sha256[:12]} is not that of {before.cell} "
            f"({before.loras[role][:12]}), so their images cannot be compared: put that file back.",
            code="evidence.lora",
        )
    return lora
