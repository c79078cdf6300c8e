"""What a training takes of memory, said before its first step.

One micro-batch is run forward and back and thrown away, and what it takes is measured: of a GPU the most that PyTorch's
allocator had given out, of the CPU the most resident memory of the process. That holds what kernels and libraries take
beside the tensors, whatever the network, the options and the libraries are. Nothing of it stays: the steps draw their
own random numbers, and its gradients are dropped.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modular_lora.errors import GuardError
from .optim import make_optimizer
from .options import Options

LEAST_STEPS = 50  # of a shorter training the one micro-batch more would be a good part
SECONDS = 0.002  # between two looks at the process


class Growth:
    """The most memory of ``device`` that was in use inside, above what was in use at first, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._process, self._done = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._first = self._most = 0

    def __enter__(self) -> Growth:
        gc.collect()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._first = torch.cuda.memory_allocated(self._cuda)
        else:
            _trim()
            self._first = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda is not None:
            self._most = torch.cuda.max_memory_allocated(self._cuda)
        else:
            self._look()
            self._done.set()
            self._thread.join()

    @property
    def bytes(self) -> int:
        """Of what has been inside; to be asked afterwards."""
        return max(0, self._most - self._first)

    def _watch(self) -> None:
        while not self._done.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        self._most = max(self._most, self._process.memory_info().rss)


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: it must not be taken for room."""
    if name := ctypes.util.find_library("c"):
        trim = getattr(ctypes.CDLL(name), "malloc_trim", None)
        if trim is not None:
            trim(0)


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes beside what the process has when it starts."""

    batch: int  # most that one micro-batch takes, forward and back
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
    kept = _kept(values, options)  # first: what its libraries take is no part of a micro-batch
    try:
        with torch.random.fork_rng(devices), Growth(device) as growth:
            loss().backward()
    except torch.cuda.OutOfMemoryError as error:
        raise GuardError(
            f"One micro-batch of {options.train_batch_size} does not fit into the memory of {device}: lower "
            "train_batch_size, the size of the images or clip_frames, or use gradient_checkpointing, fp8_base_unet or "
            "blocks_to_swap.",
            code="train.memory",
        ) from error
    gradients = sum(value.numel() * value.element_size() for value in values)
    accumulating = options.gradient_accumulation_steps > 1
    return Need(growth.bytes, gradients, kept, accumulating)


def _kept(values: Sequence[nn.Parameter], options: Options) -> int:
    """Bytes that the optimizer keeps, after a step of it on copies."""
    copies = [nn.Parameter(torch.zeros_like(value)) for value in values]
    optimizer = make_optimizer([{"params": copies, "lr": options.learning_rate}], options)
    for copy in copies:
        copy.grad = torch.full_like(copy, 1e-3)
    optimizer.step()
    found = [part for part in tree_leaves(list(optimizer.state.values())) if isinstance(part, Tensor)]
    return sum(one.numel() * one.element_size() for one in found)


def said(need: Need, device: torch.device) -> str:
    """The line for the report."""
    room = _room(device)
    parts = f"{size(need.batch)} of it for one micro-batch, {size(need.optimizer)} for the optimizer"
    line = f"memory: the steps take {size(need.total)} more than is in use now, by one micro-batch that was measured "
    line += f"({parts}); {size(room)} are free"
    if need.total > room:
        line += ", which is NOT ENOUGH: lower train_batch_size, the size of the images or clip_frames, or use "
        line += "gradient_checkpointing"
        line += ", fp8_base_unet or blocks_to_swap" * (device.type == "cuda")  # the network is in use now
    return line


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
