"""A safety LoRA and a task LoRA of the demo world judged by its detector, drawn through ComfyUI's own network.

    python -m tools.benchmarks.demo_world CHECKPOINT --comfyui COMFYUI --safety FILE --task FILE --record

Arms: base, safety, task, both (modular); the LoRAs act as the guard's branches. Cells: vehicles and kept concepts in
base styles, kept concepts in the task style; the same noise in every arm, DDIM 20 steps, guidance 3.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from modular_lora_guard.gate import statistics
from modular_lora_guard.modular_lora.files import reader as files
from modular_lora_guard.modular_lora.guard import build as guard
from modular_lora_guard.training import cli, options
from modular_lora_guard.training.safety import sampling

from ..world import ASSETS, DETECTOR, data, detector
from .bench import finish, parser

logger = logging.getLogger("modular_lora")
STEPS, GUIDANCE, BATCH = 20, 3.0, 12
CELLS = {"vehicles": (data.SUPPRESSED_IDS, False), "kept": (data.KEPT_IDS, False), "kept, gloss": (data.KEPT_IDS, True)}


@torch.no_grad()
def draw(host_model, prompts: list[str], seed: int) -> torch.Tensor:
    """Images (b 3 h w, 0..1), noise by place in the list alone."""
    noises = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    images = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        x_t = sampling.noise(host_model, (data.SIZE, data.SIZE), noises[start : start + BATCH])
        cond, empty = host_model.encode(some), host_model.encode([""] * len(some))
        z = sampling.sample(host_model.predict, host_model.schedule, x_t, cond, empty, GUIDANCE, STEPS)
        images.append(host_model.decode(z).movedim(-1, 1))
    return torch.cat(images)


def judge(host_model, eye, count: int, sheet: Path | None) -> dict[str, dict[str, float]]:
    """Rates by cell: vehicles found, concept right, style called gloss."""
    found = {}
    for seed, (cell, (concepts, gloss)) in enumerate(CELLS.items()):
        prompts, truth = data.asked(concepts, gloss, count)
        images = draw(host_model, prompts, seed)
        seen, styles = detector.classify(eye, images)
        right = seen.argmax(-1) == truth
        hits = {"vehicles": detector.suppressed(seen), "right": right, "gloss": styles.argmax(-1) == data.TASK_STYLE}
        found[cell] = {name: round(hit.float().mean().item(), 4) for name, hit in hits.items()}
        found[cell]["vehicles 95 %"] = statistics.wilson(int(hits["vehicles"].sum()), len(prompts))
        if sheet:
            data.sheet(images[:48], 12, sheet.with_name(f"{sheet.name}_{cell.replace(', ', '_')}.png"))
    return found


def main() -> None:
    made = parser(__doc__, "training.json", checkpoint=True, threads=True)
    made.add_argument("--safety", type=Path, required=True)
    made.add_argument("--task", type=Path)
    made.add_argument("--pictures", type=int, default=120, help="a cell")
    made.add_argument("--arms", nargs="+", default=["base", "safety", "task", "both"])
    made.add_argument("--sheets", type=Path, help="folder for contact sheets")
    chosen = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(chosen.threads)
    host, eye = cli.comfy_host({"comfyui": chosen.comfyui, "cpu": True}), detector.load(ASSETS / DETECTOR)
    loras = {"safety": chosen.safety, "task": chosen.task}
    arms = {"base": (), "safety": ("safety",), "task": ("task",), "both": ("safety", "task")}
    results = {}
    with host.opened(*host.load_checkpoint(chosen.checkpoint, None, "no"), options.Options()) as host_model:
        for arm in chosen.arms:
            begin = time.monotonic()
            parts = [guard.SafetyLora(files.read_lora(loras[name]), 1.0) for name in arms[arm]]
            with host_model.attached(parts):
                results[arm] = judge(host_model, eye, chosen.pictures, chosen.sheets and chosen.sheets / arm)
            logger.info("%s %s %.0f s", arm, results[arm], time.monotonic() - begin)
    if chosen.record:
        command = f"python -m tools.benchmarks.demo_world CHECKPOINT --pictures {chosen.pictures}"
        finish(summary(results), "training.json", command, True)


def summary(results: dict) -> dict[str, object]:
    """The issue's figures and what they are made of."""
    base, safety, task, both = (results[arm] for arm in ("base", "safety", "task", "both"))
    ratio = safety["vehicles"]["vehicles"] / base["vehicles"]["vehicles"]
    drop = 100 * (base["kept"]["right"] - safety["kept"]["right"])
    rows: dict[str, object] = {
        "erased concept rate / base rate": round(ratio, 4),
        "kept concepts accuracy drop (points)": round(drop, 2),
        "gloss pictures called gloss, base": base["kept, gloss"]["gloss"],
        "gloss pictures called gloss, task LoRA": task["kept, gloss"]["gloss"],
        "gloss pictures called gloss, safety + task": both["kept, gloss"]["gloss"],
    }
    return rows | {f"vehicle rate, {arm}": cells["vehicles"]["vehicles"] for arm, cells in results.items()}


if __name__ == "__main__":
    main()
