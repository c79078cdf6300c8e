"""Unmerged branches on the layers of a model: y = W0·x + b + Σᵢ strengthᵢ·ΔWᵢ·x, summed as fusing.py fuses them.

A layer has one down product and two up products, the safety LoRAs' and the task LoRAs', however many there are. The
branches are plain objects in ``module.__dict__["forward"]``: never an nn.Module, so no state dict, optimizer or save
path ever sees them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import GuardError
from .acted import Meter
from .fused import OFF, FusedLayer, Held, counter, make, note_traced, plain, traced
from .module_tree import modules_at, tree_identity

ALL_ROLES: frozenset[str] = frozenset(("safety", "task"))
SAFETY_ALONE: frozenset[str] = frozenset(("safety",))
_ATTACHMENT = "_modular_lora_attachment"


@dataclass(frozen=True)
class Times:
    """How often a part of a model runs in one evaluation of it: ``least`` to ``most`` times (None: any number)."""

    least: int
    most: int | None

    def allow(self, runs: int, evaluations: int) -> bool:
        """Whether a part may have run ``runs`` times in so many evaluations."""
        if self.most is None and evaluations:
            return runs >= self.least * evaluations
        return self.least * evaluations <= runs <= (self.most or 0) * evaluations


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


class Branches:
    """The fused layers of one model and the sub-modules (``roots``) whose forward calls are its evaluations.

    ``parts``: the sub-modules that do not run exactly once an evaluation; a layer inside runs as often as its part.
    ``gives_way``: whether the task LoRAs act at a share of their own in each evaluation (``task_share``).
    """

    def __init__(
        self,
        layers: Mapping[str, FusedLayer],
        roots: tuple[str, ...],
        parts: Mapping[str, Times] | None = None,
        meter: Meter = OFF,
        gives_way: bool = False,
    ):
        self.layers, self.roots, self.meter, self.gives_way = dict(layers), roots, meter, gives_way
        self.parts = {part: times for part, times in (parts or {}).items() if any(_inside(p, part) for p in layers)}
        self.counted = (*roots, *self.parts)
        self.wide = tuple(path for path, layer in self.layers.items() if layer.spec.narrow is not None)
        self.evaluated = dict.fromkeys(self.counted, 0)
        self.evaluated_compiled = {module: counter() for module in self.counted}
        self.roles = self.acting = ALL_ROLES
        self.g: Tensor | None = None
        self.image_shares: tuple[float, ...] | None = None  # g of every image of a run; None: not known
        self._share = 1.0
        self._count: int | None = None
        self._dtype: torch.dtype | None = None
        self._runs_with: dict[str, str] = {}
        self._held, self._ready = Held(), tuple[object, ...]()
        for layer in self.layers.values():
            self._held.add(layer.nbytes())
            layer.held, layer.meter = self._held, meter

    @contextmanager
    def only(self, *roles: str) -> Iterator[None]:
        """Per-pass switch for audits: only these roles act (safety, task, none = base). No graph input reaches it."""
        before, self.roles = self.roles, frozenset(roles)
        self._settle()
        try:
            yield
        finally:
            self.roles = before
            self._settle()

    @property
    def task_share(self) -> float:
        """g, at which the task LoRAs act from now on: 1 is the sum, at 0 their path is left out.

        ``acting`` has the roles that compute something meanwhile, ``g`` what t is multiplied by (None: 1).
        """
        return self._share

    @task_share.setter
    def task_share(self, share: float) -> None:
        if share == self._share:
            return
        self._share = share
        self._settle()

    def _settle(self) -> None:
        self.acting = self.roles
        if not self._share:
            self.acting = SAFETY_ALONE if self.roles == ALL_ROLES else self.roles & SAFETY_ALONE
        with plain():
            self.g = None if self._share in (0, 1) else torch.tensor(self._share)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """(evaluations by root or part, branch calls by layer path), read from the counters in one go."""
        values = [*self.evaluated.values(), *(f.calls for f in self.layers.values())]
        if traced.is_set():  # else nothing compiled has counted
            compiled = (*self.evaluated_compiled.values(), *(f.calls_compiled for f in self.layers.values()))
            ticks = torch.stack([t.to(compiled[0].device) for t in compiled]).tolist()
            values = [a + b for a, b in zip(values, ticks, strict=True)]
        calls = dict(zip(self.layers, values[len(self.counted) :], strict=True))
        return dict(zip(self.counted, values, strict=False)), calls

    def root_of(self, path: str) -> str:
        """The root that the layer or part at ``path`` belongs to: the innermost one that holds it."""
        return max((root for root in self.roots if _inside(path, root)), key=len)

    def runs_with(self, path: str) -> str:
        """The root or part whose runs the layer at ``path`` must match: the innermost one that holds it."""
        if path not in self._runs_with:
            self._runs_with[path] = max((module for module in self.counted if _inside(path, module)), key=len)
        return self._runs_with[path]

    @property
    def varying(self) -> tuple[str, ...]:
        """The layers inside ``parts``."""
        return tuple(path for path in self.layers if self.runs_with(path) in self.parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Counters to ``device`` and fused weights made there ahead of the run.

        In ``dtype``, but for layers whose activations turned out to have another in a run before.
        """
        ready = (self.roles, device, dtype)
        if self._ready == (*ready, self._held.version):
            return
        self._move(device)
        wanted = None if dtype == self._dtype else dtype
        for roles in self._needed:
            missing = [layer for layer in self.layers.values() if not layer.holds(roles, device, wanted)]
            make(missing, roles, dtype, device)
        self._dtype = dtype
        self._ready = (*ready, self._held.version)

    @property
    def _needed(self) -> tuple[frozenset[str], ...]:
        """The roles whose terms are held together; a sum from which the tasks can be left out has copies of s."""
        return (ALL_ROLES, SAFETY_ALONE) if self.gives_way and self.roles == ALL_ROLES else (self.roles,)

    def _move(self, device: torch.device) -> None:
        """The compiled counters to ``device``."""
        if all(counter.device == device for counter in self.evaluated_compiled.values()):
            return
        with plain():
            self.evaluated_compiled = {root: counter.to(device) for root, counter in self.evaluated_compiled.items()}
            for layer in self.layers.values():
                layer.calls_compiled = layer.calls_compiled.to(device)

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of all fused weights in ``dtype``, made or not."""
        if self._count is None:
            kinds = (ALL_ROLES, SAFETY_ALONE) if self.gives_way else (ALL_ROLES,)
            self._count = sum(layer.count(roles) for layer in self.layers.values() for roles in kinds)
        return self._count * dtype.itemsize

    def nbytes(self) -> int:
        """Bytes of the fused weights that are held now."""
        return self._held.nbytes

    def free(self) -> None:
        """Drop all fused weights, as FusedLayer.free."""
        for layer in self.layers.values():
            layer.free()


class _Branch:
    """A wrapper of ``module.forward``: the layer's own forward plus the fused branch.

    It is made once for a module and serves one attachment after another: ``bind`` gives it what it calls, ``release``
    takes that away. In between, and where somebody kept it, it calls the forward alone (``live`` is False).
    """

    forward: Callable
    layer: FusedLayer
    branches: Branches
    live = False

    def bind(self, forward: Callable, path: str, branches: Branches) -> None:
        self.forward, self.layer, self.branches, self.live = forward, branches.layers[path], branches, True

    def release(self) -> None:
        self.live = False
        del self.layer, self.branches

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.forward(x, *args, **kwargs)
        return self.layer.add(y, x, self.branches.acting, self.branches.g) if self.live else y


class _WideBranch(_Branch):
    """The same where a LoRA gave the layer more inputs than W0 has."""

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.forward(x[..., : self.layer.spec.narrow] if self.live else x, *args, **kwargs)
        return self.layer.add(y, x, self.branches.acting, self.branches.g) if self.live else y


class _Evaluations:
    """A wrapper of the forward of a root or a part, which counts how often it runs; bound and released as _Branch."""

    forward: Callable
    root: str
    branches: Branches
    live = False

    def bind(self, forward: Callable, path: str, branches: Branches) -> None:
        self.forward, self.root, self.branches, self.live = forward, path, branches, True

    def release(self) -> None:
        self.live = False
        del self.branches

    def __call__(self, *args, **kwargs):
        if self.live and torch.compiler.is_compiling():
            note_traced()
            self.branches.evaluated_compiled[self.root].add_(1)
        elif self.live:
            self.branches.evaluated[self.root] += 1
            if self.branches.meter.running and self.root in self.branches.roots:
                with self.branches.meter.evaluation(self.root, args, kwargs):
                    return self.forward(*args, **kwargs)
        return self.forward(*args, **kwargs)


_Wrapper: TypeAlias = _Branch | _Evaluations
Placement: TypeAlias = tuple[str, nn.Module, _Wrapper]  # path, module there, what wraps its forward


class _Wrappers:
    """The wrappers of one model, and where the guard that it had last put them."""

    def __init__(self):
        self.wanted: list = []  # paths of layers, those with more inputs, paths of what is counted, the tree's identity
        self.placements: list[Placement] = []
        self._made: dict[tuple[type[_Wrapper], str], _Wrapper] = {}

    def get(self, kind: type[_Wrapper], path: str) -> _Wrapper:
        if not path:  # the model's own would keep it alive
            return kind()
        if (kind, path) not in self._made:
            self._made[kind, path] = kind()
        return self._made[kind, path]


_wrappers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> _Wrappers


class Attachment:
    """Branches on the modules of one model, on behalf of one owner; a model has at most one attachment at a time.

    ``attach`` detaches the one that the model has; ``detach`` takes the branches off, last first, and restores
    every module's ``__dict__`` as it was. A wrapper that somebody kept a reference to is inert after ``detach``. All
    attachments of a model use the same wrappers, which torch.compile knows by identity: nothing is compiled again for
    another run, nor for other LoRAs of the same ranks.
    """

    def __init__(self, model: nn.Module, branches: Branches):
        self.model, self.branches = model, branches
        self._placed: list[tuple[nn.Module, _Wrapper, object]] = []  # module, wrapper, former __dict__ entry

    @property
    def attached(self) -> bool:
        return self.model.__dict__.get(_ATTACHMENT) is self

    def attach(self) -> None:
        if self.attached:
            return
        if (other := self.model.__dict__.get(_ATTACHMENT)) is not None:
            other.detach()
        try:
            for path, module, wrapper in self._placements():
                former = module.__dict__.get("forward")
                if former is not None and isinstance(wrapper, _Branch):
                    _refuse_foreign_forward(path, module, former)
                wrapper.bind(module.forward, path, self.branches)
                self._placed.append((module, wrapper, former))
                module.__dict__["forward"] = wrapper
        except BaseException:
            self.detach()
            raise
        self.model.__dict__[_ATTACHMENT] = self

    def _placements(self) -> list[Placement]:
        """One for every layer and then for all that is counted; remembered for the next guard of the same layers."""
        branches = self.branches
        wanted = [*branches.layers, branches.wide, *branches.counted, tree_identity(self.model)]
        known = _wrappers.setdefault(self.model, _Wrappers())
        if known.wanted != wanted:
            modules = modules_at(self.model, (*branches.layers, *branches.counted))
            kinds: list[tuple[type[_Wrapper], str]]
            kinds = [(_WideBranch if path in branches.wide else _Branch, path) for path in branches.layers]
            kinds += [(_Evaluations, path) for path in branches.counted]
            placements = [(path, modules[path], known.get(kind, path)) for kind, path in kinds]
            if "" in branches.counted:
                return placements
            known.wanted, known.placements = wanted, placements
        return known.placements

    def _lost(self) -> int:
        """How many wrappers are not where ``attach`` put them."""
        outer = {module: wrapper for module, wrapper, _ in self._placed}  # a layer that is a part has two
        return sum(module.__dict__.get("forward") is not wrapper for module, wrapper in outer.items())

    def detach(self) -> None:
        for module, wrapper, former in reversed(self._placed):
            wrapper.release()
            if module.__dict__.get("forward") is not wrapper:  # wrapped from outside since: ours stays inert inside it
                _wrappers.pop(self.model, None)
                continue
            if former is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = former
        self._placed.clear()
        if self.attached:
            del self.model.__dict__[_ATTACHMENT]

    def verify(self) -> None:
        """Raise GuardError unless every wrapper is where ``attach`` put it."""
        if (lost := self._lost()) or not self.attached:
            raise GuardError(
                f"{lost or 'all'} of {len(self._placed)} guarded layers lost their branches before or during the run: "
                "another node replaced their forward; remove it, or put it before Guard Model.",
                code="run.branches-lost",
            )


def attached(model: nn.Module) -> Branches | None:
    """The branches that sit on a model now."""
    attachment = model.__dict__.get(_ATTACHMENT)
    return attachment.branches if attachment is not None else None


def _refuse_foreign_forward(path: str, module: nn.Module, former: object) -> None:
    """A loader that restored the class's bound forward left nothing behind; anything else is another pack's hook."""
    if getattr(former, "__func__", None) is not type(module).forward:
        raise GuardError(
            f"Layer {path} already has a replaced forward ({type(former).__name__}): the guard would stack on another "
            "pack's hook; remove that node, or load its LoRA with Load Task LoRA.",
            code="layer.replaced-forward",
        )
