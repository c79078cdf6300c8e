"""A gate on IMAGE batches: the detector is asked about every image, and what it decided is remembered by content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from ..gate import detectors, nsfw, settings
from ..gate.errors import Blocked, GateError
from ..gate.finding import Detector
from ..gate.gate import OTHERWISE, Outcome, Second, blocked_by, run
from ..gate.settings import Settings
from ..modular_lora.errors import GuardError
from ..modular_lora.guard import activity
from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.attestation import Found, GateRecord
from ..modular_lora.provenance.verdict import refused, verdict
from ..modular_lora.tensor_hashing import tensor_sha256
from . import review
from .enforcement import policy as policies

SUBSTITUTED = {"replace": "replaced by the gate", "empty": "emptied by the gate"}  # action -> status: no run made it


@dataclass(frozen=True)
class Gate:
    """What a MODULAR_LORA_GATE carries: a detector that is ready to judge, and what is done about what it finds."""

    detector: Detector
    settings: Settings
    replacement: np.ndarray | None = None  # h w 3, for the action "replace"
    second: Second | None = None  # confirms what the detector flags

    @property
    def settings_sha256(self) -> str:
        said = asdict(self.settings)
        # presets of before there was one keep their hash
        for name, without in (("review", {}), ("activity", "ignore")):
            if said[name] == without:
                del said[name]
        if self.second is not None:
            said["second"] = {"detector": self.second.detector.sha256, "settings": asdict(self.second.settings)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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


def second_of(gate: object) -> Second:
    """The detector and thresholds of a gate that is to confirm what another flags; GuardError where it has a second."""
    gate = checked(gate)
    if gate.second is not None:
        raise GuardError(
            "confirm: that gate has a second detector itself: connect one without.",
            code="gate-settings.three-detectors",
        )
    if gate.settings.activity != "ignore":
        raise GuardError(
            f"confirm: that gate's activity is {gate.settings.activity}, and a second detector is asked about images "
            "alone: set it to ignore there, and on this node to what is to be done.",
            code="gate-settings.second-activity",
        )
    return Second(gate.detector, gate.settings)


def default_detector() -> str:
    """The preferred of those that need no files; where none is installed, the one whose error says how to install."""
    return next((name for name in detectors.available() if name != detectors.CLASSIFIER), nsfw.NAME)


def outcome_of(images: torch.Tensor, gate: Gate) -> Outcome:
    """See gate.gate.run; images b h w 3. Of their prompts counts what is known of exactly these pixels."""
    known = [] if gate.settings.activity == "ignore" else map(ledger.known, images)
    prompts = [activity.of_prompt(one.run) for one in known]
    found = images.detach().float().cpu().numpy()
    return run(found, gate.detector, gate.settings, gate.replacement, gate.second, prompts)


def reporting(gate: Gate) -> Gate:
    return replace(gate, settings=replace(gate.settings, action="report"))


@dataclass(frozen=True)
class Judged:
    """What a gate made of a batch.

    Attributes:
        images: b h w 3, as they go on; None where none does.
        outcome: What was found, of every image that was judged, with the masks of those that go on.
        verdicts: One for every image that was judged.
    """

    images: torch.Tensor | None
    outcome: Outcome
    verdicts: list[dict]


def judge(images: torch.Tensor, gate: Gate, chosen: Gate | None = None) -> Judged:
    """Judge images (b h w 3) and act on them; what the gate decided is remembered by content.

    An image that the gate changed keeps its run's attestation, and the record says that the gate changed it; what it
    put in an image's place is not called guarded.

    Args:
        images: All of the batch.
        gate: What is asked and done.
        chosen: The gate that was set, where another action than its own is taken; the policy judges it, and its
            settings are what records name.

    Raises:
        RefusedError: For a gate that is looser than the operator's policy.
    """
    chosen = chosen or gate
    check(chosen)
    began = time.monotonic()
    outcome = outcome_of(images, gate)
    seconds = time.monotonic() - began
    out = images.clone() if any(outcome.changed) else images
    for i in np.flatnonzero(outcome.changed):
        out[i] = torch.from_numpy(outcome.images[i]).to(out)
    if gate.settings.action == "replace" and any(outcome.changed):
        _check_replacement(out[outcome.changed.index(True)], gate)
    withheld = [flagged and gate.settings.action == "withhold" for flagged in outcome.flags]
    settings_sha256 = chosen.settings_sha256
    digests = [_remember(images[i], out[i], gate, settings_sha256, outcome, i, withheld[i]) for i in range(len(out))]
    kept = review.keep(images, outcome.answers)
    policies.record_gate(settings_sha256, gate.detector, outcome, seconds, kept)
    verdicts = [
        verdict(i, ledger.known_of(digest), withheld=held, refusal=_refusal(gate, outcome, i) if held else None)
        for i, (digest, held) in enumerate(zip(digests, withheld, strict=True))
    ]
    if any(withheld):
        given = np.flatnonzero(~np.array(withheld))
        outcome = replace(outcome, masks=outcome.masks[given])
        return Judged(out[torch.from_numpy(given)] if len(given) else None, outcome, verdicts)
    return Judged(out, outcome, verdicts)


def check(gate: Gate) -> None:
    """RefusedError for a gate that is looser than the operator's policy."""
    policies.check_gate(gate.settings, gate.settings_sha256, gate.detector, gate.second)


def _check_replacement(image: torch.Tensor, gate: Gate) -> None:
    """GateError where the gate flags what it was given to put in a flagged image's place (h w 3)."""
    if any(outcome_of(image[None], reporting(gate)).flags):
        raise GateError(
            f"replacement: {gate.detector.name} flags it too: connect another image.", code="gate.replacement-flagged"
        )


def _remember(
    before: torch.Tensor,
    after: torch.Tensor,
    gate: Gate,
    settings_sha256: str,
    outcome: Outcome,
    i: int,
    withheld: bool,
) -> str:
    """The hash of the image that the gate's decision is remembered under: what goes on, or what was withheld."""
    source, detector, settings = tensor_sha256(before), gate.detector, gate.settings
    flagged, changed = outcome.flags[i], outcome.changed[i] and not withheld
    second = gate.second.detector.name if gate.second else ""
    decided = settings.action, flagged, changed, source, outcome.answers[i], second
    record = GateRecord(detector.name, detector.sha256, settings_sha256, *decided)
    return ledger.record_gate(record, after, SUBSTITUTED.get(settings.action, ""), _found(settings, outcome, i))


def _found(settings: Settings, outcome: Outcome, i: int) -> Iterator[Found]:
    """The labels found in image i, those that are acted on first."""
    scores = outcome.findings[i].scores
    for label in outcome.blocked[i]:
        yield Found(label, round(scores[label], 6), settings.acted[label], True)
    for label in outcome.reported[i]:
        if label not in outcome.blocked[i]:
            yield Found(label, round(scores[label], 6), settings.report[label], False)


def _refusal(gate: Gate, outcome: Outcome, i: int) -> dict:
    reason = blocked_by(gate.detector, gate.settings, outcome, i)
    return refused("gate.withhold", Blocked.code, reason, OTHERWISE)
