"""What a training writes and says of itself: the LoRA files of its steps, and a report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modular_lora.files.reader import LoraFile
from . import output, presets
from .adapters import Layers, Spec
from .model import HostModel
from .options import SafetyOptions, TaskOptions, fingerprint


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gave.

    Attributes:
        lora: The file as read back.
        losses: Of every step.
        report: All that is said of it.
        remarks: Those lines of the report, warnings apart, that are read on the node: no hashes, layers or norms.
    """

    lora: LoraFile
    losses: tuple[float, ...]
    report: str
    remarks: tuple[str, ...]


@dataclass(eq=False)
class Record:
    """One training on one base; remembers the file that it wrote last."""

    host_model: HostModel
    options: TaskOptions | SafetyOptions
    spec: Spec
    engine: str
    base_name: str
    safety: tuple[LoraFile, ...] = ()
    contaminated: str = ""  # what the base carried, where that was overridden
    dataset: output.DatasetRecord | None = None
    started: float = field(default_factory=time.time)
    last: LoraFile | None = None
    left_out: list[str] = field(default_factory=list)  # a line for each, see `leaving_out`

    def leaving_out(self, name: str, why: str, of: str, say: Callable[[str], None]) -> Callable[[], None] | None:
        """What puts an option back to its default that the preset of group ``of`` set, and says so; else None."""
        if not presets.sets(self.options, of, name):
            return None

        def leave_out() -> None:
            default: Any = next(f.default for f in fields(self.options) if f.name == name)
            line = f"{name} {getattr(self.options, name)!r} of preset {self.options.preset} is LEFT OUT: {why}"
            self.options = replace(self.options, **{name: default})
            self.left_out.append(line)
            say(line)

        return leave_out

    @property
    def fingerprint(self) -> dict[str, str]:
        """Values that must match for a training state to be resumed."""
        shas = hashlib.sha256("".join(sorted(lora.sha256 for lora in self.safety)).encode()).hexdigest()
        found = fingerprint(self.options) | {"role": self.spec.role, "base_sha256": self.host_model.base_sha256}
        found |= {
            "safety_sha256": shas if self.safety else "",
            "layers": str(len(self.spec.unet) + len(self.spec.text)),
        }
        return found | {"dataset_sha256": self.dataset.sha256 if self.dataset else ""}

    @property
    def _initialisation(self) -> str:
        """What the adapters began as: drawn from role and seed, or from a file."""
        start = getattr(self.options, "init", "")
        return f"{self.spec.role}:{self.spec.seed}" + (f", from {Path(start).name}" if start else "")

    def write(
        self,
        path: Path,
        step: int,
        layers: Layers,
        bases: Mapping[str, Tensor] | None = None,
        activity: str = "",
    ) -> None:
        """The LoRA as of ``step``; see `output.write_layers` and `output.Provenance.activity`."""
        made = output.Provenance(
            family=self.host_model.family,
            prediction=self.host_model.schedule.prediction,
            base_sha256=self.host_model.base_sha256,
            engine=self.engine,
            steps=step,
            started=self.started,
            finished=time.time(),
            base_name=self.base_name,
            safety_sha256=tuple(lora.sha256 for lora in self.safety),
            contaminated_base=self.contaminated,
            initialisation=self._initialisation,
            dataset=self.dataset,
            activity=activity,
        )
        metadata = output.metadata(self.options, made)
        self.last = output.write_layers(path, layers, metadata, self.options.save_precision, bases)

    def trained(self, losses: Sequence[float], lines: Sequence[str], remarks: Sequence[str]) -> Trained:
        """The result; ``lines`` are those of its report below what the file is, ``remarks`` as `Trained` has them."""
        assert self.last is not None, "fit() writes at its end"
        window = losses[-min(50, len(losses)) :]
        head = [
            f"{self.last.name}: {self.spec.role} {self.spec.form.kind}, {len(self.last.layers)} layers, rank "
            f"{self.spec.rank}, alpha {self.spec.alpha:g}, {len(losses)} steps, loss {sum(window) / len(window):.4f} "
            f"(mean of the last {len(window)}), {time.time() - self.started:.0f} s",
            f"base {self.base_name or self.host_model.family}, content SHA-256 {self.host_model.base_sha256[:12]}",
            f"file SHA-256 {self.last.sha256}",
        ]
        trained = len(self.spec.unet) + len(self.spec.text)
        if zero := trained - len(self.last.layers):
            head.append(f"{zero} of {trained} layers are zero as saved, and left out of the file")
        report = "\n".join([*head, *self.host_model.notes, *self.left_out, *lines])
        return Trained(self.last, tuple(losses), report, (*self.left_out, *remarks))
