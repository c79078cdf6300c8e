"""Optimizers and schedules by name, as sd-scripts names them, from the libraries that have them."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .options import OptionError, Options, schedule_free

ELSEWHERE = {  # optimizer -> module, package to install, its class
    "AdamW8bit": ("bitsandbytes.optim", "bitsandbytes", "AdamW8bit"),
    "Adafactor": ("transformers.optimization", "transformers", "Adafactor"),
    "Prodigy": ("prodigyopt", "prodigyopt", "Prodigy"),
    "CAME": ("pytorch_optimizer", "pytorch-optimizer", "CAME"),
    "Lion": ("lion_pytorch", "lion-pytorch", "Lion"),
    "AdamWScheduleFree": ("schedulefree", "schedulefree", "AdamWScheduleFree"),
    "RAdamScheduleFree": ("schedulefree", "schedulefree", "RAdamScheduleFree"),
}
FIXED_RATE = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # Adafactor: a schedule's rate


def make_optimizer(groups: Sequence[dict[str, Any]], options: Options) -> Optimizer:
    """An optimizer over ``groups`` ({"params", "lr"}); OptionError where its library is not installed."""
    kind, arguments = options.optimizer_type, optimizer_arguments(options)
    if "lr" in arguments or arguments.get("relative_step"):
        name = "lr" if "lr" in arguments else "relative_step"
        raise OptionError(
            f"optimizer_args {name}: the rate is learning_rate times lr_scheduler's share: set these.",
            code="option.optimizer-args",
        )
    made = _optimizer(kind)
    arguments["lr"] = options.learning_rate  # every group has its own, but a schedule asks for the default
    try:
        if unknown := sorted(set(arguments) - set(inspect.signature(made).parameters)):  # some take any, and drop it
            raise TypeError(f"it has no {unknown[0]}")
        return made(groups, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = " ".join(options.optimizer_args) or "none"
        raise OptionError(
            f"optimizer_type {kind} with optimizer_args {given}: {error}: correct them.", code="option.optimizer-args"
        ) from error


def optimizer_arguments(options: Options) -> dict[str, Any]:
    """What the optimizer is given beside the rate: ``optimizer_args``, and what the options' schedule asks for."""
    own: dict[str, Any] = {}
    if options.optimizer_type == "Adafactor":
        own = dict(FIXED_RATE)
    if options.optimizer_type == "AdamWScheduleFree" and options.lr_warmup_steps:
        own = {"warmup_steps": options.lr_warmup_steps}  # its averages weigh the steps of warm-up less
    return own | _arguments(options.optimizer_args)


def _optimizer(kind: str) -> type[Optimizer]:
    if kind not in ELSEWHERE:
        return torch.optim.AdamW
    module, package, name = ELSEWHERE[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise OptionError(
            f"optimizer_type {kind}: {error}: install it with pip install {package}, or use AdamW.",
            code="option.optimizer-missing",
        ) from error


def _arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """{"weight_decay": 0.01} of "weight_decay=0.01"."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            equals = ""
        if not equals:
            raise OptionError(
                f"optimizer_args: {pair!r} is not name=value: write e.g. weight_decay=0.01.",
                code="option.optimizer-args",
            )
    return found


def make_scheduler(optimizer: Optimizer, options: Options):
    """transformers' schedule of that name over ``max_train_steps``; OptionError where it takes no such numbers."""
    from transformers import get_scheduler

    kind = "constant" if schedule_free(options) else options.lr_scheduler  # such an optimizer warms up by itself
    constant = kind == "constant"
    if kind == "warmup_stable_decay" and options.lr_warmup_steps + options.lr_decay_steps > options.max_train_steps:
        raise OptionError(
            f"lr_decay_steps: {options.lr_decay_steps} and {options.lr_warmup_steps} of lr_warmup_steps are more than "
            f"the {options.max_train_steps} steps of the training: lower one of them.",
            code="option.scheduler",
        )
    try:
        return get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=None if constant else options.lr_warmup_steps,
            num_training_steps=None if constant else options.max_train_steps,
            scheduler_specific_kwargs=_shape(options) or None,
        )
    except ValueError as error:  # polynomial ends at 1e-7
        raise OptionError(
            f"lr_scheduler {options.lr_scheduler}: {error}: raise learning_rate.", code="option.scheduler"
        ) from error


def _shape(options: Options) -> dict[str, float]:
    """What the schedule takes beside its steps, under transformers' names."""
    kind, least = options.lr_scheduler, options.lr_scheduler_min_lr_ratio
    if kind == "cosine_with_restarts":
        return {"num_cycles": options.lr_scheduler_num_cycles}
    if kind == "polynomial":
        return {"power": options.lr_scheduler_power}
    if kind == "cosine_with_min_lr":
        return {"min_lr_rate": least}
    if kind == "warmup_stable_decay":
        return {"num_decay_steps": options.lr_decay_steps, "min_lr_ratio": least}
    if kind == "inverse_sqrt" and options.lr_scheduler_timescale:
        return {"timescale": options.lr_scheduler_timescale}
    return {}


class Masters:
    """float32 copies of parameters that are computed with in half precision; float32 ones stand for themselves."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.working = list(parameters)
        self.values = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.working]
        self._behind = {id(p): value for p, value in zip(self.working, self.values, strict=True)}

    def of(self, working: nn.Parameter) -> nn.Parameter:
        """The float32 values that stand behind a parameter."""
        return self._behind[id(working)]

    def take_grads(self) -> None:
        for working, value in zip(self.working, self.values, strict=True):
            if value is not working and working.grad is not None:
                value.grad, working.grad = working.grad.float(), None

    @torch.no_grad()
    def give_back(self) -> None:
        for working, value in zip(self.working, self.values, strict=True):
            if value is not working:
                working.copy_(value)

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        for value, tensor in zip(self.values, tensors, strict=True):
            value.copy_(tensor)
        self.give_back()
