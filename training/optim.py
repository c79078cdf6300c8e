"""Optimizers and schedules by name, as sd-scripts names them, from the libraries that have them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .options import OptionError, Options


def make_optimizer(groups: Sequence[dict[str, Any]], options: Options) -> Optimizer:
    """An optimizer over ``groups`` ({"params", "lr"}); OptionError where its library is not installed."""
    kind, arguments = options.optimizer_type, _arguments(options.optimizer_args)
    if "lr" in arguments or arguments.get("relative_step"):
        name = "lr" if "lr" in arguments else "relative_step"
        raise OptionError(
            f"optimizer_args {name}: the rate is learning_rate times lr_scheduler's share: set these.",
            code="option.optimizer-args",
        )
    arguments["lr"] = options.learning_rate  # every group has its own, but a schedule asks for the default
    try:
        if kind == "AdamW8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **arguments)
        if kind == "Prodigy":
            from prodigyopt import Prodigy

            return Prodigy(groups, **arguments)
        if kind == "Adafactor":
            from transformers.optimization import Adafactor

            fixed_rate = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            return Adafactor(groups, **fixed_rate | arguments)
        return torch.optim.AdamW(groups, **arguments)
    except ImportError as error:
        raise OptionError(f"optimizer_type {kind}: {error}: install that library, or use AdamW.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        given = " ".join(options.optimizer_args) or "none"
        raise OptionError(
            f"optimizer_type {kind} with optimizer_args {given}: {error}: correct them.", code="option.optimizer-args"
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

    constant = options.lr_scheduler == "constant"
    try:
        return get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=None if constant else options.lr_warmup_steps,
            num_training_steps=None if constant else options.max_train_steps,
            scheduler_specific_kwargs=lr_shape(options) or None,
        )
    except ValueError as error:  # polynomial ends at 1e-7
        raise OptionError(
            f"lr_scheduler {options.lr_scheduler}: {error}: raise learning_rate.", code="option.scheduler"
        ) from error


def lr_shape(options: Options) -> dict[str, float]:
    """What the schedule takes beside its steps, under transformers' names."""
    if options.lr_scheduler == "cosine_with_restarts":
        return {"num_cycles": options.lr_scheduler_num_cycles}
    return {"power": options.lr_scheduler_power} if options.lr_scheduler == "polynomial" else {}


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
