"""Calibration of the contamination test (training/contamination.py): false positives, detection, time.

    python3 -m tools.world.expand world_dir
    python3 tools/benchmarks/contamination.py world_dir/demo_world_sd15.safetensors --to docs/figures/contamination.json

Null directions have the safety LoRA's layers, rank and norms: "random" ones lie anywhere, "turned" ones keep its column
and row spaces and singular values (U C D → U O C O' D, O and O' random rotations), so they share its structure.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer, read_lora
from modular_lora_guard.modular_lora.util import plain_json
from modular_lora_guard.training.contamination import Finding, measure
from safetensors.torch import load_file
from torch import Tensor

from ..world import ASSETS, SAFETY_LORA, SEQUENTIAL_LORA, TASK_LORA
from ..world.lorafile import kohya_name
from .bench import parser

STRENGTHS = (1.0, 0.5, 0.25)
SAFETY, TASK, SEQUENTIAL = (ASSETS / name for name in (SAFETY_LORA, TASK_LORA, SEQUENTIAL_LORA))
_log = logging.getLogger("modular_lora")


def base_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of the demo world's adapted layers, under kohya layer names."""
    found = {}
    for key, tensor in load_file(checkpoint).items():
        module = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
        try:
            found[kohya_name(module)] = tensor
        except ValueError:  # in no transformer
            continue
    return found


def sd15_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp16 weights of the 192 layers of SD1.5's U-Net that take a LoRA."""
    shapes = {}
    for i, c in enumerate([320] * 5 + [640] * 5 + [1280] * 6):
        inner = {"proj_in": (c, c), "proj_out": (c, c), "ff_0": (8 * c, c), "ff_2": (c, 4 * c)}
        inner |= {f"attn{n}_{p}": (c, 768 if n == 2 and p in "kv" else c) for n in (1, 2) for p in "qkvo"}
        shapes |= {f"transformer_{i}_{name}": shape for name, shape in inner.items()}
    return {n: (torch.randn(s, generator=generator) / s[1] ** 0.5).half() for n, s in shapes.items()}


def random_lora(shapes: dict[str, tuple[int, int]], norms: dict[str, float], rank: int, seed: int) -> LoraFile:
    """Random factors of a rank with the given ‖ΔW‖ a layer."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (out, size) in shapes.items():
        up, down = torch.randn(out, rank, generator=g), torch.randn(rank, size, generator=g)
        up *= norms[name] / dense_norm(up, down)
        layers[name] = LoraLayer(name, down, up, float(rank))
    return LoraFile(Path(), f"random {seed}", "", {}, layers)


def turned(safety: LoraFile, seed: int) -> LoraFile:
    """The safety LoRA with its singular directions turned within its own column and row spaces."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in safety.plain.items():
        U, R = torch.linalg.qr(layer.up.float().flatten(1) * layer.scale)
        V, S = torch.linalg.qr(layer.down.float().flatten(1).T)
        rotate = [torch.linalg.qr(torch.randn(layer.rank, layer.rank, generator=g))[0] for _ in range(2)]
        core = rotate[0] @ R @ S.T @ rotate[1]
        layers[name] = LoraLayer(name, V.T.contiguous(), U @ core, float(layer.rank))
    return LoraFile(Path(), f"turned {seed}", "", {}, layers)


def dense_norm(up: Tensor, down: Tensor) -> float:
    return float(((up.T @ up) * (down @ down.T)).sum().sqrt())


def layer_norms(lora: LoraFile) -> dict[str, float]:
    return {n: x.scale * dense_norm(x.up.float().flatten(1), x.down.float().flatten(1)) for n, x in lora.plain.items()}


def merged(weights: dict[str, Tensor], lora: LoraFile, strength: float) -> dict[str, Tensor]:
    """fp16 weights with a LoRA merged, as merge scripts store them."""
    found = dict(weights)
    for name, x in lora.plain.items():
        delta = x.scale * x.up.float().flatten(1) @ x.down.float().flatten(1)
        found[name] = (weights[name].float() + strength * delta.reshape(weights[name].shape)).half()
    return found


