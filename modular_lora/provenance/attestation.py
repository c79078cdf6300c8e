"""What a guarded run says of itself.

The counts are those of the branches (branches/attachment.py), never what a graph claims.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from ..branches.attachment import ALL_ROLES, Branches
from ..errors import GuardError

EDITED = "; edited: "  # between a run's status and the types of the nodes that edited its image
OUTSIDE = ", outside start"
SUM, SAFETY_FIRST = COMBINE = ("sum", "safety first")  # how the shares of the LoRAs are put together


@dataclass(frozen=True)
class LoraRecord:
    """One LoRA of a guarded run."""

    role: str
    name: str
    sha256: str
    strength_model: float
    strength_clip: float
    block_weights: str = ""
    scale: str = ""  # "tensors" or "metadata": which was chosen where the file gives two scales; "" where it gives one
    pending: bool = False  # a loader before the guard left it; ``sha256`` is of its values, its file is not known


@dataclass(frozen=True)
class GateRecord:
    """What a gate decided about one image. ``changed``: these pixels are the gate's work on ``source_sha256``."""

    detector: str
    detector_sha256: str
    settings_sha256: str
    action: str
    flagged: bool
    changed: bool
    source_sha256: str  # content hash of the image that was judged
    answer: str = ""  # "pass", "review" (to a person) or "block"
    second: str = ""  # the detector that had to confirm what the first flagged; "" where there was none


class Found(NamedTuple):
    """A label that a gate found in one image."""

    label: str
    score: float
    threshold: float
    blocked: bool  # of the labels that are acted on; False: it is only reported


@dataclass(frozen=True)
class Activity:
    """How strongly one safety LoRA answered to an image's prompt (branches/acted.py).

    Attributes:
        value: Mean over its layers of |z|² / |W0·x + b|², at the run's first evaluation.
        prompt: What the file's calibration says of the prompt: it is about the "concept" or of the "kept" ones, or
            "undecided" between the two; "" where there is no calibration that fits.
        why: Why there is none; "" where there is one.
    """

    value: float
    prompt: str
    why: str = ""


