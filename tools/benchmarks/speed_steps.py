"""Steps, swaps, reading and memory, measured in a process of their own: one ComfyUI, one device, one width each.

    python -m tools.benchmarks.speed_steps JOB.json ROWS.json

JOB.json is written by tools/benchmarks/speed.py; ROWS.json takes the rows and how far the contenders' results differ.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import speed_import
from .speed_models import MAKERS, Loras, World, guard, open_world, plain, save_half
from .speed_rounds import Contender, Limits, Timing, measure, ratio

# as many as ComfyUI's own map has for each layer of a U-Net's attention (model_lora_keys_unet)
NAMES = ("{}", "diffusion_model.{}", "lycoris_{}", "unet.{}", "unet_{}", "diffusers.{}")


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    section: str  # steps, swap, reading, memory, import
    comfyui: str
    rows: dict[str, tuple[str, str]]  # name of a row -> the contenders whose times are divided
    width: str = "sd15"
    dtype: str = "float32"
    cpu: bool = True
    latent: int = 16
    threads: int = 1
    limits: dict | None = None

    @property
    def contenders(self) -> list[str]:
        """Each once, in the order of the rows."""
        return list(dict.fromkeys(name for pair in self.rows.values() for name in pair))


def two(world: World, first: int = 4, second: int = 16, kind: str = "attention") -> Loras:
    """A safety LoRA and a task LoRA."""
    return ((world.file(first, 1, kind), 1.0), (world.file(second, 2, kind), 0.7))


def loras_of(world: World, size: str) -> Loras:
    """The LoRAs of a contender, by what stands behind its name."""
    if size == "1 LoRA":
        return ((world.file(16, 2), 1.0),)
    if size == "5 LoRAs":
        return ((world.file(16, 6), 1.0), *((world.file(16, seed), 0.3) for seed in range(2, 6)))
    if size in ("half", "all"):
        return two(world, kind=size)
    return two(world, *map(int, (size or "4+16").split("+")))


def contender(world: World, name: str, latent: int) -> Contender:
    """By its name in a job: "none", "merged", "guarded 32+32", "guarded 5 LoRAs", ..."""
    kind, _, size = name.partition(" ")
    return plain(world, latent) if kind == "none" else MAKERS[kind](world, loras_of(world, size), latent)


def steps(world: World, job: Job) -> dict:
    """One evaluation of the model by every contender."""
    made = {name: contender(world, name, job.latent) for name in job.contenders}
    alike = {name: c for name, c in made.items() if " " not in name and name != "none"}
    differences = compare({"none": plain(world, job.latent), **alike})
    times = measure(made, list(job.rows.values()), Limits(**(job.limits or {})))
    return _found(job, times, world.device.type != "cpu") | {"differences": differences}


def _found(job: Job, times: dict[str, Timing], by_clock: bool = False) -> dict:
    rows = {name: ratio(times[a], times[b], by_clock).row() for name, (a, b) in job.rows.items()}
    return {"rows": rows, "seconds": {name: round(statistics.median(t.cpu), 5) for name, t in times.items()}}


def compare(made: dict[str, Contender]) -> dict[str, float]:
    """Largest difference of every contender's result to the first LoRA contender's, over the LoRAs' effect."""
    outputs = {}
    for name, contender in made.items():
        with contender.ready():
            outputs[name] = contender.work().float()
    base, first, *others = outputs.values()
    effect = (first - base).abs().max()
    return {
        "effect": float(effect / base.abs().max()),
        **{n: float((o - first).abs().max() / effect) for n, o in zip(list(outputs)[2:], others, strict=True)},
    }


def swap(world: World, job: Job) -> dict:
    """Changing the task LoRA on a loaded model, all that a user waits for.

    Core: the file is read, the old patches are undone, the new ones merged. Ours cold: nothing is remembered of
    either file or guard; warm: both task LoRAs were used before.
    """
    files, safety = [world.file(16, 10 + number) for number in range(2)], world.file(4, 1)
    start_nodes(world)
    works = {
        "core": _core_swap(world, safety, files),
        "cold": _guard_swap(world, safety, files, forget=True),
        "warm": _guard_swap(world, safety, files),
    }
    contenders = {}
    for name, work in works.items():  # one untimed swap first: the one before was another contender's
        contenders[name] = Contender(nullcontext, work)
        work(), work()
    return _found(job, measure(contenders, list(job.rows.values()), Limits(**(job.limits or {})), warm=True))


def start_nodes(world: World) -> None:
    """ComfyUI's own modules that the pack's nodes need, and the folder of the LoRA files."""
    for name in ("utils.install_util", "nodes", "server"):  # `nodes` puts another `utils` on the path
        importlib.import_module(name)
    importlib.import_module("folder_paths").add_model_folder_path("loras", str(world.folder))


