"""Guards that were built before: going back to an earlier task LoRA only attaches its branches again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from ..modular_lora.branches.module_tree import tree_identity
from ..modular_lora.guard.build import GuardedPart, GuardLimits, Safety, Tasks
from ..modular_lora.provenance.attestation import Attestation
from ..modular_lora.util.cache import Cache

LIMIT = 256 * 2**20  # bytes of fused weights


@dataclass(frozen=True)
class Built:
    """What Guard Model makes of a model and its LoRAs, without the model."""

    model: GuardedPart
    text: GuardedPart | None
    record: Attestation
    text_digest: str
    report: str
    summary: str

    def nbytes(self) -> int:
        """Bytes of the fused weights that are held now."""
        return self.model.branches.nbytes() + (self.text.branches.nbytes() if self.text else 0)


guards: Cache[tuple, Built] = Cache(LIMIT, Built.nbytes)
_watched: weakref.WeakSet = weakref.WeakSet()


def key(model, clip, safety: Safety, tasks: Tasks, policy: GuardLimits) -> tuple:
    """All that a guard depends on: the loaded models, what was merged into them (ModelPatcher.patches_uuid), the files
    by hash and name, strengths, block weights, the policy."""
    models = [(_identity(patcher.model), patcher.patches_uuid) for patcher in (model, clip and clip.patcher) if patcher]
    files = [(s.lora.acts_as, s.lora.scale, s.lora.name, s.strength) for s in safety]
    more = [(t.lora.acts_as, t.lora.name, t.strength_model, t.strength_clip, t.block_weights) for t in tasks]
    return tuple(models), tuple(files), tuple(more), policy


def part_key(part: str, patcher, safety: Safety, tasks: Tasks, policy: GuardLimits) -> tuple:
    """The same for a model or text encoder by itself, which is guarded when it is sampled or encodes."""
    models, *rest = key(patcher, None, safety, tasks, policy)
    return models, *rest, part


def _identity(module: torch.nn.Module) -> object:
    """Stands for a loaded model as long as none of its guarded layers is replaced; its guards go when it goes."""
    if module not in _watched:
        _watched.add(module)
        weakref.finalize(module, _forget, id(module))
    return id(module), tree_identity(module)


def _forget(module: int) -> None:
    guards.drop(lambda k: any(identity == module for (identity, _), _ in k[0]))
