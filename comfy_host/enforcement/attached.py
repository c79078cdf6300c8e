"""The guard without a node: where a policy says so, every MODEL, CLIP and VAE is guarded as it leaves a node.

The safety LoRAs are those that the policy requires of models of that family. What a node hides from this (a cache of
its own, a model that it loads and samples itself) is not guarded, so no run of it passes: hooks.py refuses it at the
sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sd

from ...modular_lora.errors import GuardError
from ...modular_lora.files.cache import kept_lora
from ...modular_lora.files.names import is_text
from ...modular_lora.files.reader import sha256_file
from ...modular_lora.guard.build import Safety, SafetyLora
from ...modular_lora.provenance.attestation import SUM
from ...operators import graph as graphs
from ...operators.policy import OperatorPolicy, Required
from ...operators.rules import RefusedError, no_entry, task_refused
from .. import drop_in, patcher, values
from ..bound_vae import BoundVaeMixin, bound
from ..introspection import family
from ..model_folders import SAFETY_FOLDER, SAFETY_FOLDERS, TASK_FOLDERS, lora_files, lora_path, shown_name
from . import policy as policies
from .leaving import Node

# Our own nodes that guard, compare, judge or train a model themselves: they get it as it was before.
BARE = {graphs.GUARD, "ModularLoraInterference", *graphs.CLOSED} - {graphs.AS_MODEL}


def is_model(value: Any) -> bool:
    """Whether a value is the MODEL of a diffusion model."""
    return isinstance(value, comfy.model_patcher.ModelPatcher) and isinstance(value.model, comfy.model_base.BaseModel)


def is_exempt(policy: OperatorPolicy, model: Any) -> bool:
    """Whether a MODEL may be sampled without the guard, for images that a gate then judges."""
    return policy.gates_others and not policy.guard.for_family(family(model))


def check_listed(policy: OperatorPolicy, name: str, value: Any) -> None:
    """RefusedError for a LoRA that is to go onto a model without a guard, and that the policy's lists bar."""
    if name == "lora_name" and isinstance(value, str):
        path = lora_path(value, *TASK_FOLDERS)
        if said := task_refused(policy, value, sha256_file(path), lambda: policies.values_sha256(path)):
            raise RefusedError(*said)


def bare_inputs(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list]) -> Mapping[str, list]:
    """The inputs of a node; of our own that want a model which nobody has guarded yet, with such."""
    if not (policy.attaches and node.facts.ours and node.names & BARE):
        return inputs
    return values.exchange(
        dict(inputs), drop_in.is_by_policy, lambda some: {id(one): drop_in.without_guard(one) for one in some}
    )


def outputs(policy: OperatorPolicy, made: Any) -> Any:
    """What a node has made, with everything guarded that can be; of a coroutine that still runs, when it ends.

    RefusedError for a model of a family for which no safety LoRA is named, GuardError for one that cannot be guarded.
    """
    if not policy.attaches:
        return made
    if isinstance(made, list):
        made = [_then(policy, one) if isinstance(one, asyncio.Task) else one for one in made]
    return values.exchange(made, _is_loose, lambda some: _guarded(policy, some))


def _then(policy: OperatorPolicy, task: asyncio.Task) -> asyncio.Task:
    async def guarded() -> Any:
        result = await task
        if hasattr(result, "block_execution"):  # a V3 node's
            result.args, result.expand = outputs(policy, result.args), outputs(policy, result.expand)
            return result
        return outputs(policy, result)

    return asyncio.create_task(guarded())


def _is_loose(value: Any) -> bool:
    """A MODEL, CLIP or VAE without a guard; not one that a node has taken it off, as LoRAs may have gone with it."""
    if isinstance(value, comfy.sd.VAE):
        return not isinstance(value, BoundVaeMixin)
    if isinstance(value, comfy.sd.CLIP):
        return not isinstance(value.patcher, patcher.GuardMixin) and not _had_guard(value.patcher)
    return is_model(value) and not isinstance(value, patcher.GuardMixin) and not _had_guard(value)


