"""Gradient checkpointing of any network: its blocks forget their activations and recompute them going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from ..modular_lora.errors import GuardError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
WHY = (
    "this network's blocks write into what they are given or will need again, so running them again would give wrong "
    "gradients"
)
Loss = Callable[..., torch.Tensor]


@contextmanager
def checkpointed(
    network: nn.Module, wanted: bool = True, left_out: Callable[[], None] | None = None
) -> Iterator[Callable[[Loss], Loss]]:
    """The forward of every block of ``network`` under torch.utils.checkpoint, non-reentrant, while inside.

    Args:
        network: Whose blocks are run again.
        wanted: Without it all stays as it is.
        left_out: Where the network cannot be run again, the blocks are put back, this is called, and the training goes
            on without; where it is None, that is the error ``train.recompute``.

    Yields what a training's loss is to be passed through.
    """
    placed: list[nn.Module] = []

    def put_back() -> None:
        while placed:
            del placed.pop().__dict__["forward"]

    def passed(loss: Loss) -> Loss:
        return loss if left_out is None else _WherePossible(loss, (put_back, left_out))

    try:
        for block in blocks_of(network) if wanted else ():
            if "forward" not in block.__dict__:
                block.__dict__["forward"] = _Recomputed(block.forward)
                placed.append(block)
        yield passed
    finally:
        put_back()


class _WherePossible:
    """A loss that is asked once more, from the same random numbers, after ``instead`` where blocks are refused."""

    def __init__(self, loss: Loss, instead: Sequence[Callable[[], None]]):
        self.loss, self.instead = loss, instead

    def __call__(self, *args: int) -> torch.Tensor:
        numbers = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            return self.loss(*args)
        except GuardError as error:
            if error.code != "train.recompute":
                raise
        torch.set_rng_state(numbers[0])
        torch.cuda.set_rng_state_all(numbers[1])
        for step in self.instead:
            step()
        return self.loss(*args)


@contextmanager
def suspended(network: nn.Module) -> Iterator[None]:
    """The blocks' own forwards in place, for previews: the guard refuses to stack its branches on replaced ones."""
    blocks = [block for block in blocks_of(network) if isinstance(block.__dict__.get("forward"), _Recomputed)]
    placed = {block: block.__dict__.pop("forward") for block in blocks}
    try:
        yield
    finally:
        for block, forward in placed.items():
            block.__dict__["forward"] = forward


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that are no mere containers."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks_of(child)
        elif next(child.parameters(), None) is not None:
            yield child


class OutOfPlace(TorchFunctionMode):
    """Inside, ``x += y`` and its kin, and ``out=x``, write into no x: what uses x from then on finds the sum instead.

    A part of x that is written into (``x[:n] += y``) changes no x here: `_try` finds where that makes a difference.
    """

    PLAIN: ClassVar[dict[Callable[..., Any], Callable[..., torch.Tensor]]] = {
        torch.Tensor.add_: torch.add,
        torch.Tensor.sub_: torch.sub,
        torch.Tensor.mul_: torch.mul,
        torch.Tensor.div_: torch.div,
        torch.Tensor.addcmul_: torch.addcmul,
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen = False  # whether there was any
        self._now: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> what was written into, and its new value

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward`` of these arguments inside."""
        with self:
            said = forward(*args, **kwargs)
        return tree_map(self._current, said)

    def _current(self, part: Any) -> Any:
        while isinstance(part, torch.Tensor) and (found := self._now.get(id(part))) is not None:
            part = found[1]
        return part

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(self._current, (args, kwargs or {}))
        if isinstance(written := kwargs.get("out"), torch.Tensor):
            plain, kwargs = func, {name: value for name, value in kwargs.items() if name != "out"}
        elif (plain := self.PLAIN.get(func)) is not None:
            written = args[0]
        else:
            return func(*args, **kwargs)
        self.seen = True
        new = plain(*args, **kwargs).to(written.dtype)
        self._now[id(written)] = written, new
        return new


class _Recomputed:
    """A block's forward that keeps no activations.

    Some blocks write into what they are given, and into what their own backward pass needs (Flux adds to its stream in
    place). Run again, they would find it overwritten, so sums are made out of place here. Before its first call a block
    is tried: that this changes nothing of what it says, and that nothing it needs is still written over.
    """

    def __init__(self, forward: Callable):
        self.forward = forward
        self._tried = False

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if not self._tried:
            _try(self.forward, args, kwargs)
            self._tried = True
        before = [(part, part._version) for part in _tensors((args, kwargs))]
        made = checkpoint(self._out_of_place, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        if any(part._version != version for part, version in before):
            raise _refused()
        return made

    def _out_of_place(self, *args, **kwargs):
        return OutOfPlace().run(self.forward, *args, **kwargs)


def _try(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """GuardError where a block could not be run again, seen by running it on what it is given now."""
    devices = {part.device for part in _tensors((args, kwargs)) if part.device.type == "cuda"}
    needed: list[tuple[torch.Tensor, int]] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        needed.append((part, part._version))
        return part

    mode = OutOfPlace()
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        said = _tensors(mode.run(forward, *args, **kwargs))
    if any(part._version != version for part, version in needed):
        raise _refused()
    if not mode.seen:
        return
    copies = {id(part): part.detach().clone() for part in _tensors((args, kwargs))}
    before = {name: part._version for name, part in copies.items()}
    with torch.random.fork_rng(devices), torch.no_grad():
        own, named = tree_map(lambda part: copies.get(id(part), part), (args, kwargs))
        plain = _tensors(forward(*own, **named))
    returned = {part.untyped_storage().data_ptr() for part in plain}
    written = [part for name, part in copies.items() if part._version != before[name]]
    kept = all(part.untyped_storage().data_ptr() in returned for part in written)  # what the caller goes on with
    if not (kept and len(said) == len(plain) and all(map(torch.equal, said, plain))):
        raise _refused()


def _refused() -> GuardError:
    return GuardError(
        f"gradient_checkpointing: {WHY}: switch it off; mixed_precision bf16 halves the memory too.",
        code="train.recompute",
    )


def _tensors(parts: object) -> list[torch.Tensor]:
    return [part for part in tree_leaves(parts) if isinstance(part, torch.Tensor) and not part.is_inference()]
