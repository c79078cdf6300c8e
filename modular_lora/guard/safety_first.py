"""Safety first: the task LoRAs of an image give way where the safety LoRA acts.

Beside the paper's sum, y = (y0 + s) + t, a second way to put modules together, in every layer of the network:

    y = (y0 + s) + g·t        g in [0, 1], one for each image and all of its run

with y0 = W0·x + b, s and t the shares of the safety LoRAs and of the task LoRAs (branches/fusing.py). With a the
activity of a safety LoRA on the image's prompt (branches/acted.py), in an evaluation without the task LoRAs, and the
bounds of its calibration (activity.py), low up to where a prompt is one of those kept and high from where it is about
the concept:

    g = clamp((high − a) / (high − low), 0, 1), in whole sixteenths, rounded down; of several safety LoRAs the least

Where the two distributions of the calibration overlap, low = high and g is a step there. An image whose activity is not
known has g = 0. A text encoder runs before g is known, so the task LoRAs' layers of it are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..branches.acted import Acted
from ..branches.changes import Owner
from ..errors import GuardError
from ..files.reader import LoraFile
from ..provenance.attestation import Attestation
from . import activity
from .activity import Calibration
from .build import Tasks

PARTS = 16  # of g: images whose g is alike are evaluated together


def calibrations(record: Attestation, safety: Iterable[LoraFile]) -> dict[str, Calibration]:
    """The calibration of every safety LoRA of a guard, by its SHA-256.

    Args:
        record: Of the guard: its base and the strengths.
        safety: The files of its safety LoRAs.

    Raises:
        GuardError: one of them has no calibration that fits this base and strength, or it tells too little
            (`activity.LEAST_AUC`).
    """
    strengths = {lora.sha256: lora.strength_model for lora in record.loras if lora.role == "safety"}
    found = {}
    for lora in safety:
        said = activity.fitting(activity.read(lora), record, strengths[lora.sha256], 1.0)
        if lora.sha256 not in record.net_strength:
            said = "it acts on the text encoder alone, where no activity is measured"
        if isinstance(said, str):
            raise GuardError(
                f"Safety first: of safety LoRA {lora.name} it cannot be told where the task LoRAs must give way: "
                f"{said}; use a copy that Calibrate Safety LoRA wrote for this base and strength, or choose the sum.",
                code="safety-first.no-calibration",
            )
        found[lora.sha256] = said
    return found


def shares(
    known: Mapping[str, Calibration], measured: Sequence[Mapping[Owner, Acted]], images: int
) -> tuple[float, ...]:
    """g of every image of a run.

    Args:
        known: See `calibrations`.
        measured: What was measured of each conditioning that is the prompt, without the task LoRAs; of several of an
            image the strongest counts.
        images: How many the run has.
    """
    found = []
    for image in range(images):
        least = 1.0
        for sha256, calibration in known.items():
            each = (acted["safety", sha256].activity for acted in measured if ("safety", sha256) in acted)
            values = [value for one in each if image < len(one) and (value := one[image]) is not None]
            least = min(least, calibration.share(max(values)) if values else 0.0)
        found.append(math.floor(PARTS * least) / PARTS)
    return tuple(found)


def without_text(tasks: Tasks) -> Tasks:
    """Task LoRAs without what they change in the text encoder."""
    return tuple(replace(task, strength_clip=0.0) for task in tasks)