def _core_swap(world: World, safety: Path, files: list[Path]) -> Callable[[], None]:
    """LoraLoader reads the file, then the sampler loads: the old patches are undone, the new ones merged."""
    from comfy import sd, utils
    from comfy.model_management import load_models_gpu

    first, turn = utils.load_torch_file(str(safety)), [0]

    def work() -> None:
        turn[0] += 1
        patcher, _ = sd.load_lora_for_models(world.patcher, None, first, 1.0, 0.0)
        lora = utils.load_torch_file(str(files[turn[0] % 2]), safe_load=True)
        patcher, _ = sd.load_lora_for_models(patcher, None, lora, 0.7, 0.0)
        load_models_gpu([patcher])

    return work


def _guard_swap(world: World, safety: Path, files: list[Path], forget: bool = False) -> Callable[[], None]:
    """Load Task LoRA, Guard Model, then what the sampler does before its first step."""
    from comfy.model_management import load_models_gpu

    load, make = world.pack("nodes.load").LoadTaskLora, world.pack("nodes.guard").GuardModel
    host, reader = world.pack("comfy_host.patcher"), world.pack("modular_lora.files.reader")
    lora, turn = (world.pack("modular_lora.guard.build").SafetyLora(reader.read_lora(safety), 1.0),), [0]

    def work() -> None:
        turn[0] += 1
        name = files[turn[0] % 2].name
        if forget:
            world.pack("comfy_host.guard_cache").guards.clear()
            world.pack("modular_lora.files.cache").forget_files()
        load.fingerprint_inputs(name)
        guarded = make.execute(world.patcher, lora, load.execute(name, 0.7, 0.7).args[0]).args[0]
        patcher = host.unwrap(guarded)
        load_models_gpu([patcher])
        patcher.guard_begin()

    return work


def reading(world: World, job: Job) -> dict:
    """A file of 9,999 keys: read, and its layers assigned to weights that have as many names as those of a U-Net."""
    from comfy import lora, utils

    files, matching = world.pack("modular_lora.files.reader"), world.pack("modular_lora.files.matching")
    spec = world.pack("modular_lora.branches.layer_spec").LayerSpec("", (640, 640))
    names = [f"lora_unet_block_{number}_attn_to_q" for number in range(3333)]
    path = world.folder / "many.safetensors"
    key_map = {form.format(name): f"{name}.weight" for name in names for form in NAMES}
    save_half(path, dict.fromkeys(names, spec), 8, 0)
    shapes = dict.fromkeys(key_map.values(), spec.weight_shape)

    def core() -> None:
        lora.load_lora(utils.load_torch_file(str(path), safe_load=True), key_map)

    def ours() -> None:
        read = files.read_lora(path)
        matching.match_layers(read, list(read.layers), key_map, shapes, "SD15")

    contenders = {"core": Contender(nullcontext, core), "guarded": Contender(nullcontext, ours)}
    return _found(job, measure(contenders, list(job.rows.values()), Limits(**(job.limits or {})), warm=True))


def memory(world: World, job: Job) -> dict:
    """Bytes that a loaded guard holds over bytes of the fused weights; its files' own tensors and warm caches apart."""
    loras = two(world)
    read = [
        world.pack("modular_lora.files.cache").kept_lora(path) for path, _ in loras
    ]  # as the loading nodes hold them
    before = _held()
    patcher = guard(world, loras)
    run = patcher.guard_begin()
    world.pack("modular_lora.guard.build").known_safety.clear()  # the warm caches are counted apart
    layers = patcher.guard_state.part.branches.layers.values()
    fused, held = sum(layer.nbytes() for layer in layers), _held() - before
    run.discard()
    patcher.guard_attachment.detach()
    del read
    (name,) = job.rows
    return {"rows": {name: {"ratio": float(f"{held / fused:.4g}")}}, "fused MB": fused / 1e6}


def _held() -> int:
    """Bytes of all tensors' storages, each once."""
    gc.collect()
    found = (t for t in gc.get_objects() if isinstance(t, torch.Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values())


def imports(job: Job) -> dict:
    """Seconds that the pack adds to ComfyUI's start."""
    limits = Limits(**(job.limits or {}))
    times = {"guarded": speed_import.measure(Path(job.comfyui), limits.rounds)}
    times["none"] = Timing((1.0,) * limits.rounds, (1.0,) * limits.rounds)
    return _found(job, times)


SECTIONS = {"steps": steps, "swap": swap, "reading": reading, "memory": memory}


def main(arguments: list[str]) -> None:
    job, target = Job(**json.loads(Path(arguments[0]).read_text(encoding="utf-8"))), Path(arguments[1])
    torch.set_num_threads(job.threads)
    if job.section == "import":
        target.write_text(json.dumps(imports(job)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        world = open_world(job.width, getattr(torch, job.dtype), Path(job.comfyui), job.cpu, Path(folder))
        found = SECTIONS[job.section](world, job)
    target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
