"""Whether this server guards: shown on a tiny model, by ComfyUI's own sampling, with the hooks of the policy in place.

A run without the guard must be refused; one with a LoRA beside the weights must be attested and give the latents of a
model that the same LoRA was merged into. What is said is a line of the record, which must be writable for it.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import comfy.model_management
import torch

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import sha256_file
from ...modular_lora.guard.build import GuardLimits, SafetyLora
from ...modular_lora.provenance import signing
from ...operators.policy import OperatorPolicy, Required
from ...operators.rules import RefusedError
from .. import patcher as host
from .. import tiny_model
from ..model_folders import SAFETY_FOLDERS, file_names, file_path
from . import permits
from . import policy as policies

LARGEST_ERROR = 0.01  # of the latents against the merged model's, as a share of what the LoRA changes


class NotReady(GuardError):
    """The server does not guard as the policy asks; nothing should be sent to it."""

    code = "ready"


def prove() -> dict[str, object]:
    """Try it, on the thread that runs prompts while it runs none.

    Returns:
        What was shown, in words, with the seconds it took.

    Raises:
        GuardError: Where one part of it does not hold.
    """
    began = time.monotonic()
    policy = policies.current()
    if policy is None:
        raise NotReady("there is no policy: put one in force", code="ready.no-policy")
    comfy.model_management.interrupt_current_processing(False)  # as ComfyUI's executor begins
    missing = [one.name for one in policy.guard.required if not _is_there(policy, one)]
    if missing:
        what = f"the safety LoRA that the policy requires ({missing[0]}) is in no folder of this server"
        raise NotReady(f"{what}: put it into {SAFETY_FOLDERS[0]}", code="ready.safety-lora-missing")
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        said: dict[str, object] = {"refused": _refused(policy), "guarded": _guarded()}
    said |= {"safety_loras": len(policy.guard.required), "seconds": round(time.monotonic() - began, 3)}
    policies.record(policy, "ready", **said)
    return said


def _is_there(policy: OperatorPolicy, one: Required) -> bool:
    """Whether a folder of safety LoRAs, or else of LoRAs, has a file that this rule takes."""
    for folder in SAFETY_FOLDERS:
        for path in (file_path(folder, name) for name in file_names(folder) if name.endswith(".safetensors")):
            if _is_it(policy, one, path):
                return True
    return False


def _is_it(policy: OperatorPolicy, one: Required, path: Path) -> bool:
    if not one.signed_by:
        return sha256_file(path) == one.sha256
    return signing.signature_path(path).is_file() and not policies.unsigned(
        path, sha256_file(path), one.signed_by, policy
    )


@cache
def _models() -> tuple:
    """The tiny model, the same with a LoRA beside its weights, and with that LoRA in them."""
    base = tiny_model.tiny_model(comfy.model_management.get_torch_device())
    lora, merged = tiny_model.tiny_lora(base)
    guarded, _ = host.guard(base, None, (SafetyLora(lora, 1.0),), (), False, GuardLimits())
    return base, guarded, merged


def _refused(policy: OperatorPolicy) -> str:
    """How the policy answers a run without the guard."""
    if not policy.guard.required:
        return "not asked for: the policy requires no safety LoRA"
    try:
        tiny_model.sampled(_models()[0])
    except RefusedError as error:
        return error.rule
    raise NotReady("a run without the guard was not refused: restart the server", code="ready.not-refused")


def _guarded() -> str:
    """What a guarded run attests, after its latents were compared."""
    base, guarded, merged = _models()
    with permits.granted(permits.EVERY_MODEL):  # these runs are no images and carry no LoRA of the policy
        patcher = host.unwrap(guarded)
        latents, plain, wanted = (tiny_model.sampled(one).float() for one in (patcher, base, merged))
    attested = host.attestation(patcher)
    change = (wanted - plain).abs().max()
    if not attested.status.startswith("guarded") or not change > 0:
        raise NotReady(f"a guarded run reads {attested.status!r}: restart the server", code="ready.not-guarded")
    if not (error := (latents - wanted).abs().max() / change) <= LARGEST_ERROR:
        what = f"a guarded run is off by {float(error):.3g} of what its LoRA changes"
        raise NotReady(f"{what}: check the server's PyTorch and its GPU", code="ready.not-guarded")
    return f"{attested.status}, {attested.evaluations} evaluations, {attested.firings} branch calls"
