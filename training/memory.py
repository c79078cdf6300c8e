"""What a training takes of memory, said before its first step.

One micro-batch is run forward and back and thrown away, and the tensors that it makes are counted as they come and go:
what is alive at once is what the steps will need, whatever the network, the options and the libraries are. Nothing of
it stays: the steps draw their own random numbers, and its gradients are dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..modular_lora.errors import GuardError
from .optim import make_optimizer
from .options import Options

LEAST_STEPS = 50  # of a shorter training the one micro-batch more would be a good part


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside; one that is given from outside is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}  # storages, by their place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for part in _tensors((args, kwargs)):
            self._add(part, count=False)
        made = func(*args, **(kwargs or {}))
        for part in _tensors(made):
            self._add(part, count=True)
        return made

    def _add(self, tensor: Tensor, count: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


def _tensors(parts: object) -> list[Tensor]:
    return [part for part in tree_leaves(parts) if isinstance(part, Tensor)]


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes beside what the process has when it starts."""

    batch: int  # most that is alive at once in one micro-batch, forward and back
    gradients: int  # of the adapters
    optimizer: int  # what it keeps between two steps
    accumulating: bool  # whether a micro-batch runs beside the gradients of those before it

    @property
    def total(self) -> int:
        """The most at once."""
        return self.optimizer + max(self.batch + self.gradients * self.accumulating, self.gradients)


def foresee(loss: Callable[[], Tensor], values: Sequence[nn.Parameter], options: Options, device: torch.device) -> Need:
    """What the steps will need; ``loss`` runs one micro-batch, of which ``values`` are what is trained.

    Raises GuardError where the micro-batch does not fit.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), Alive() as alive:
            loss().backward()
    except torch.cuda.OutOfMemoryError as error:
        raise GuardError(
            f"One micro-batch of {options.train_batch_size} does not fit into the memory of {device}: lower "
            "train_batch_size or the size of the images, or switch gradient_checkpointing on.",
            code="train.memory",
        ) from error
    gradients = sum(value.numel() * value.element_size() for value in values)
    accumulating = options.gradient_accumulation_steps > 1
    return Need(alive.peak, gradients, _kept(values, options), accumulating)


def _kept(values: Sequence[nn.Parameter], options: Options) -> int:
    """Bytes that the optimizer keeps, after a step of it on copies."""
    copies = [nn.Parameter(torch.zeros_like(value)) for value in values]
    optimizer = make_optimizer([{"params": copies, "lr": options.learning_rate}], options)
    for copy in copies:
        copy.grad = torch.full_like(copy, 1e-3)
    optimizer.step()
    found = _tensors(list(optimizer.state.values()))
    return sum(one.numel() * one.element_size() for one in found)


def said(need: Need, device: torch.device) -> str:
    """The line for the report."""
    room = _room(device)
    parts = f"{size(need.batch)} of it for one micro-batch, {size(need.optimizer)} for the optimizer"
    line = f"memory: the tensors of the training take {size(need.total)} more than there is in use now ({parts}); "
    line += f"what libraries take beside them is not counted; {size(room)} are free"
    if need.total > room:
        line += ", which is NOT ENOUGH: lower train_batch_size or the size of the images, or use gradient_checkpointing"
    return line


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
