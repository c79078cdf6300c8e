"""One run of a guarded patcher, from the check before its first evaluation to the figures that an attestation holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
from comfy.model_base import BaseModel

from ..modular_lora.branches.acted import Acted
from ..modular_lora.branches.attachment import ALL_ROLES, Attachment
from ..modular_lora.branches.changes import Owner
from ..modular_lora.errors import GuardError
from ..modular_lora.provenance.attestation import Attestation, Counts, Run
from .measurement import evaluation_rows


@dataclass(eq=False)
class GuardedRun:
    """A run: verified and attached when it starts, counted while it lasts, and checked when it ends.

    `patcher.GuardMixin.guard_begin` starts it. As a context manager it is finished on leaving or, with an error,
    discarded. A guider ends it in ``cleanup``, whether or not it went well, so that there its counts are taken and what
    is wrong with them is kept (`stop`); `around` then raises it, or discards the run that ended with an error.

    Attributes:
        attachment: The branches on the model. A run holds no patcher, as its patcher holds the run: both must go when
            nobody uses them.
        steps: How many evaluations of each kind are expected.
        images: How many images are sampled.
        content: What the run starts from; the same content measures the same evaluation.
        prompt: Which of the guider's conditionings is the prompt; None: no activity is measured.
        level: How noisy the run's start is, 1 where it starts from noise alone; None: not known.
        may_be_empty: Whether a run without any evaluation is right.
        counts: What was counted; None unless the run ended well.
        acted: What each safety LoRA did, as far as it was measured.
        measured: How many evaluations were measured.
        result: The attestation of a run that ended well.
        can_start: Whether it has yet to start; a sampler that starts one without the guard's check is refused.
        shares: g of every image where the task LoRAs give way; None until it is found.
        muted: In how many evaluations the task LoRAs did not act, as they were to find it.
        others: Parts of the same run in which other branches took the place of these (hooked_loras.py).
    """

    attachment: Attachment
    steps: int = 1
    images: int = 1
    content: bytes = b""
    prompt: int | None = None
    level: float | None = None
    may_be_empty: bool = False
    counts: Counts | None = None
    acted: Mapping[Owner, Acted] = field(default_factory=dict)
    measured: int = 0
    result: Attestation | None = None
    can_start: bool = True
    shares: tuple[float, ...] | None = None
    muted: int = 0
    others: list[GuardedRun] = field(default_factory=list)
    _paused: bool = False
    _counting: Run | None = None
    _wrong: Exception | None = None

    def __enter__(self) -> GuardedRun:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.stop()
        if error is None:
            self.finish()
        else:
            self.discard()

    def start(self) -> None:
        """Start counting, and measuring where all LoRAs act.

        Task LoRAs that give way do not act until `restart` or `set_shares` says how far.
        """
        branches = self.attachment.branches
        if branches.gives_way:
            branches.task_share, branches.image_shares = 0.0, self.shares
        self._counting = Run(branches)
        self._measure()

    def restart(self, shares: tuple[float, ...]) -> None:
        """Let the task LoRAs of every image act at its share g, now that it is found; count and measure from here."""
        if self._counting is not None:
            self.muted = self._counting.finish(may_be_empty=True).evaluations  # without a prompt there is none
        self.set_shares(shares)
        self._counting = Run(self.attachment.branches)
        self._measure()

    def set_shares(self, shares: tuple[float, ...]) -> None:
        """The task LoRAs of every image act at its share."""
        self.shares = self.attachment.branches.image_shares = shares

    def _measure(self) -> None:
        branches = self.attachment.branches
        if branches.roles == ALL_ROLES:
            rows = partial(evaluation_rows, self.images) if isinstance(self.attachment.model, BaseModel) else None
            branches.meter.start(rows, self.steps, self.content, self.prompt)

    @property
    def running(self) -> bool:
        """Whether it counts."""
        return self._counting is not None

    def pause(self) -> None:
        """Before other branches take the place of these, which must have been on until now."""
        self.attachment.verify()
        self._paused = True

    def resume(self) -> None:
        """Take the place back."""
        self.attachment.attach()
        self._paused = False

    def stop(self) -> None:
        """Take the counts while the branches are still on; what is wrong with them is kept for `finish`."""
        for other in self.others:
            other.stop()
        counting, self._counting = self._counting, None
        if counting is None:
            return
        meter = self.attachment.branches.meter
        try:
            elsewhere = any(other.counts is not None and other.counts.evaluations for other in self.others)
            counts = counting.finish(self.may_be_empty or elsewhere)
            if self.attachment.branches.gives_way and self.shares is None and counts.evaluations:
                raise GuardError(
                    "This sampler did not let the guard find how far the task LoRAs must give way, so they did not act "
                    "at all: sample with a node that calls a guider, or choose the sum.",
                    code="safety-first.not-found",
                )
            if not self._paused:
                self.attachment.verify()  # what took branches and counter off together leaves equal counts
            measured, self.acted = meter.evaluations, meter.finish(self.images)
            self.counts, self.measured = counts, measured
            self._join()
        except Exception as error:
            self._wrong = error
        finally:
            meter.stop()
            self._let_all_act()

    def _let_all_act(self) -> None:
        """Task LoRAs that gave way act in full again."""
        self.attachment.branches.task_share, self.attachment.branches.image_shares = 1.0, None

    def _join(self) -> None:
        """Count and judge the parts of a run as one."""
        for other in (other for other in self.others if other.counts is not None):
            self.counts = Counts(*(a + b for a, b in zip(self.counts or (0, 0, 0), other.counts or (), strict=True)))
            self.measured += other.measured
            self.acted = {owner: one.least_with(other.acted.get(owner)) for owner, one in self.acted.items()}

    def finish(self, empty: bool = False) -> None:
        """Raise what was wrong with the run; one that was not stopped is discarded.

        ``empty``: no image came out, so that a run without any evaluation is right.
        """
        for other in self.others:
            other.finish()
        if self._counting is not None:
            self.discard()
        self.can_start = False
        wrong, self._wrong = self._wrong, None
        if wrong is not None and not (empty and getattr(wrong, "code", "") == "run.never-evaluated"):
            raise wrong

    def discard(self) -> None:
        """Forget what was counted: a run that an interrupt or error ended is not attested, and no other starts so."""
        for other in self.others:
            other.discard()
        if self._counting is not None:
            self.attachment.branches.meter.stop()
            self._let_all_act()
        self.can_start, self._counting, self._wrong = False, None, None
        self.counts, self.acted, self.measured = None, {}, 0

    def around(self, sample: Callable) -> Callable:
        """A guider's own sampling, which ends this run: an error of it counts even where another wrapper hides it."""

        def guarded(*args, **kwargs):
            try:
                with _alone(self.attachment.model):
                    output = sample(*args, **kwargs)
            except BaseException:
                self.discard()
                raise
            self.finish(_is_even(output))
            return output

        return guarded


_sampled: list[object] = []  # the models of the guarded runs that go on now, one within the other


@contextmanager
def _alone(model: object) -> Iterator[None]:
    """Meanwhile no diffusion model is evaluated but this one, and those of guarded runs around this one.

    A guider may have a second model (0.33.0's Dual Model CFG Guider), whose evaluations nobody counts.
    """
    original = BaseModel.apply_model

    @wraps(original)
    def apply_model(self, *args, **kwargs):
        if not any(self is one for one in _sampled):
            raise GuardError(
                f"This sampler evaluates a second model ({type(self).__name__}) within a guarded run, without the "
                "guard, so that nothing of it could be called guarded: sample one guarded model.",
                code="run.another-model",
            )
        return original(self, *args, **kwargs)

    _sampled.append(model)
    BaseModel.apply_model = apply_model
    try:
        yield
    finally:
        BaseModel.apply_model = original
        _sampled.pop()


def _is_even(output: torch.Tensor) -> bool:
    """Whether every channel of every latent has one value: RES4LYF samples such with a sampler that does nothing."""
    if not isinstance(output, torch.Tensor) or output.is_nested or output.ndim < 3:
        return False
    rows = output.flatten(2)
    return bool((rows == rows[..., :1]).all())
