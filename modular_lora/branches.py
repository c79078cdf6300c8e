"""Unmerged LoRA branches on the layers of a model: y = W0·x + Σᵢ strengthᵢ·Bᵢ(Aᵢ·x), fused by concatenating ranks.

A layer has one down and one up product however many LoRAs act on it. The branches are plain objects in
``module.__dict__["forward"]``: never an nn.Module, so no state dict, optimizer or save path ever sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GuardError

Role = Literal["safety", "task"]
ALL_ROLES: frozenset[str] = frozenset(("safety", "task"))
_SEAT = "_modular_lora_attachment"


@dataclass(frozen=True)
class LayerSpec:
    """How a layer takes a branch. ``weight_shape`` is the shape of W0: (out, in) or (out, in, *kernel).

    ``problem`` says why the layer takes no branch (an embedding, a grouped convolution, a quantised weight); the guard
    turns it into an error that names file and layer.
    """

    path: str
    weight_shape: tuple[int, ...]
    conv: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None  # stride, padding, dilation
    problem: str | None = None


def layer_spec(path: str, module: nn.Module) -> LayerSpec:
    """The spec of the module at ``path``; read from nn.Linear's and nn.ConvNd's public attributes only."""
    shape = tuple(module.weight.shape) if getattr(module, "weight", None) is not None else ()
    if isinstance(module, nn.Linear):
        return LayerSpec(path, shape)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return LayerSpec(path, shape, problem="a grouped or specially padded convolution")
        return LayerSpec(path, shape, conv=(module.stride, module.padding, module.dilation))
    return LayerSpec(path, shape, problem=f"a {type(module).__name__}, not a Linear or Conv layer")


@dataclass(frozen=True)
class Term:
    """One LoRA on one layer: ΔW = scale·up·down, with scale = strength·alpha/rank."""

    role: Role
    down: Tensor  # r in·k·k
    up: Tensor  # out r
    scale: float


class FusedLayer:
    """All terms of one layer: ``D`` (R in [k k]) and ``U`` (out R), concatenated over the active roles.

    ``fired`` counts the evaluations in which the branch ran; one 0-dim int64 tensor a layer, so that torch.compile
    sees a plain in-place add and keeps its graph.
    """

    def __init__(self, spec: LayerSpec, terms: list[Term]):
        self.spec, self.terms = spec, terms
        self.fired = _plain(lambda: torch.zeros((), dtype=torch.int64))
        self._fused: dict[tuple[frozenset[str], torch.dtype, torch.device], tuple[Tensor, Tensor] | None] = {}

    def weights(self, roles: frozenset[str], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(D, U) for the active roles in compute dtype on the layer's device, or None where no term is active."""
        key = (roles, dtype, device)
        if key not in self._fused:
            self._fused[key] = self._fuse(roles, dtype, device)
        return self._fused[key]

    def _fuse(self, roles: frozenset[str], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        terms = [t for t in self.terms if t.role in roles]
        return _plain(lambda: self._concatenate(terms, dtype, device)) if terms else None

    def _concatenate(self, terms: list[Term], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        down = torch.cat([t.down.float() for t in terms])  # R in·k·k
        up = torch.cat([t.scale * t.up.float() for t in terms], dim=1)  # out R
        kernel = self.spec.weight_shape[2:]
        if kernel:
            down = down.reshape(-1, *self.spec.weight_shape[1:])  # R in k k
            up = up.reshape(*up.shape, *(1 for _ in kernel))  # out R 1 1
        return down.to(device, dtype).contiguous(), up.to(device, dtype).contiguous()

    def add(self, y: Tensor, x: Tensor, roles: frozenset[str]) -> Tensor:
        """y + U·(D·x); the branch is taken in the activation's dtype, whatever the weight is stored in."""
        fused = self.weights(roles, x.dtype, x.device)
        if fused is None:
            return y
        self.fired.add_(1)
        D, U = fused
        if self.spec.conv is not None:
            stride, padding, dilation = self.spec.conv
            return y.add_(_conv(_conv(x, D, stride, padding, dilation), U))  # b out h w
        h = F.linear(x, D)  # ... R
        if y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), U.t())
            return y
        return y + F.linear(h, U)

    def nbytes(self) -> int:
        """Bytes of the fused weights that are held now, over all dtypes and devices."""
        return sum(t.numel() * t.element_size() for pair in self._fused.values() if pair for t in pair)

    def free(self) -> None:
        """Drop the fused weights; they are made again from the terms when next needed."""
        self._fused.clear()


def _conv(x: Tensor, weight: Tensor, stride=1, padding=0, dilation=1) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, None, stride, padding, dilation)


