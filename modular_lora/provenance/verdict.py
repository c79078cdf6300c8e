"""The verdict on one image, for programs: plain JSON, with its schema in docs/verdict.schema.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..util import plain_json
from .attestation import Attestation, GateRecord, LoraRecord
from .ledger import EDITED, Known

VERSION = 1
BRIEF = {  # what is left of a verdict where it must not tell more: no name, hash, label, score or sentence
    "": ("version", "image", "attested", "status", "withheld", "file"),
    "gate": ("flagged", "answer", "changed", "action"),
    "refusal": ("rule", "code"),
}

Json = dict[str, Any]


def verdict(
    image: int,
    known: Known,
    *,
    why: str = "",
    file: Mapping[str, str] | None = None,
    withheld: bool = False,
    refusal: Json | None = None,
) -> Json:
    """What is known of one image of a batch.

    Args:
        image: Its number in the batch, from 0.
        known: What the ledger holds of exactly these pixels.
        why: Why it is not attested, where more is known than that no guarded run made it.
        file: The entry of ``images`` that is this image; None where it was not written.
        withheld: Whether it did not go on from the node.
        refusal: See `refused`.
    """
    run, gate = known.run, known.gate
    said = {
        "version": VERSION,
        "image": image,
        "attested": known.guarded,
        "status": run.status if run else "unattested",
        "why": _why(known, why),
        "edited_by": _edits(known),
        "passed_through": list(known.through),
        "withheld": withheld,
        "file": dict(file) if file else None,
        "run": _run(run) if run else None,
        "gate": _gate(gate, known) if gate else None,
        "refusal": refusal,
    }
    return plain_json.finite(said)


def refused(rule: str, code: str, reason: str, remedy: str) -> Json:
    """Why an image was refused, and what helps; ``code``: of the error that would have been raised for it."""
    return {"rule": rule, "code": code, "reason": reason, "remedy": remedy}


def brief(said: Json) -> Json:
    """A verdict without names, hashes, labels, scores and sentences."""
    short = {key: said[key] for key in BRIEF[""]}
    for part in ("gate", "refusal"):
        short[part] = {key: said[part][key] for key in BRIEF[part]} if said[part] else None
    return short


def _edits(known: Known) -> list[Json]:
    """What is known to have edited the image, or what its run started from: nodes by their types, then a gate."""
    made: list[Json] = [{"type": name, "action": None} for name in known.edits]
    return made + ([{"type": "gate", "action": known.gate.action}] if known.gate and known.gate.changed else [])


def _why(known: Known, why: str) -> str:
    if known.guarded:
        edited = "; edits on the way are named" if _edits(known) else ""
        return f"a guarded run made this image{edited}"
    if known.run is not None:
        return known.run.status
    return known.status if known.through else (why or EDITED).removeprefix("unattested: ")


def _run(run: Attestation) -> Json:
    return {
        "evaluations": run.evaluations,
        "base_sha256": run.base_sha256,
        "image_sha256": run.image_sha256,
        "combine": run.combine,
        "task_share": run.task_share,
        "safety_loras": [_safety(run, lora) for lora in run.loras if lora.role == "safety"],
        "task_loras": [_lora(lora) for lora in run.loras if lora.role == "task"],
    }


def _lora(lora: LoraRecord) -> Json:
    strengths = {"strength_model": lora.strength_model, "strength_clip": lora.strength_clip}
    return {"name": lora.name, "sha256": lora.sha256, **strengths}


def _safety(run: Attestation, lora: LoraRecord) -> Json:
    """With its net strengths by the files, as it acted and as a function, and its activity; None: no figure."""
    strengths = (run.net_strength, run.acted_strength, run.functional_strength)
    names = ("net_strength", "acted_strength", "functional_strength")
    found = _lora(lora) | {name: one.get(lora.sha256) for name, one in zip(names, strengths, strict=True)}
    activity = run.activity.get(lora.sha256)
    return found | {"activity": asdict(activity) if activity else None}


def _gate(gate: GateRecord, known: Known) -> Json:
    return {
        "detector": gate.detector,
        "detector_sha256": gate.detector_sha256,
        "settings_sha256": gate.settings_sha256,
        "action": gate.action,
        "second": gate.second,
        "flagged": gate.flagged,
        "answer": gate.answer,
        "changed": gate.changed,
        "findings": [one._asdict() for one in known.found],
    }