@dataclass(frozen=True)
class Attestation:
    """One sampling run. ``status`` begins with "guarded" only where every branch ran in every evaluation.

    It is "not sampled" where nothing was evaluated; see ``guarded_status`` for what may follow "guarded".
    """

    status: str
    pack: str
    base_family: str
    base_sha256: str
    base_had_merged_loras: bool
    loras: tuple[LoraRecord, ...]
    net_strength: Mapping[str, float]  # of the files; here and below by the SHA-256 of the safety LoRA
    layers: int = 0
    evaluations: int = 0
    firings: int = 0
    text_encoder: str = ""  # "guarded" where the LoRAs have a text-encoder half, else ""
    embeddings_sha256: tuple[str, ...] = ()
    weighted: tuple[str, ...] = ()  # types of nodes that weighted or mixed what the guarded text encoder gave
    vae_sha256: str = ""
    image_sha256: str = ""
    gate: GateRecord | None = None  # None: no gate judged these pixels
    varying_layers: int = 0  # of ``layers``: those in parts that do not run exactly once an evaluation
    functional_strength: Mapping[str, float] = field(default_factory=dict)  # by SHA-256 of the safety LoRA
    functional_not_measured: Mapping[str, str] = field(default_factory=dict)  # the same: why there is no figure
    idle_layers: int = 0  # of ``varying_layers``: those that did not run, for want of the input that they work on
    acted_strength: Mapping[str, float | None] = field(default_factory=dict)  # acted.py; None: nothing to judge
    acted_share: Mapping[str, float] = field(default_factory=dict)  # energy of the safety share over that of y0
    measured_evaluations: int = 0
    activity: Mapping[str, Activity] = field(default_factory=dict)  # of one image; the same keys
    combine: str = SUM  # y = (y0 + s) + t, or with g·t (guard/safety_first.py)
    task_share: float | None = None  # g of one image, of a run the least; None: the sum, or not known
    muted_evaluations: int = 0  # further ones, without the task LoRAs, that found it
    edits: tuple[str, ...] = ()  # types of the nodes that made these pixels of what guarded runs had made, in order
    others: tuple[Attestation, ...] = ()  # further runs behind an image that was put together of several

    @property
    def runs(self) -> tuple[Attestation, ...]:
        """Every run behind this: this one, which has the worst status of all, and the others."""
        return (self, *self.others)

    @property
    def run_status(self) -> str:
        """What the run itself said, whatever was done to its image since."""
        return self.status.partition(EDITED)[0]

    @property
    def safety(self) -> frozenset[LoraRecord]:
        """The safety LoRAs, in any order."""
        return frozenset(lora for lora in self.loras if lora.role == "safety")

    def without_activity(self) -> Attestation:
        """A copy that does not tell what the prompt was about: what files and records have unless a policy asks."""
        return self.of(
            activity={}, acted_share={}, task_share=None, others=tuple(one.without_activity() for one in self.others)
        )

    def to_json(self) -> str:
        """Compact JSON with sorted keys, the form that goes into PNG text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def of(self, **changes) -> Attestation:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def edited(self, edits: tuple[str, ...]) -> Attestation:
        """A copy of which the status names these edits and no others."""
        return self.of(status=self.run_status + (EDITED + ", ".join(edits)) * bool(edits), edits=edits)


def guarded_status(merged_base: bool, outside_start: bool) -> str:
    """What a whole run may say, with what the guard cannot answer for: LoRAs merged before, a start made elsewhere."""
    return "guarded" + ", merged base" * merged_base + OUTSIDE * outside_start


class Counts(NamedTuple):
    """What one run counted. ``idle``: layers that may stay out of a run and did."""

    evaluations: int
    calls: int
    idle: int


class Run:
    """One run of a guarded model, from the counters' state at the start to their state at the end."""

    def __init__(self, branches: Branches):
        self.branches = branches
        self.roles = branches.roles
        self._start = branches.counts()

    def finish(self, may_be_empty: bool) -> Counts:
        """What was counted since the start.

        Raises GuardError unless every guarded layer ran once an evaluation of its root (in a declared part of the
        root: once a run of the part, and the part as often as declared), or where nothing was evaluated although the
        run had steps to do (``may_be_empty`` False).
        """
        evaluated, calls = self.branches.counts()
        evaluations = {root: n - self._start[0][root] for root, n in evaluated.items()}
        calls = {path: n - self._start[1][path] for path, n in calls.items()}
        total = sum(evaluations[root] for root in self.branches.roots)
        if self.roles != ALL_ROLES:
            return Counts(total, 0, 0)
        self._check(evaluations, calls)
        if not total and not may_be_empty:
            raise GuardError(
                "The guarded model was never evaluated although there were steps to sample: another node put a "
                "different model in its place; remove it.",
                code="run.never-evaluated",
            )
        idle = sum(not calls[path] for path in self.branches.varying) if total else 0
        return Counts(total, sum(calls.values()), idle)

    def _check(self, evaluations: Mapping[str, int], calls: Mapping[str, int]) -> None:
        branches = self.branches
        expected = {path: evaluations[branches.runs_with(path)] for path in calls}
        short = {path: f"{n} of {expected[path]}" for path, n in calls.items() if n != expected[path]}
        for part, times in branches.parts.items():
            if not times.allow(evaluations[part], evaluations[branches.root_of(part)]):
                total = evaluations[branches.root_of(part)]
                short |= {p: f"{evaluations[part]} of {total}" for p in calls if branches.runs_with(p) == part}
        if short:
            path, counts = next(iter(short.items()))
            raise GuardError(
                f"The guard's branches did not all run: {len(short)} of {len(calls)} layers fell short, first {path} "
                f"in {counts} evaluations; nodes that skip layers or evaluations (EasyCache, TeaCache, skip-layer "
                "guidance) cannot be used with a guarded model: remove them.",
                code="run.short",
            )
        if any(evaluations.values()) and calls and not any(calls.values()):
            raise GuardError(
                "None of the guarded layers ran: all of them work on inputs that this run does not have; use a safety "
                "LoRA that acts on layers of every run.",
                code="run.idle",
            )
