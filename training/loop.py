"""The training loop: one for task and safety LoRAs, knowing neither model family nor host.

Every step draws its random numbers from a generator of its own (seeds.step_generator), so going on at step n needs
adapters, optimizer and schedule, and no generator state.
"""

from __future__ import annotations

import glob
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..modular_lora import command
from ..modular_lora.errors import GuardError
from . import memory
from .average import Average
from .logs import logs
from .optim import Masters, make_optimizer, make_scheduler
from .options import Options, fingerprint, schedule_free
from .previews import Drawn
from .seeds import role_seed
from .state import load_state, save_state
from .stopping import Stopping, stopping

logger = logging.getLogger("modular_lora")


class Watch(command.Watch, Protocol):
    """What a host shows of a training; its stages are preparation: caching, pools."""

    def step(self, step: int, total: int, losses: list[float]) -> None:
        """``step`` optimizer steps are done; ``losses`` has one a step."""

    def validated(self, losses: list[tuple[int, float]]) -> None:
        """The validation loss was taken once more; ``losses`` has (step, loss) of every time."""

    def sample(self, step: int, images: list[Path], without: Sequence[Path] = ()) -> None:
        """Previews were drawn; ``without``: the same prompts without the safety LoRA."""

    def say(self, text: str) -> None:
        """What is worth knowing before the first step."""


@dataclass(frozen=True, eq=False)
class Job:
    """What one training consists of, beside its options."""

    groups: list[tuple[list[nn.Parameter], float]]  # parameters and learning rate
    loss: Callable[[int, int], Tensor]  # (step, micro-batch) -> scalar
    write: Callable[[Path, int, Masters], None]  # the LoRA file as of ``step``
    fingerprint: dict[str, str]  # what a resumed state must agree on
    after_step: Callable[[Masters], None] = lambda masters: None  # on the float32 values, before they are given back
    prepare: Callable[[int], None] = lambda step: None  # what a step needs and may be interrupted in: pools
    preview: Callable[[int], Drawn] = lambda step: Drawn([], [])
    validate: Callable[[], float] | None = None  # loss on images that are not trained on, without gradient
    validate_every: int = 0  # steps; before the first and after the last one as well
    extra: Callable[[], dict[str, Any]] = dict  # further state, and how it is put back
    load_extra: Callable[[dict[str, Any]], None] = lambda state: None
    largest: Callable[[], Tensor] | None = None  # the loss of the micro-batch that takes most memory; None: the first
    notes: list[str] = field(default_factory=list)  # what the loop has to say in the report


