"""Which models may be evaluated now, while a policy is in force.

A permit holds as long as the code that it was granted to runs, in its own thread or task alone; then the one before it
holds again. A run of a guider inside a node, or inside another run, has its own. Beside these, a model may be evaluated
while its functional strength is measured (functional.py), of which nothing leaves.

| permit | granted for | evaluations | runs of a guider |
|---|---|---|---|
| NO_MODEL | a node; it holds where no node runs, too | of no model | are checked |
| of one model | a run of a guider, once it was checked | of this model | are checked |
| EVERY_MODEL | a training or an audit that the policy opens, and the ready check | of every model | are not checked |
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Permit:
    """What may be evaluated.

    Args:
        model: The diffusion model (comfy.model_base.BaseModel) of a run that was checked.
        every_model: Whether all may be, and runs of a guider need no check.
    """

    model: torch.nn.Module | None = None
    every_model: bool = False

    def covers(self, model: torch.nn.Module) -> bool:
        """Whether an evaluation of this very object is permitted."""
        return self.every_model or self.model is model


NO_MODEL = Permit()
EVERY_MODEL = Permit(every_model=True)
_granted: contextvars.ContextVar[Permit] = contextvars.ContextVar("modular_lora_permit", default=NO_MODEL)


def current() -> Permit:
    """The permit that holds here."""
    return _granted.get()


@contextmanager
def granted(permit: Permit) -> Iterator[None]:
    """Meanwhile this permit holds instead of the one before."""
    token = _granted.set(permit)
    try:
        yield
    finally:
        _granted.reset(token)
