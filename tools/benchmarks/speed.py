"""What the guard costs beside the ways around it: steps, swaps, reading, import, memory; ratios from one run each.

    python -m tools.benchmarks.speed [--comfyui COMFYUI] [--newer NEWER] [--only steps swap ...] [--toy]

COMFYUI is looked for as the pack does; NEWER (or MODULAR_LORA_NEWER_COMFYUI) is a checkout of a ComfyUI that has
LoraLoaderBypass, run by the same interpreter with MODULAR_LORA_NEWER_PYTHONPATH put before its packages. Every section
is a process of its own on one thread, in which the contenders take turns. A ratio is the median of the rounds' ratios
of processor time, with its 95 % bootstrap interval; ``wall`` is the same by the clock. Writes docs/figures/speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .bench import parser
from .figures import ROOT, machine, record

COMMAND = "python -m tools.benchmarks.speed"
STEP = "step guarded/merged"
SD15 = {
    f"{STEP} cpu sd15 r4+r16": ("guarded", "merged"),
    "step guarded/peft": ("guarded", "peft"),
    "step measured and probed/guarded": ("measured", "guarded"),
}
CONTROL = "step no LoRA/merged (what the method cannot tell apart)"
GROWTH = {
    f"{STEP} cpu sd15, 1 LoRA r16": ("guarded 1 LoRA", "merged"),
    f"{STEP} cpu sd15, 5 LoRAs r16 each": ("guarded 5 LoRAs", "merged"),
    f"{STEP} cpu sd15 r32+r32": ("guarded 32+32", "merged"),
    f"{STEP} cpu sd15 r128+r128": ("guarded 128+128", "merged"),
    f"{STEP} cpu sd15 r4+r16, half the layers": ("guarded half", "merged"),
    f"{STEP} cpu sd15 r4+r16, all layers and 3x3 too": ("guarded all", "merged"),
}
BYPASS = {
    "step guarded/bypass": ("guarded", "bypass"),
    "step measured and probed/bypass": ("measured", "bypass"),
    f"{STEP} cpu sd15 r4+r16, newer ComfyUI": ("guarded", "merged"),
}
SWAP = {"swap core/guarded cold": ("core", "cold"), "swap core/guarded warm": ("core", "warm")}
READING = {"load 10,000 keys guarded/core": ("guarded", "core")}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """(section, job of tools/benchmarks/speed_steps.py) of everything that can be measured here."""
    width = "toy" if options.toy else "sd15"
    lasting = lambda seconds: {"limits": {"seconds": 1.0 if options.toy else seconds}}  # noqa: E731
    step = {"section": "steps", "width": width, "latent": 8 if options.toy else 16}
    pair = ("guarded", "merged")
    yield "steps", step | {"rows": SD15 | {CONTROL: ("none", "merged")}, **lasting(400)}
    if options.newer:
        yield "bypass", step | {"rows": BYPASS, "newer": True, **lasting(400)}
    yield "growth", step | {"rows": GROWTH, **lasting(85)}
    yield "swap", {"section": "swap", "width": width, "rows": SWAP, **lasting(100)}
    yield "reading", {"section": "reading", "width": "toy", "rows": READING, **lasting(40)}
    yield "memory", {"section": "memory", "width": width, "rows": {"memory held/fused weights": ("guarded", "none")}}
    starts = {"limits": {"rounds": 1 if options.toy else 5}}
    yield "import", {"section": "import", "rows": {"import seconds": ("guarded", "none")}, **starts}
    if not options.toy:
        rows = {f"{STEP} cpu sd15 r4+r16, latents 64x64": pair}
        yield "large", step | {"rows": rows, "latent": 64, "threads": 2, **lasting(80)}
        yield "bf16", step | {"rows": {f"{STEP} cpu sd15 r4+r16, bf16": pair}, "dtype": "bfloat16", **lasting(30)}
        wide = step | {"width": "sdxl", "dtype": "bfloat16"}
        yield "sdxl", wide | {"rows": {f"{STEP} cpu sdxl r4+r16, bf16": pair}, **lasting(60)}
        if options.only:  # it takes minutes
            rows = {f"{name}, sdxl bf16": pair for name, pair in SWAP.items()}
            yield "swap-sdxl", wide | {"section": "swap", "rows": rows, **lasting(180)}
    if torch.cuda.is_available():
        rows = {f"{STEP} gpu {width} r4+r16, fp16": pair, "step guarded/peft gpu": ("guarded", "peft")}
        yield "gpu", step | {"rows": rows, "dtype": "float16", "latent": 64, "cpu": False, **lasting(60)}


def run(options: argparse.Namespace, job: dict) -> dict:
    """One job in a process of its own: {"rows", ...}; RuntimeError with its last lines where it fails."""
    newer = job.pop("newer", False)
    environment = {"OMP_NUM_THREADS": str(job.get("threads", 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    if newer and (site := os.environ.get("MODULAR_LORA_NEWER_PYTHONPATH")):
        environment["PYTHONPATH"] = site
    comfyui = options.newer if newer else options.comfyui
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "job.json", Path(folder) / "rows.json"
        source.write_text(json.dumps(job | {"comfyui": str(comfyui.resolve())}), encoding="utf-8")
        command = [sys.executable, "-m", "tools.benchmarks.speed_steps", str(source), str(target)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{job['section']} failed:\n{done.stderr[-4000:]}")
        return json.loads(target.read_text(encoding="utf-8"))


def parse(arguments: list[str]) -> argparse.Namespace:
    made = parser(__doc__)
    path = lambda name: Path(found) if (found := os.environ.get(name)) else None  # noqa: E731
    made.add_argument("--comfyui", type=Path, default=path("MODULAR_LORA_COMFYUI"))
    made.add_argument("--newer", type=Path, default=path("MODULAR_LORA_NEWER_COMFYUI"))
    made.add_argument("--only", nargs="+", help="sections by name; those that there are stand in jobs()")
    made.add_argument("--toy", action="store_true", help="a toy model; nothing is written")
    return made.parse_args(arguments)


def main(arguments: list[str]) -> dict[str, dict]:
    options, rows = parse(arguments), {}
    for section, job in jobs(options):
        if options.only and section not in options.only:
            continue
        found = run(options, job)
        rows |= {name: row | ({} if job.get("cpu", True) else _gpu()) for name, row in found["rows"].items()}
        if not options.toy:  # as it goes: a run that is cut short has written what it measured
            record("speed.json", {name: rows[name] for name in found["rows"]}, COMMAND)
        for name, row in found["rows"].items():
            sys.stdout.write(f"{name}: {row['ratio']} {row.get('interval', '')}, {row.get('rounds', 1)} rounds\n")
        rest = {key: value for key, value in found.items() if key != "rows"}
        sys.stdout.write(f"  {section}: {json.dumps(rest)}\n")
        sys.stdout.flush()
    return rows


def _gpu() -> dict[str, str]:
    return {"machine": f"{torch.cuda.get_device_name()}; {machine()}"}


if __name__ == "__main__":
    main(sys.argv[1:])
