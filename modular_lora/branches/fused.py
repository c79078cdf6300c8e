"""The fused terms of layers: made many at once, held in one dtype and on one device, and the count of their calls."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import GuardError
from .acted import Meter
from .changes import Term
from .fusing import Fused, count, fuse
from .layer_spec import LayerSpec

COMPUTE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
traced = threading.Event()  # whether torch.compile has looked at a branch in this process


def note_traced() -> None:
    """Run by torch.compile while it looks at a branch, never by what it makes of one."""
    traced.set()


# As torch.compiler.assume_constant_result, which imports all of dynamo; no type knows torch's mark on a function.
note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


OFF = Meter({}, {}, None)  # of layers that belong to no guard


class Held:
    """The fused weights of all layers of one model: their bytes, and a version that grows as any is made or dropped."""

    def __init__(self) -> None:
        self.nbytes = self.version = 0

    def add(self, nbytes: int) -> None:
        """As many bytes more, or less where it is negative."""
        self.nbytes += nbytes
        self.version += 1


class FusedLayer:
    """All terms of one layer, fused over the active roles, and the count of its calls.

    Eager evaluations count in ``calls``, compiled ones in a 0-dim int64 tensor: torch.compile sees a plain in-place add
    there and keeps its graph, and eager runs launch no kernel for the count.
    """

    def __init__(self, spec: LayerSpec, terms: Sequence[Term]):
        self.spec, self.terms = spec, tuple(terms)
        self.calls = 0
        self.calls_compiled = counter()
        self._fused: dict[tuple[frozenset[str], torch.dtype, torch.device], Fused | None] = {}
        self._last: tuple = (None, None, None, None)  # roles, dtype, device of the last call, and what it found here
        self.held, self.meter = Held(), OFF

    def fused(self, roles: frozenset[str], dtype: torch.dtype, device: torch.device) -> Fused | None:
        """The active terms in compute dtype on the layer's device, or None where no term is active.

        One dtype and device is held at a time, the activation's; GuardError for a dtype that nothing is computed in.
        """
        key = (roles, dtype, device)
        if key not in self._fused:
            make([self], roles, dtype, device)
        return self._fused[key]

    def check(self, dtype: torch.dtype) -> None:
        """Raise GuardError for a dtype that nothing is computed in."""
        if dtype not in COMPUTE:
            raise GuardError(
                f"Layer {self.spec.path} got activations in {dtype}, which no branch is computed in: turn off the node "
                "or option that quantises activations outside the layers.",
                code="layer.activations",
            )

    def of(self, roles: frozenset[str]) -> list[Term]:
        """The terms of these roles."""
        return [term for term in self.terms if term.role in roles]

    def keep(self, roles: frozenset[str], dtype: torch.dtype, device: torch.device, made: Fused | None) -> None:
        """Hold what was made of the terms of these roles, None where there are none."""
        self._fused[roles, dtype, device] = made
        self.held.add(made.nbytes if made else 0)

    def free(self, roles: frozenset[str] | None = None) -> None:
        """Drop the fused weights of these roles, None: all; they are made again from the terms when next needed."""
        self._last = (None, None, None, None)
        for key in [key for key in self._fused if roles in (None, key[0])]:
            fused = self._fused.pop(key)
            self.held.add(-fused.nbytes if fused else 0)

    def holds(self, roles: frozenset[str], device: torch.device, dtype: torch.dtype | None) -> bool:
        """Whether the active terms are fused on ``device``; None: in whichever dtype the last activation had."""
        return any(k[0] == roles and k[2] == device and dtype in (None, k[1]) for k in self._fused)

    def count(self, roles: frozenset[str]) -> int:
        """How many numbers the terms of these roles fused are."""
        return count(self.spec, self.of(roles))

    def add(self, y: Tensor, x: Tensor, roles: frozenset[str], g: Tensor | None = None) -> Tensor:
        """(y + s) + g·t (fusing.Fused), in the activation's dtype, whatever the weight is stored in.

        A call counts whether or not there is a term of these roles.
        """
        if torch.compiler.is_compiling():  # the last call is not asked: it would be one more thing to compile for
            fused = self.fused(roles, x.dtype, x.device)
            note_traced()
            self.calls_compiled.add_(1)
            return y if fused is None else fused(y, x, g)
        before, dtype, device, fused = self._last
        if before is not roles or dtype is not x.dtype or device != x.device:
            fused = self.fused(roles, x.dtype, x.device)
            self._last = roles, x.dtype, x.device, fused
        self.calls += 1
        if fused is None:
            return y
        return self.meter.layer(self.spec.path, fused, y, x, g) if self.meter.measuring else fused(y, x, g)

    def nbytes(self) -> int:
        """Bytes of the fused weights that are held now, over all dtypes and devices."""
        return sum(fused.nbytes for fused in self._fused.values() if fused)


def make(layers: Iterable[FusedLayer], roles: frozenset[str], dtype: torch.dtype, device: torch.device) -> None:
    """Fuse the active terms of all these layers, in the place of what they held for these roles.

    Raises GuardError for a dtype that nothing is computed in.
    """
    layers = list(layers)
    for layer in layers:
        layer.check(dtype)
        layer.free(roles)
    with_terms = {layer: terms for layer in layers if (terms := layer.of(roles))}
    with plain():
        made = fuse([(layer.spec, terms) for layer, terms in with_terms.items()], dtype, device)
    fused = dict(zip(with_terms, made, strict=True))
    for layer in layers:
        layer.keep(roles, dtype, device, fused.get(layer))


@contextmanager
def plain() -> Iterator[None]:
    """Tensors made here are none of inference mode: in-place counting and autograd then work anywhere."""
    if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():  # entering both takes a while
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def counter() -> Tensor:
    with plain():
        return torch.zeros((), dtype=torch.int64)