def _had_guard(one: Any) -> bool:
    return bool(one.get_wrappers(patcher.OUTER_SAMPLE, patcher.KEY))


def _guarded(policy: OperatorPolicy, loose: list) -> dict[int, Any]:
    """The guarded ones by the ``id`` of those that a node has given; each CLIP with the MODEL that came with it."""
    models = [one for one in loose if is_model(one)]
    clips = [one for one in loose if isinstance(one, comfy.sd.CLIP)]
    found = {id(one): bound(one) for one in loose if isinstance(one, comfy.sd.VAE)}
    together = len(clips) >= len(models)
    for model in models:
        clip = clips.pop(0) if together else None
        if is_exempt(policy, model):
            continue
        made = drop_in.attach_by_policy(model, clip, _of_family(policy, family(model)), policy.guard.combine or SUM)
        found |= {id(model): made.model} | ({id(clip): made.clip} if clip is not None else {})
    return found | {id(clip): _alone(policy, clip) for clip in clips}


def _alone(policy: OperatorPolicy, clip: comfy.sd.CLIP) -> Any:
    """A CLIP that came without a MODEL, which tells no family: with the safety LoRAs whose text-encoder half fits it.

    Where that guess is wrong, no model takes the prompts that it encodes.
    """
    sets = [some for name in (*policy.guard.families, "") if (some := policy.guard.for_family(name))]
    known = [tuple(_safety(policy, one) for one in some) for some in sets]
    known.sort(key=lambda safety: not any(is_text(layer) for item in safety for layer in item.lora.layers))
    why: GuardError | None = None
    for safety in known:
        try:
            return drop_in.attach_by_policy(None, clip, safety, policy.guard.combine or SUM).clip
        except GuardError as error:
            why = why or error
    if policy.guard.other_families == "gate" or policy.guard.families:
        return clip  # of a family that is not named: its model says so
    raise why or GuardError("no safety LoRA")


def _of_family(policy: OperatorPolicy, name: str) -> Safety:
    asked = policy.guard.for_family(name)
    if not asked:
        raise RefusedError(*no_entry(policy, name))
    return tuple(_safety(policy, one) for one in asked)


def _safety(policy: OperatorPolicy, one: Required) -> SafetyLora:
    """The safety LoRA that is required, at the strength at which the policy puts it there."""
    path = _path(policy, one)
    lora = kept_lora(path, expected_sha256=one.sha256 or None)
    policies.known_file(lora.sha256, path)
    lora = replace(lora, name=shown_name(path, *SAFETY_FOLDERS))
    return SafetyLora(lora.with_scale(one.scale) if one.scale else lora, one.strength)


def _path(policy: OperatorPolicy, one: Required) -> Path:
    """The file, by its name or, where the policy gives none, the one in the folder of safety LoRAs that fits."""
    paths = [lora_path(one.file, *SAFETY_FOLDERS)] if one.file else lora_files(SAFETY_FOLDER)
    why = {path: _unlike(policy, one, path) for path in paths}
    fit = [path for path in paths if not why[path]]
    if len(fit) == 1:
        return fit[0]
    few = "several files fit" if fit else "; ".join(filter(None, why.values())) or "the folder holds no file"
    what = f"the safety LoRA that is required ({one.name}) is not found in {SAFETY_FOLDER}: {few}"
    raise RefusedError("guard.attach", what, "put it there, and name it by required.file in the policy")


def _unlike(policy: OperatorPolicy, one: Required, path: Path) -> str:
    """Why a file is not the one that is required; "" where it is."""
    sha256 = sha256_file(path)
    if one.signed_by:
        return policies.unsigned(path, sha256, one.signed_by, policy)
    return "" if sha256 == one.sha256 else f"{path.name} has the sha256 {sha256[:16]}"
