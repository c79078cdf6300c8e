"""The arms that LoRA files give: the parts of each, in every repetition, and which are left out for want of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import LoraFile, read_lora
from ..modular_lora.files.scales import check_scale
from ..modular_lora.provenance.attestation import SAFETY_FIRST, SUM
from ..training import output, projection
from .options import ARMS, LORAS, AuditOptions, OptionError
from .plan import Arm, Part

NEEDS: Mapping[str, tuple[str, ...]] = {  # arm -> the options whose files it is made of
    "base": (),
    "safety": ("safety",),
    "task": ("task",),
    "sequential": ("safety", "sequential"),
    "modular": ("safety", "task"),
    "projected": ("safety", "projected"),
    "safety_first": ("safety", "task"),
    "minus_safety": ("safety",),
    "safety_minus_sequential": ("safety", "sequential"),
}
MEANS = {
    "base": "W0",
    "safety": "W0 + safety",
    "task": "W0 + task",
    "sequential": "W0 + safety + task trained on the safety-tuned base",
    "modular": "W0 + safety + task trained on W0",
    "projected": "W0 + safety + task projected clear of the safety LoRA",
    "safety_first": "W0 + safety + task trained on W0, which gives way where the safety LoRA acts on the prompt",
    "minus_safety": "W0 − safety",
    "safety_minus_sequential": "W0 + safety − task trained on the safety-tuned base",
}
SWEEP = "-at-"  # in names of arms with another strength; the store makes folders of them


@dataclass(frozen=True)
class Arms:
    """What is drawn on every prompt, and what only for the sweeps of strengths."""

    arms: tuple[Arm, ...]
    sweeps: tuple[Arm, ...]
    notes: tuple[str, ...]
    files: Mapping[str, str]  # LoRA file name -> SHA-256


def from_options(options: AuditOptions) -> Arms:
    """Arms of every repetition; equal ones are drawn once. Raises GuardError for files that are no LoRAs."""
    loras, notes = _loras(options)
    arms: list[Arm] = []
    sweeps: list[Arm] = []
    for seed in range(max([1, *(len(found) for found in loras.values())])):
        here = {name: found[seed % len(found)] for name, found in loras.items() if found}
        arms += _repetition(options, here, seed)
        sweeps += _sweeps(options, here, seed)
    wanted = [name for name in ARMS if name in options.arms]
    for name in wanted:
        if missing := [need for need in NEEDS[name] if not loras[need]]:
            notes.append(f"arm {name} is left out: no {' and no '.join(missing)} file is given")
    files = {lora.path.name: lora.sha256 for found in loras.values() for lora in found}
    return Arms(_once(arms), _once(sweeps), tuple(notes), files)


def shown(name: str) -> str:
    """An arm's name for readers: safety-at-0_5 is safety@0.5."""
    arm, at, strength = name.partition(SWEEP)
    return f"{arm}@{strength.replace('_', '.')}" if at else arm


def _loras(options: AuditOptions) -> tuple[dict[str, list[LoraFile]], list[str]]:
    """LoRA files by option: none, one for all repetitions, or one for each."""
    loras = {name: [_read(Path(path), name, options) for path in getattr(options, name)] for name in LORAS}
    counts = {name: len(found) for name, found in loras.items() if len(found) > 1}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise OptionError(
            f"LoRA files: {said}: give one of a kind for all repetitions, or equally many.", code="option.lora-files"
        )
    notes = []
    if options.project and "projected" in options.arms and not loras["projected"] and loras["safety"] and loras["task"]:
        tasks, safeties = loras["task"], loras["safety"]
        count = max(len(tasks), len(safeties))
        made = [_projected(options, tasks[i % len(tasks)], safeties[i % len(safeties)]) for i in range(count)]
        loras["projected"] = [lora for lora, _ in made]
        notes += [note for _, note in made]
    return loras, notes


def _read(path: Path, name: str, options: AuditOptions) -> LoraFile:
    if name != "safety":
        return read_lora(path)
    lora = read_lora(path, scale=options.safety_scale)
    check_scale(lora.name, lora.stated, lora.layers, lora.scale)
    return lora


def _projected(options: AuditOptions, task: LoraFile, safety: LoraFile) -> tuple[LoraFile, str]:
    """The task LoRA projected clear of the safety LoRA, beside the audit's images, and what that did.

    A file of these two is used again: another one would have the same weights, but its metadata in another order.
    """
    name = f"{task.path.stem}-{task.sha256[:16]}-{safety.sha256[:16]}.safetensors"
    path = Path(options.output_dir) / "projected" / name
    if path.exists():
        lora = read_lora(path)
        return lora, f"{name}: projected before, {lora.metadata.get(output.PROJECTED_KEY, 'residual unknown')}"
    tensors, report = projection.project_file(task, [safety])
    lora = output.write_tensors(path, tensors, output.projected_metadata(task, [safety], report))
    return lora, projection.format_projection(report, rows=False).replace("\n", "; ")


def _repetition(options: AuditOptions, here: Mapping[str, LoraFile], seed: int) -> Iterable[Arm]:
    for name in ARMS:
        if name in options.arms and all(need in here for need in NEEDS[name]):
            combine = SAFETY_FIRST if name == "safety_first" else SUM
            yield Arm(name, tuple(_parts(options, here, name)), seed, combine)


def _parts(options: AuditOptions, here: Mapping[str, LoraFile], name: str) -> Iterable[Part]:
    for need in NEEDS[name]:
        strength = options.safety_strength if need == "safety" else options.task_strength
        minus = name == "minus_safety" or (name == "safety_minus_sequential" and need == "sequential")
        yield _part(here[need], need, -strength if minus else strength)


def _part(lora: LoraFile, need: str, strength: float) -> Part:
    return Part("safety" if need == "safety" else "task", str(lora.path.absolute()), lora.sha256, strength, lora.scale)


def _sweeps(options: AuditOptions, here: Mapping[str, LoraFile], seed: int) -> Iterable[Arm]:
    """The safety LoRA alone at other strengths; task LoRAs at other strengths beside the safety LoRA."""
    if "safety" not in here:
        if options.safety_sweep or options.task_sweep:
            raise GuardError(
                "safety_sweep, task_sweep: no safety LoRA is given: give one with safety.", code="audit.no-safety-lora"
            )
        return
    for strength in options.safety_sweep:
        yield Arm(_name("safety", strength), (_part(here["safety"], "safety", strength),), seed)
    if options.task_sweep and "task" not in here:
        raise GuardError("task_sweep: no task LoRA is given: give one with task.", code="audit.no-task-lora")
    for strength in options.task_sweep:
        safety = _part(here["safety"], "safety", options.safety_strength)
        yield Arm(_name("modular", strength), (safety, _part(here["task"], "task", strength)), seed)


def _name(arm: str, strength: float) -> str:
    return f"{arm}{SWEEP}{strength:g}".replace(".", "_").replace("+", "")


def _once(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Without later repetitions of the same arm: one file serves them all."""
    kept: dict[tuple, Arm] = {}
    for arm in arms:
        kept.setdefault((arm.name, arm.parts), arm)
    return tuple(kept.values())
