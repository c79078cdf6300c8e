"""False alarms of the guard's measurements: task LoRAs that nobody made against a safety LoRA, and some that were.

    python -m tools.benchmarks.acted CHECKPOINT --comfyui COMFYUI --record

On the demo world, in the real ComfyUI: every safety LoRA with every task LoRA (benign, and trained on top of that
safety LoRA) at several strengths; 3 steps of euler on vehicle prompts and on kept ones, 4 images each. Prints net
strength of the files, the least net strength as it acted of any image, and the largest magnitude of a layer over
max(‖W0‖, ‖dW_s‖). The attack is dW_t = −dW_s + c·dW_s·C⁻¹ with C from the base's own activations and c such that the
files' net strength stays 1.
"""

from __future__ import annotations

import importlib
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from modular_lora_guard.comfy_host import standalone as comfyui
from modular_lora_guard.modular_lora.guard import build as guard
from modular_lora_guard.modular_lora.guard import magnitude

from ..world import ASSETS, data
from . import cancelling
from .bench import loras, parser
from .figures import record

STEPS, SIZE, IMAGES = 3, 64, 4
STRENGTHS = (1.0, 1.5)
RIDGE = 1e-3
NO_FLOORS = guard.GuardLimits(net_strength_floor=-1e9, acted_strength_floor=-1e9)


def main() -> None:
    options = parser(__doc__, "acted.json", checkpoint=True).parse_args()
    comfyui.start(options.comfyui, cpu=not torch.cuda.is_available())
    drawing = importlib.import_module("modular_lora_guard.comfy_host.pipeline")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        bench = Bench(*drawing.load(options.checkpoint)[:2])
        rows = dict(bench.rows(Path(folder)))
    if options.record:
        command = "python -m tools.benchmarks.acted CHECKPOINT --comfyui COMFYUI --record"
        record("acted.json", rows, command)


class Bench:
    """One loaded demo world."""

    def __init__(self, model, clip):
        self.model, self.clip = model, clip
        self.host = importlib.import_module("modular_lora_guard.comfy_host.patcher")
        self.anatomy = importlib.import_module("modular_lora_guard.comfy_host.introspection")

    def rows(self, folder: Path):
        """(name, figures) of every group of combinations."""
        evidence = ASSETS / "evidence"
        pairs = [(ASSETS / "demo_safety_vehicles.safetensors", ASSETS / "demo_sequential_gloss.safetensors")]
        pairs += [
            (evidence / f"safety_{n}.safetensors", evidence / f"sequential_{n}.safetensors") for n in (11, 12, 13)
        ]
        benign = [ASSETS / "demo_task_gloss.safetensors", *(evidence / f"task_{n}.safetensors" for n in (11, 12, 13))]
        found = defaultdict(list)
        for safety, sequential in pairs:
            for strength in STRENGTHS:
                for task in benign:
                    found[f"benign, strength {strength:g}"].append(self.measured(safety, [(task, strength)]))
                found[f"sequential, strength {strength:g}"].append(self.measured(safety, [(sequential, strength)]))
            found["two benign, strength 1"].append(self.measured(safety, [(benign[0], 1.0), (benign[2], 1.0)]))
            attack = folder / f"attack_{safety.name}"
            self.write_attack(safety, attack)
            found["attack by second moments"].append(self.measured(safety, [(attack, 1.0)]))
        for name, values in found.items():
            nets, concept, kept, sizes = zip(*values, strict=True)
            row = {
                "combinations": len(values),
                "files_least": round(min(nets), 3),
                "concept_least": _least(concept),
                "kept_least": _least(kept),
                "magnitude_most": round(max(sizes), 3),
            }
            print(name, row, flush=True)
            yield name, row

    def measured(self, safety: Path, tasks: list[tuple[Path, float]]) -> tuple:
        """(net strength of the files, as it acted on concept prompts, on kept ones, largest magnitude)."""
        own, others = loras(safety, tasks)
        guarded, clip = self.host.guard(self.model, self.clip, own, others, False, NO_FLOORS)
        patcher = self.host.unwrap(guarded)
        nets = [result.net_strength for _, result in patcher.guard_state.part.interference]
        concept, kept = (self.sampled(patcher, clip, ids) for ids in (data.SUPPRESSED_IDS, data.KEPT_IDS))
        size = largest(own, others, self.anatomy.model_info(self.model))
        names = ", ".join(f"{task.name} at {strength:g}" for task, strength in tasks)
        figures = f"files {min(nets):.3f}, acted {concept} (concept), {kept} (kept); magnitude {size:.3g}"
        print(f"  {safety.name} with {names}: {figures}", flush=True)
        return min(nets), concept, kept, size

    def sampled(self, patcher, clip, ids) -> float | None:
        import comfy.sample

        chosen = ids[:: max(1, len(ids) // IMAGES)][:IMAGES]
        prompts = [f"{data.STYLES[n % 3]}, {data.WORDS[concept]}" for n, concept in enumerate(chosen)]
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in (*prompts, "")]
        conds = [[torch.cat([c for c, _ in encoded[:-1]]), encoded[0][1]]], [list(encoded[-1])]
        latent = torch.zeros(len(prompts), 4, SIZE // 8, SIZE // 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        comfy.sample.sample(patcher, noise, STEPS, 3.0, "euler", "normal", *conds, latent, seed=1, disable_pbar=True)
        run = self.host.attestation(patcher)
        return min((v for v in run.acted_strength.values() if v is not None), default=None)

    def write_attack(self, safety: Path, path: Path) -> None:
        """`cancelling.against_inputs` of the base's run on concept prompts, as a file."""
        layers = cancelling.factors(safety)
        info = self.anatomy.model_info(self.model)
        paths = {name: info.specs[info.key_map[name]].path for name in layers if name in info.key_map}
        with cancelling.moments({n: self.model.model.get_submodule(p) for n, p in paths.items()}) as moments:
            # under a guard at strength next to nothing: the same as the base
            guarded, clip = self.host.guard(self.model, self.clip, *loras(safety, strength=1e-6), False, NO_FLOORS)
            self.sampled(self.host.unwrap(guarded), clip, data.SUPPRESSED_IDS)
        cancelling.save(path, cancelling.against_inputs(layers, moments, RIDGE))


def largest(safety, tasks, info) -> float:
    """Of all layers: magnitude of the task LoRAs over max(‖W0‖, ‖dW_s‖)."""
    apply = guard.apply
    own, *others = [
        apply(role, item.lora, [n for n in item.lora.layers if not guard.is_text(n)], strength, "", info)
        for role, item, strength in (
            *(("safety", s, s.strength) for s in safety),
            *(("task", t, t.strength_model) for t in tasks),
        )
    ]
    sizes = defaultdict(float)
    for a in others:
        for path, size in magnitude._by_layer(a, info.places, "magnitude").items():
            sizes[path] += size
    keys = {spec.path: key for key, spec in info.specs.items()}
    safe = magnitude._by_layer(own, info.places, "energy")
    return max(size / max(info.norm(keys[path]), safe[path]) for path, size in sizes.items() if path in safe)


def _least(values) -> float | None:
    some = [v for v in values if v is not None]
    return round(min(some), 3) if some else None


if __name__ == "__main__":
    main()
