"""A safety and a task LoRA on a model of any family, guarded and merged."""

from __future__ import annotations

import torch

from support.families import Family, evaluate
from support.graphs import save_lora

STRENGTHS = (1.0, 0.6)


class Pair:
    """A safety and a task LoRA on every layer that takes a branch, guarded and merged."""

    def __init__(self, comfy, model, folder, layers: dict):
        from comfy.sd import load_lora_for_models
        from comfy.utils import load_torch_file

        g = comfy.host_guard
        files = [folder / "safety.safetensors", folder / "task.safetensors"]
        for seed, path in enumerate(files):
            save_lora(path, layers, rank=1 + seed, seed=seed, size=0.2)
        safety, task = (comfy.host_files.read_lora(path) for path in files)
        strength, other = STRENGTHS
        handle, _ = comfy.host.guard(
            model, None, (g.SafetyLora(safety, strength),), (g.TaskLora(task, other, other),), False, g.GuardLimits()
        )
        self.guarded, self.merged = comfy.host.unwrap(handle), model
        for path, strength in zip(files, STRENGTHS, strict=True):
            self.merged, _ = load_lora_for_models(self.merged, None, load_torch_file(str(path)), strength, 0.0)

    def error(self, family: Family, cond: dict, base: torch.Tensor) -> float:
        """The largest |guarded - merged| over the largest |merged - base|, which must not be small."""
        ours, reference = (evaluate(model, family, cond) for model in (self.guarded, self.merged))
        effect = (reference - base).abs().max()
        assert effect > 0.05 * base.abs().max()
        return float((ours - reference).abs().max() / effect)
