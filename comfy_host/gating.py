"""A gate on IMAGE batches: the detector is asked about every image, and what it decided is remembered by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from ..gate import detectors, nsfw, settings
from ..gate.errors import GateError
from ..gate.finding import Detector
from ..gate.gate import Outcome, run
from ..gate.settings import Settings
from ..modular_lora.errors import GuardError
from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.attestation import GateRecord
from ..modular_lora.tensor_hashing import tensor_sha256
from .enforcement import policy as policies

SUBSTITUTED = {"replace": "replaced by the gate", "empty": "emptied by the gate"}  # action -> status: no run made it


@dataclass(frozen=True)
class Gate:
    """What a MODULAR_LORA_GATE carries: a detector that is ready to judge, and what is done about what it finds."""

    detector: Detector
    settings: Settings
    replacement: np.ndarray | None = None  # h w 3, for the action "replace"

    @property
    def settings_sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode()).hexdigest()


def checked(gate: object) -> Gate:
    """The gate of a socket, the default where none is connected; GuardError for what an any-type node brought."""
    if gate is None:
        detector = detectors.make(default_detector())
        return Gate(detector, policies.tightened(settings.defaults(detector), detector))
    if not isinstance(gate, Gate):
        raise GuardError(
            f"gate: got a {type(gate).__name__}: connect the gate output of Gate Settings.",
            code="gate-settings.not-connected",
        )
    return gate


def default_detector() -> str:
    """The preferred of those that need no files; where none is installed, the one whose error says how to install."""
    return next((name for name in detectors.available() if name != detectors.CLASSIFIER), nsfw.NAME)


def outcome_of(pictures: torch.Tensor, gate: Gate) -> Outcome:
    """See gate.gate.run; pictures b h w 3."""
    return run(pictures.detach().float().cpu().numpy(), gate.detector, gate.settings, gate.replacement)


def reporting(gate: Gate) -> Gate:
    return replace(gate, settings=replace(gate.settings, action="report"))


def judge(pictures: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, Outcome]:
    """Pictures (b h w 3) as the gate hands them on, and what it found; what it decided is remembered by content.

    A picture that the gate changed keeps its run's attestation, and the record says that the gate changed it; what it
    put in a picture's place is not called guarded. RefusedError for a gate that is looser than the operator's policy.
    """
    policies.check_gate(gate.settings, gate.settings_sha256, gate.detector)
    outcome = outcome_of(pictures, gate)
    out = pictures.clone() if any(outcome.changed) else pictures
    for i in np.flatnonzero(outcome.changed):
        out[i] = torch.from_numpy(outcome.pictures[i]).to(out)
    if gate.settings.action == "replace" and any(outcome.changed):
        _check_replacement(out[outcome.changed.index(True)], gate)
    for before, after, flagged, changed in zip(pictures, out, outcome.flags, outcome.changed, strict=True):
        _remember(before, after, gate, flagged, changed)
    policies.record_gate(gate.settings_sha256, gate.detector, outcome)
    return out, outcome


def _check_replacement(picture: torch.Tensor, gate: Gate) -> None:
    """GateError where the gate flags what it was given to put in a flagged picture's place (h w 3)."""
    if any(outcome_of(picture[None], reporting(gate)).flags):
        raise GateError(
            f"replacement: {gate.detector.name} flags it too: connect another image.", code="gate.replacement-flagged"
        )


def _remember(before: torch.Tensor, after: torch.Tensor, gate: Gate, flagged: bool, changed: bool) -> None:
    source, detector, action = tensor_sha256(before), gate.detector, gate.settings.action
    record = GateRecord(detector.name, detector.sha256, gate.settings_sha256, action, flagged, changed, source)
    ledger.record_gate(record, after, SUBSTITUTED.get(action, ""))
