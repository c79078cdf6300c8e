"""Networks that write in place are trained: what autograd keeps for the backward pass stays as it was kept.

Many add to their activations in place (Flux's blocks, LTX Video's), or by ``out=`` (Qwen's). PyTorch has
``torch.autograd.graph.allow_mutation_on_saved_tensors`` for that, which tells tensors by the address of a Python object
and of their first element: both are given anew to later tensors while the older one is still needed (then the backward
pass gets the values of another tensor), a part of a tensor begins elsewhere than the whole that is written to, and what
it notes of every step is kept until the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Place = tuple[int, int]  # of a storage: its address, and how often it was written to; what shares it shares both


class _Saved:
    """What autograd holds in the place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Kept(TorchDispatchMode):
    """Before a storage is written to, what was saved of it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self._at: dict[Place, WeakSet[_Saved]] = {}
        self._pruned = 1024

    def save(self, tensor: Tensor) -> _Saved:
        place = _place(tensor)
        if place is None:
            return _Saved(tensor)
        if len(self._at) > self._pruned:  # places of which nothing is needed any more
            self._at = {other: saved for other, saved in self._at.items() if saved}
            self._pruned = 1024 + 2 * len(self._at)
        here = self._at.setdefault(place, WeakSet())
        found = next((one for one in here if one.tensor is tensor), None)  # saved by several operations
        if found is None:
            found = _Saved(tensor)
            here.add(found)
        return found

    def _copy(self, written: Tensor) -> None:
        place = _place(written)
        for one in self._at.pop(place, ()) if place is not None else ():
            one.tensor = one.tensor.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[number] if number < len(args) else kwargs.get(argument.name)
            for one in written if isinstance(written, list | tuple) else [written]:
                if isinstance(one, Tensor):
                    self._copy(one)
        return func(*args, **kwargs)


class _Out(TorchFunctionMode):
    """``out=``, which has no gradient, as the write in place that it is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = (kwargs or {}).get("out")
        if not isinstance(out, Tensor) or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return out.copy_(func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "out"}))


def _place(tensor: Tensor) -> Place | None:
    """None for a tensor that nothing is to be told of: without elements, made of others, sparse, of inference mode."""
    try:
        place = tensor.untyped_storage().data_ptr(), tensor._version
    except (RuntimeError, NotImplementedError):
        return None
    return place if tensor.numel() else None


@contextmanager
def writing_allowed() -> Iterator[None]:
    """Forward and backward passes of networks that write in place, while inside."""
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda saved: saved.tensor), kept, _Out():
        yield