def _plain(make: Callable):
    """Tensors made by ``make`` outside inference mode: in-place counting and autograd then work anywhere."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


class Branches:
    """The fused layers of one model and the sub-modules (``roots``) whose forward calls are its evaluations."""

    def __init__(self, layers: Mapping[str, FusedLayer], roots: tuple[str, ...]):
        self.layers, self.roots = dict(layers), roots
        self.evaluated = {root: _plain(lambda: torch.zeros((), dtype=torch.int64)) for root in roots}
        self.roles = ALL_ROLES

    @contextmanager
    def only(self, *roles: str) -> Iterator[None]:
        """Per-pass switch for audits: only these roles act (safety, task, none = base). No graph input reaches it."""
        before, self.roles = self.roles, frozenset(roles)
        try:
            yield
        finally:
            self.roles = before

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """(evaluations by root, firings by layer path), read from the counters in one go."""
        ticks = torch.stack([t.cpu() for t in (*self.evaluated.values(), *(f.fired for f in self.layers.values()))])
        values = ticks.tolist()
        fired = dict(zip(self.layers, values[len(self.roots) :], strict=True))
        return dict(zip(self.roots, values, strict=False)), fired

    def root_of(self, path: str) -> str:
        """The root whose evaluations the layer at ``path`` must match."""
        return next(root for root in self.roots if path == root or path.startswith(root + "."))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Counters to ``device`` and fused weights made there in ``dtype`` ahead of the run."""
        for root in self.roots:
            self.evaluated[root] = _plain(lambda root=root: self.evaluated[root].to(device))
        for layer in self.layers.values():
            layer.fired = _plain(lambda layer=layer: layer.fired.to(device))
            layer.weights(self.roles, dtype, device)

    def free(self) -> None:
        for layer in self.layers.values():
            layer.free()


class _Branch:
    """Stands in ``module.forward``: the layer's own forward plus the fused branch."""

    def __init__(self, forward: Callable, layer: FusedLayer, branches: Branches):
        self.forward, self.layer, self.branches, self.live = forward, layer, branches, True

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.forward(x, *args, **kwargs)
        return self.layer.add(y, x, self.branches.roles) if self.live else y


class _Evaluations:
    """Stands in the root's ``forward``: counts the evaluations of the model."""

    def __init__(self, forward: Callable, root: str, branches: Branches):
        self.forward, self.root, self.branches, self.live = forward, root, branches, True

    def __call__(self, *args, **kwargs):
        if self.live:
            self.branches.evaluated[self.root].add_(1)
        return self.forward(*args, **kwargs)


class Attachment:
    """Branches on the modules of one model, on behalf of one owner; a model has at most one attachment at a time.

    ``attach`` takes the seat from whichever attachment holds it; ``detach`` gives it up in LIFO order and restores
    every module's ``__dict__`` as it was. A stand-in that somebody kept a reference to is inert after ``detach``.
    """

    def __init__(self, model: nn.Module, branches: Branches):
        self.model, self.branches = model, branches
        self._placed: list[tuple[nn.Module, object, object]] = []  # module, stand-in, former __dict__ entry

    @property
    def attached(self) -> bool:
        return self.model.__dict__.get(_SEAT) is self

    def attach(self) -> None:
        if self.attached:
            return
        if (other := self.model.__dict__.get(_SEAT)) is not None:
            other.detach()
        try:
            for path, layer in self.branches.layers.items():
                module = self.model.get_submodule(path)
                _refuse_foreign_forward(path, module)
                self._place(module, _Branch(module.forward, layer, self.branches))
            for root in self.branches.roots:
                module = self.model.get_submodule(root)
                self._place(module, _Evaluations(module.forward, root, self.branches))
        except BaseException:
            self.detach()
            raise
        self.model.__dict__[_SEAT] = self

    def _place(self, module: nn.Module, stand_in: object) -> None:
        self._placed.append((module, stand_in, module.__dict__.get("forward")))
        module.__dict__["forward"] = stand_in

    def detach(self) -> None:
        for module, stand_in, former in reversed(self._placed):
            stand_in.live = False
            if module.__dict__.get("forward") is not stand_in:  # wrapped from outside since: ours stays inert inside it
                continue
            if former is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = former
        self._placed.clear()
        if self.attached:
            del self.model.__dict__[_SEAT]

    def verify(self) -> None:
        """Raise GuardError unless every stand-in is where ``attach`` put it."""
        lost = sum(module.__dict__.get("forward") is not stand_in for module, stand_in, _ in self._placed)
        if not self.attached or lost:
            raise GuardError(
                f"{lost or 'all'} of {len(self._placed)} guarded layers lost their branches before or during the run: "
                "another node replaced their forward; remove it, or put it before Guard Model."
            )


def _refuse_foreign_forward(path: str, module: nn.Module) -> None:
    """A loader that restored the class's bound forward left nothing behind; anything else is another pack's hook."""
    former = module.__dict__.get("forward")
    if former is not None and getattr(former, "__func__", None) is not type(module).forward:
        raise GuardError(
            f"Layer {path} already has a replaced forward ({type(former).__name__}): the guard would stack on another "
            "pack's hook; remove that node, or load its LoRA with Load Task LoRA."
        )