def demo_rows(checkpoint: Path, draws: int) -> Iterator[tuple[str, object]]:
    """The demo world's base: clean, merged, and the null directions."""
    weights, safety, task = base_weights(checkpoint), read_lora(SAFETY), read_lora(TASK)
    shapes = {name: (len(weights[name]), weights[name][0].numel()) for name in safety.layers}
    total = sum(float(weights[name].float().norm()) ** 2 for name in shapes) ** 0.5
    norms = layer_norms(safety)
    yield "demo world: norm of the safety LoRA / norm of the weights", sum(n**2 for n in norms.values()) ** 0.5 / total
    yield from _told("demo world, clean", measure(weights, safety))
    for other in (TASK, SEQUENTIAL):
        yield from _told(f"demo world, clean, looking for {other.stem}", measure(weights, read_lora(other)))
    yield from _told("demo world, task LoRA merged", measure(merged(weights, task, 1.0), safety))
    both = merged(merged(weights, safety, 1.0), task, 1.0)
    yield from _told("demo world, safety and task LoRA merged", measure(both, safety))
    for s in (*STRENGTHS, -1.0):
        yield from _told(f"demo world, merged at {s:g}", measure(merged(weights, safety, s), safety))
    exact = measure(merged(weights, safety, 0.25), safety, base=weights)
    yield from _told("demo world, merged at 0.25, W0 known", exact)
    kinds = {
        "random": lambda seed: random_lora(shapes, norms, 8, seed),
        "turned": lambda seed: turned(safety, seed),
    }
    for kind, make in kinds.items():
        null = [measure(weights, make(seed)) for seed in range(draws)]
        yield f"demo world, {draws} {kind} null directions: false positives", sum(f.verdict != "clean" for f in null)
        yield f"demo world, {draws} {kind} null directions: largest |T|", max(abs(f.strength) for f in null)
        yield f"demo world, {draws} {kind} null directions: largest |z|", max(abs(f.z) for f in null)
        for s in STRENGTHS:
            some = (make(seed) for seed in range(draws // 10))
            hits = sum(measure(merged(weights, lora, s), lora).verdict == "contains" for lora in some)
            yield f"demo world, {kind} directions merged at {s:g}: found", f"{hits} of {draws // 10}"


def full_rows(draws: int) -> Iterator[tuple[str, object]]:
    """SD1.5's U-Net with random weights: how small a LoRA is still told, false positives, and the time it takes."""
    weights = sd15_weights(torch.Generator().manual_seed(0))
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    sizes = {name: float(w.float().norm()) for name, w in weights.items()}
    for ratio in (0.002, 0.01, 0.03):
        norms = {name: ratio * size for name, size in sizes.items()}
        lora = random_lora(shapes, norms, 8, 1)
        yield from _told(f"SD1.5 width, random, norm ratio {ratio:g}, clean", measure(weights, lora))
        for s in STRENGTHS:
            name = f"SD1.5 width, random, norm ratio {ratio:g}, merged at {s:g}"
            yield from _told(name, measure(merged(weights, lora, s), lora))
    wall, cpu = time.perf_counter(), time.process_time()
    measure(weights, lora)
    yield "SD1.5 width: seconds, one thread", time.perf_counter() - wall
    yield "SD1.5 width: CPU seconds", time.process_time() - cpu
    null = [measure(weights, random_lora(shapes, norms, 8, 2 + seed)) for seed in range(draws // 20)]
    yield f"SD1.5 width, {len(null)} null directions: false positives", sum(f.verdict != "clean" for f in null)


def _told(name: str, finding: Finding) -> Iterator[tuple[str, object]]:
    yield f"{name}: T", finding.strength
    yield f"{name}: z", finding.z
    yield f"{name}: verdict", finding.verdict


def main() -> None:
    made = parser(__doc__)
    made.add_argument("checkpoint", type=Path, help="the demo world's checkpoint (python3 -m tools.world.expand DIR)")
    made.add_argument("--to", type=Path, default=Path("docs/figures/contamination.json"), help="the JSON to write")
    made.add_argument("--draws", type=int, default=1000, help="null directions of each kind")
    args = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    shared = {
        "command": "python3 tools/benchmarks/contamination.py CHECKPOINT --to docs/figures/contamination.json",
        "date": datetime.date.today().isoformat(),
        "machine": f"CPU, {os.cpu_count()} cores ({platform.machine()}), one thread, torch {torch.__version__}",
    }
    rows = []
    for part in (demo_rows(args.checkpoint, args.draws), full_rows(args.draws)):
        for name, value in part:
            rows.append({"name": name, "value": round(value, 4) if isinstance(value, float) else value, **shared})
            _log.info("%s: %s", name, rows[-1]["value"])
    plain_json.write({"rows": rows}, args.to)


if __name__ == "__main__":
    main()
