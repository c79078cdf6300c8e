"""How functional strength tells task LoRAs that cancel a safety LoRA from others: rows of docs/figures/functional.json.

    python -m tools.benchmarks.functional CHECKPOINT --comfyui COMFYUI [--safety FILE ...] --record

On the demo world, with the nodes' own measurement. Benign: its task LoRAs at 0.5 to 1.5, two and three of them at once,
all in one style. Sequential: task LoRAs trained on top of a safety LoRA. Attacks: `cancelling`. The floor of
`modular_lora.guard.build.GuardLimits` was set between benign and attacks by these figures.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.guard import build as guard
from modular_lora_guard.modular_lora.guard import concept
from modular_lora_guard.training import cli

from ..world import ASSETS, SAFETY_LORA, SEQUENTIAL_LORA, TASK_LORA
from . import cancelling
from .bench import finish, loras, parser

PROMPTS = ("twemoji, racing car", "noto, tractor", "gloss, bus", "blob, a vehicle", "flat, bicycle")
EVIDENCE = ASSETS / "evidence"
TASKS = (ASSETS / TASK_LORA, *sorted(EVIDENCE.glob("task_*")))
SEQUENTIAL = (ASSETS / SEQUENTIAL_LORA, *sorted(EVIDENCE.glob("sequential_*")))
STRENGTHS = (0.5, 1.0, 1.5)
HEADS = 8
Loras = Sequence[tuple[Path, float]]


class Bench:
    """The demo world's checkpoint, and what its layers see while it draws the concept prompts."""

    def __init__(self, checkpoint: Path, host):
        self.measured = importlib.import_module("modular_lora_guard.comfy_host.functional").measured
        self.anatomy = importlib.import_module("modular_lora_guard.comfy_host.introspection")
        with torch.inference_mode():
            self.model, self.clip, _ = host.load_checkpoint(checkpoint, None, None)
        self.info = self.anatomy.model_info(self.model)
        state = self.model.model.state_dict()
        names = {n: k for n, k in self.info.key_map.items() if n.startswith("lora_unet_") and isinstance(k, str)}
        self.keys = {name: key for name, key in names.items() if key in state and state[key].dim() > 1}
        self.weights = {name: state[key].flatten(1) for name, key in self.keys.items()}

    def strength(self, safety: Path, tasks: Loras) -> float | None:
        """Functional strength of a safety LoRA beside these task LoRAs; None where it is not measured."""
        kept, others = loras(safety, tasks)
        infos = self.anatomy.model_info(self.model), self.anatomy.clip_info(self.clip)
        parts = guard.build_parts(*infos, kept, others, guard.GuardLimits(net_strength_floor=float("-inf")))
        found = self.measured(self.model, self.clip, parts, kept, others, self.anatomy.model_sha256(self.model))
        return next(iter(found.strengths.values()), None)

    def moments(self, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        modules = {n: self.model.model.get_submodule(self.info.specs[self.keys[n]].path) for n in layers}
        with cancelling.moments(modules) as found:
            cancelling.drawn(self.model, self.clip, PROMPTS)
        return found


def benign() -> Iterator[tuple[str, Loras]]:
    for strength in STRENGTHS:
        yield from ((f"one at {strength:g}", [(task, strength)]) for task in TASKS)
    for count in (2, 3):
        yield from ((f"{count} at 1", [(t, 1.0) for t in some]) for some in itertools.combinations(TASKS, count))


def attacks(bench: Bench, safety: Path, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(what, safety LoRA with concept prompts, task LoRA)."""
    layers = cancelling.factors(safety)
    said = {concept.PROMPTS_KEY: concept.encode(PROMPTS)}
    yield "the safety file at -1", safety, cancelling.save(folder / "a.safetensors", cancelling.negated(layers))
    made = cancelling.against_inputs(layers, bench.moments(list(layers)))
    yield "-dW + c dW C^-1", safety, cancelling.save(folder / "b.safetensors", made)
    for ending, make in (("to_v", cancelling.behind_values), ("to_q", cancelling.before_queries)):
        if some := cancelling.only(layers, f"_{ending}"):
            part = cancelling.save(folder / f"{ending}.safetensors", some, said)
            made = make(some, bench.weights, HEADS)
            what = {"to_v": "to_out against to_v", "to_q": "to_k against to_q"}[ending]
            yield what, part, cancelling.save(folder / f"against_{ending}.safetensors", made)


def main() -> None:
    made = parser(__doc__, "functional.json", checkpoint=True, threads=True)
    made.add_argument("--safety", type=Path, nargs="+", default=[ASSETS / SAFETY_LORA, *EVIDENCE.glob("safety_*")])
    chosen = made.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.checkpoint, cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True}))
    found: dict[str, list[float]] = {}
    for file in sorted(chosen.safety):
        with tempfile.TemporaryDirectory() as folder:
            safety = concept.write_copy(file, Path(folder) / "safety.safetensors", PROMPTS).path
            cases = [(f"benign, {name}", safety, tasks) for name, tasks in benign()]
            cases += [("sequential at 1", safety, [(path, 1.0)]) for path in SEQUENTIAL]
            cases += [
                (f"attack, {what}", part, [(made, 1.0)]) for what, part, made in attacks(bench, safety, Path(folder))
            ]
            for name, part, tasks in cases:
                if (strength := bench.strength(part, tasks)) is not None:
                    found.setdefault(name, []).append(strength)
                    sys.stdout.write(f"{file.stem}: {name}: {strength:.3f}\n")
                    sys.stdout.flush()
    rows = {name: _shown(values) for name, values in found.items()}
    names = " ".join(f.stem for f in sorted(chosen.safety))
    command = f"python -m tools.benchmarks.functional CHECKPOINT --safety {names}"
    finish(rows, "functional.json", command, chosen.record)


def _shown(values: list[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} [{min(values):.2f} .. {max(values):.2f}], n = {len(values)}"


if __name__ == "__main__":
    main()