@dataclass
class _Fit:
    job: Job
    options: Options
    masters: Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler
    stopping: Stopping
    device: torch.device
    average: Average | None = None  # of the weights, where ema_decay is set
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    whole: bool = True  # weights, optimizer and schedule are as of one step
    saved: int = 0  # step of the newest state on disk

    @property
    def step(self) -> int:
        return len(self.losses)

    def state(self) -> dict[str, Any]:
        kept = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        state: dict[str, Any] = {name: part.state_dict() for name, part in kept.items()}
        values = [value.detach().cpu() for value in self.masters.values]
        state |= {"values": values, "losses": self.losses, "extra": self.job.extra()}
        if self.average is not None:
            state["average"] = [value.cpu() for value in self.average.values]
        return state | {"validation": self.validation}

    def load(self, state: dict[str, Any]) -> None:
        self.masters.load(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.job.load_extra(state["extra"])
        self.losses[:] = state["losses"]
        self.validation[:] = state.get("validation", [])  # a state may be from before there was one
        if self.average is not None:
            torch._foreach_copy_(self.average.values, state["average"])
        self.saved = self.step
        for group, rate, share in zip(  # as of this many steps: the state's may have been of fewer
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * share(self.schedule.last_epoch)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, the weights are what is to be saved, shown and validated: an average, where one is kept."""
        if self.average is not None:
            try:
                with self.average.used():
                    self.masters.give_back()
                    yield
            finally:
                self.masters.give_back()
        elif schedule_free(self.options):
            kept = [value.detach().clone() for value in self.masters.values]
            self.optimizer.eval()  # type: ignore[attr-defined]  # from where gradients are taken to the average
            self.masters.give_back()
            try:
                yield
            finally:
                self.optimizer.train()  # type: ignore[attr-defined]  # back, but for rounding
                self.masters.load(kept)
        else:
            yield


def fit(job: Job, options: Options, device: torch.device, watch: Watch) -> list[float]:
    """Train to ``max_train_steps``; gives the loss of every step. The LoRA file is written at its end and on the way.

    However it ends, the state of the last step is kept. Ctrl+C and SIGTERM wait for the end of the step in hand and
    raise Stopped; a second one raises it at once, and the state is of the step before. Raises GuardError where the
    loss is not finite, before the adapters are touched by it.
    """
    devices = [device] if device.type == "cuda" else []
    with stopping() as stop, torch.random.fork_rng(devices):
        run = _begin(job, options, device, stop)
        try:
            with logs(options) as log:
                _train(run, watch, log)
        except BaseException:
            _keep(run)
            raise
        with stop.whole(then=False):  # it is done: there is nothing left to stop
            if run.step > run.saved:
                _save_state(run)
            with run.saving():
                job.write(Path(options.output_dir) / f"{options.output_name}.safetensors", run.step, run.masters)
    if run.validation:
        job.notes.append(_validated(run.validation))
    return run.losses


def _train(run: _Fit, watch: Watch, log: Callable[[int, dict[str, float]], None]) -> None:
    options, job = run.options, run.job
    if options.max_train_steps - run.step >= memory.LEAST_STEPS:
        _say_memory(run, watch)
    _validate(run, watch, log)
    while run.step < options.max_train_steps:
        run.stopping.check()
        watch.check()
        job.prepare(run.step)
        with run.stopping.whole():
            _step(run)
            log(run.step, {"loss": run.losses[-1], "lr": run.optimizer.param_groups[0]["lr"]})
            watch.step(run.step, options.max_train_steps, run.losses)
            if _due(options.save_every_n_steps, run.step) and run.step < options.max_train_steps:
                _save(run)
        _validate(run, watch, log)
        if _due(options.sample_every_n_steps, run.step):
            with run.saving():
                drawn = job.preview(run.step)
            watch.sample(run.step, *drawn)


def _validate(run: _Fit, watch: Watch, log: Callable[[int, dict[str, float]], None]) -> None:
    """The validation loss as of this step, where it is due and a state that was resumed has none of it."""
    step, every, last = run.step, run.job.validate_every, run.options.max_train_steps
    due = step in (0, last) or _due(every, step)
    if run.job.validate is None or not due or (run.validation and run.validation[-1][0] == step):
        return
    with run.saving():
        loss = run.job.validate()
    run.validation.append((step, loss))
    log(step, {"validation_loss": loss})
    watch.validated(run.validation)


def _validated(losses: list[tuple[int, float]]) -> str:
    """The line of the report."""
    (lowest, least), (last, loss) = min(losses, key=lambda pair: pair[1]), losses[-1]
    line = f"validation loss {losses[0][1]:.4f} before, lowest {least:.4f} at step {lowest}, {loss:.4f} at step {last}"
    risen = f": it has risen since step {lowest}, a sign that images are being memorized"
    return line if lowest == last else line + risen


def _say_memory(run: _Fit, watch: Watch) -> None:
    """What the steps will take, on the report and before the first of them."""
    watch.check()
    run.job.prepare(run.step)
    largest = run.job.largest or (lambda: run.job.loss(run.step, 0))
    need = memory.foresee(largest, run.masters.values, run.options, run.device)
    for working in run.masters.working:
        working.grad = None
    line = memory.said(need, run.device)
    run.job.notes.append(line)
    watch.say(line)


def _keep(run: _Fit) -> None:
    """The state of the last step, when something ends a training before its end; said in the log."""
    try:
        with run.stopping.whole(signals=2, then=False):
            if run.step > run.saved and run.whole:
                _save_state(run)
    except Exception as error:
        logger.error("the state of step %d could not be kept: %s", run.step, error)
    if run.saved:
        folder = state_folder(run.options, run.saved)
        kept = folder if folder.is_dir() else run.options.resume
        logger.warning("step %d of %d was the last; resume from %s", run.step, run.options.max_train_steps, kept)


def state_folder(options: Options, step: int) -> Path:
    return Path(options.output_dir) / f"{options.output_name}-step{step:08d}-state"


def _begin(job: Job, options: Options, device: torch.device, stop: Stopping) -> _Fit:
    masters = Masters([p for parameters, _ in job.groups for p in parameters])
    rest, groups = list(masters.values), []
    for parameters, rate in job.groups:
        groups.append({"params": rest[: len(parameters)], "lr": rate})
        del rest[: len(parameters)]
    optimizer = make_optimizer(groups, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.mixed_precision == "fp16")
    run = _Fit(job, options, masters, optimizer, make_scheduler(optimizer, options), scaler, stop, device)
    if options.ema_decay:
        run.average = Average(masters.values, options.ema_decay, warm=True)
    if options.resume:
        _resume(run)
    if schedule_free(options):
        optimizer.train()  # type: ignore[attr-defined]
    return run


def _resume(run: _Fit) -> None:
    """Go on from ``options.resume``, for as many steps as are asked for now."""
    folder, steps = Path(run.options.resume), run.options.max_train_steps
    state, before = load_state(folder, run.job.fingerprint, fingerprint(type(run.options)()))
    if (step := len(state["losses"])) > steps:
        raise GuardError(
            f"resume {folder.name}: is of step {step}, max_train_steps is {steps}: set it above {step}.",
            code="resume.past-end",
        )
    run.load(state)
    note = f"gone on from step {step} of {before}"
    if step == steps:
        note += f": NO further step was trained, since max_train_steps is {steps}: raise it to go on"
    elif str(steps) != before:
        note += f", to {steps}: from there on the learning rate is that of a schedule of {steps} steps"
    run.job.notes.append(note)
    logger.info(note)


def _step(run: _Fit) -> None:
    options, total = run.options, 0.0
    torch.manual_seed(role_seed(options.seed, f"dropout:{run.step}"))
    for micro in range(options.gradient_accumulation_steps):
        loss = run.job.loss(run.step, micro) / options.gradient_accumulation_steps
        run.scaler.scale(loss).backward()
        total += loss.item()
    if not math.isfinite(total):
        raise GuardError(
            f"The loss is {total} at step {run.step + 1}: lower learning_rate, or use mixed_precision bf16 or no.",
            code="train.loss-not-finite",
        )
    run.masters.take_grads()
    run.scaler.unscale_(run.optimizer)
    if options.max_grad_norm:
        nn.utils.clip_grad_norm_(run.masters.values, options.max_grad_norm)
    with run.stopping.whole(signals=sys.maxsize, then=False):  # half a step of an optimizer is no state
        run.whole = False
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.schedule.step()
        run.job.after_step(run.masters)
        run.masters.give_back()
        run.losses.append(total)
        if run.average is not None:
            run.average.update(step=run.step)
        run.whole = True


def _save(run: _Fit) -> None:
    name = f"{run.options.output_name}-step{run.step:08d}.safetensors"
    with run.saving():
        run.job.write(Path(run.options.output_dir) / name, run.step, run.masters)
    _save_state(run)


def _save_state(run: _Fit) -> None:
    """The newest state replaces the ones before it; LoRA files of earlier steps stay."""
    newest = state_folder(run.options, run.step)
    save_state(newest, run.job.fingerprint, run.state())
    run.saved = run.step
    for folder in newest.parent.glob(f"{glob.escape(run.options.output_name)}-step*-state"):
        if folder != newest:
            shutil.rmtree(folder, ignore_errors=True)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
