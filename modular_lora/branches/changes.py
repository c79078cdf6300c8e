"""The change of one weight against W0 in the forms that adapters have, and the sum of many as few products.

y = W0·x + b + Σᵢ strengthᵢ·(fᵢ(W0) − W0)·x. A part that is a function of W0 alone (a gain, a rotation) acts on
W0·x = y − b, never on another adapter's share, so no task adapter can rescale or rotate the safety LoRA's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_spec import Conv, LayerSpec

Role = Literal["safety", "task"]
_ONCE = Conv((1,), (0,), (1,))  # a kernel of 1
TOGETHER = 2**20  # numbers of a factor that are made at once


Weight: TypeAlias = Callable[[], Tensor]  # gives the weight (out in [k k]) that a change is a function of


class Part(ABC):
    """One change of one weight."""

    @abstractmethod
    def dense(self, W0: Weight) -> Tensor:
        """ΔW (out in·k·k, fp32)."""

    @abstractmethod
    def times(self, W0: Weight, x: Tensor) -> Tensor:
        """ΔW·x (x in·k·k n -> out n, fp32) without making ΔW."""

    def energy(self, W0: Weight) -> float:
        """‖ΔW‖²."""
        return energy(self.dense(W0))

    @property
    def thin(self) -> tuple[Tensor, Tensor] | None:
        """As up (out r) and down (r in); vectors are columns. None where it is no thin product."""
        return None

    def compared(self, inputs: int, kept: bool) -> Part:
        """As two LoRAs are compared: on the inputs that W0 has; ``kept``: in fp32, for many others."""
        return self

    def as_weight(self, conv: Conv, W0: Weight) -> Part:
        """As it acts through a convolution that takes changes in the shape of its weight alone."""
        return self


class Additive(Part):
    """A change that is no function of W0."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """ΔW (out in·k·k, fp32)."""

    @abstractmethod
    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> LowRank | Dense:
        """With its rows (out n) and its columns (n in·k·k) put elsewhere."""

    def dense(self, W0: Weight) -> Tensor:
        return self.matrix()


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """ΔW = up·down: LoRA, LoCon, Tucker LoCon, LoHa of small rank."""

    down: Tensor  # r in·k·k
    up: Tensor  # out r

    def matrix(self) -> Tensor:
        return self.up.float() @ self.down.float()

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.up.float() @ (self.down.float() @ x)

    @property
    def thin(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def compared(self, inputs: int, kept: bool) -> LowRank:
        down = self.down[:, :inputs]  # the same where it has no more
        return LowRank(down.float(), self.up.float()) if kept else LowRank(down, self.up)

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> LowRank:
        return LowRank(columns(self.down), rows(self.up))


@dataclass(frozen=True, eq=False)
class Dense(Additive):
    """ΔW itself: a full difference, or factors that would be larger than it; for a norm the change of its weight."""

    weight: Tensor  # out in·k·k; out 1 for a norm

    def matrix(self) -> Tensor:
        return self.weight.float()

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.weight.float() @ x

    @property
    def thin(self) -> tuple[Tensor, Tensor] | None:
        return (self.weight, torch.ones(1, 1)) if self.weight.shape[1] == 1 else None

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(columns(rows(self.weight)))


@dataclass(frozen=True, eq=False)
class Kron(Additive):
    """ΔW = w1 ⊗ w2 (LoKr), w2 with the layer's kernel: out = o₁·o₂, in = i₁·i₂."""

    w1: Tensor  # o1 i1
    w2: Tensor  # o2 i2 [k k]

    def matrix(self) -> Tensor:
        w1 = self.w1.float().reshape(*self.w1.shape, *(1 for _ in self.w2.shape[2:]))
        return torch.kron(w1, self.w2.float()).flatten(1)

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        w1, w2 = self.w1.float(), self.w2.float().flatten(1)  # o1 i1, o2 i2·k·k
        h = w2 @ x.T.reshape(-1, w1.shape[1], w2.shape[1]).transpose(1, 2)  # n o2 i1
        return (h @ w1.T).transpose(1, 2).flatten(1).T  # n o1 o2

    def energy(self, W0: Weight) -> float:
        return energy(self.w1.float()) * energy(self.w2.float().flatten(1))

    def moved(self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(self.matrix()).moved(rows, columns)

    def as_weight(self, conv: Conv, W0: Weight) -> Dense:
        """A matrix: it acts on the layer's inputs in groups."""
        return Dense(self.matrix())


class OnRows(Part):
    """A change that makes rows over the outputs of W0's rows; ``bias`` is the layer's own, which it leaves alone."""

    bias: Tensor | None  # out

    @abstractmethod
    def on_rows(self, rows: Tensor) -> Tensor:
        """What it makes of rows over the outputs (out n): of W0 itself, of W0·x, of the bias."""

    def dense(self, W0: Weight) -> Tensor:
        return self.on_rows(W0().float().flatten(1))

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.on_rows(W0().float().flatten(1) @ x)

    def as_weight(self, conv: Conv, W0: Weight) -> Part:
        """A matrix in a transposed convolution: W0's rows are its inputs there."""
        return Dense(self.dense(W0)) if conv.transposed else self


@dataclass(frozen=True, eq=False)
class Gain(OnRows):
    """ΔW = diag(gain)·W0 (the W0 half of DoRA)."""

    gain: Tensor  # out
    bias: Tensor | None  # out

    def on_rows(self, rows: Tensor) -> Tensor:
        return self.gain.float()[:, None] * rows

    def energy(self, W0: Weight) -> float:
        return energy(self.on_rows(W0().float().flatten(1).norm(dim=1, keepdim=True)))


@dataclass(frozen=True, eq=False)
class Rotation(OnRows):
    """ΔW = diag(blocks)·W0 with blocks R − I (OFT)."""

    blocks: Tensor  # k n n, k·n = out: new row m of a block is Σ_n blocks[m, n]·row n
    bias: Tensor | None  # out

    def on_rows(self, rows: Tensor) -> Tensor:
        k, n, _ = self.blocks.shape
        return (self.blocks.float() @ rows.reshape(k, n, -1)).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Bias(Part):
    """A change of the layer's bias, which is compared as a column."""

    bias: Tensor  # out

    def dense(self, W0: Weight) -> Tensor:
        return self.bias.float()[:, None]

    def times(self, W0: Weight, x: Tensor) -> Tensor:
        return self.dense(W0) @ x

    @property
    def thin(self) -> tuple[Tensor, Tensor]:
        return self.bias[:, None], torch.ones(1, 1)


Parts: TypeAlias = "tuple[tuple[Part, float], ...]"  # parts and what each is multiplied by


def energy(matrix: Tensor) -> float:
    """‖matrix‖², rows in their own precision, their sum in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


@dataclass(frozen=True, eq=False)
class Term:
    """One part of one adapter on one layer; ``scale`` is its strength, alpha/rank folded in.

    ``owner`` tells several safety LoRAs apart (their SHA-256); task LoRAs are one sum and have none.
    """

    role: Role
    part: Part
    scale: float
    owner: str = ""


Owner: TypeAlias = "tuple[Role, str]"  # one safety LoRA, or ("task", "") for all task LoRAs together
TASKS: Owner = ("task", "")


class _Others:
    """What one owner adds to a layer's output beside low-rank pairs, summed in a tensor of its own."""

    def __init__(self, spec: LayerSpec, terms: Sequence[Term], dense: Tensor | None, place: Callable[[Tensor], Tensor]):
        found = _by_kind(terms)
        self.spec, self.dense = spec, dense  # out in [k k]
        self.krons = tuple((place(s * p.w1.float()), place(p.w2.float())) for p, s in found[Kron])
        self.rotations = tuple(place(s * p.blocks.float()) for p, s in found[Rotation])
        gains, bias = found[Gain], _bias(found)
        self.gain = place(_column(spec, sum(s * p.gain.float() for p, s in gains))) if gains else None  # out
        self.bias = None if bias is None else place(_column(spec, bias))  # out
        self.inputs = slice(spec.narrow)  # of x, as W0 has them

    def __call__(self, y0: Tensor, x: Tensor) -> Tensor:
        """Σ scale·ΔW·x of these parts; ``y0`` = W0·x + b, which gains and rotations act on."""
        spec, norm, conv = self.spec, self.spec.norm, self.spec.conv
        shares = [_rotate(spec, blocks, y0) for blocks in self.rotations]
        if self.gain is not None:
            shares.append(self.gain * y0)
        if self.dense is not None and norm is not None:
            shares.append(norm.normalised(x) * norm.beside(self.dense, y0))
        elif self.dense is not None:
            shares.append(F.linear(x, self.dense) if conv is None else conv(x, self.dense))
        shares += [_kron(spec, w1, w2, x[..., self.inputs] if conv is None else x) for w1, w2 in self.krons]
        if self.bias is not None:
            shares.append(self.bias if norm is None else norm.beside(self.bias, y0))
        total, *rest = shares
        for share in rest:
            total = total + share
        return total

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        own = (t for t in (self.dense, self.gain, self.bias) if t is not None)
        return (*own, *self.rotations, *(w for pair in self.krons for w in pair))

    def to(self, dtype: torch.dtype) -> _Others:
        """The same in another dtype."""
        other = copy.copy(self)
        other.krons = tuple((w1.to(dtype), w2.to(dtype)) for w1, w2 in self.krons)
        other.rotations = tuple(blocks.to(dtype) for blocks in self.rotations)
        for name in ("dense", "gain", "bias"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.to(dtype))
        return other


class Fused:
    """A layer's terms in compute dtype on its device: y = (y0 + s) + g·t, y0 = W0·x + b computed once.

    g is the task LoRAs' share of an evaluation, None: 1 (attachment.Branches.task_share).

    s is the sum of every safety LoRA's share and t that of every task LoRA's, each in tensors of its own. No task
    term is accumulated into a tensor that holds s: floating-point sums lose what is small beside a term that is large,
    also where a later term cancels the large one, so a task LoRA could otherwise make the safety LoRA's share vanish
    by rounding. All low-rank pairs have one down product, whose rows do not mix, and one up product a side.
    """

    def __init__(
        self,
        spec: LayerSpec,
        terms: Sequence[Term],
        dtype: torch.dtype,
        device: torch.device,
        pair: tuple[Tensor, Tensor] | None = None,
    ):
        """``pair``: down and up of all pairs, safety LoRAs first, where they are made already."""
        place = lambda t: t.to(device, dtype).contiguous()  # noqa: E731
        self.spec = spec
        self.ranks: dict[Owner, slice] = {}  # of R, whose pairs they are
        self.others: dict[Owner, _Others] = {}
        pairs: list[tuple[LowRank, float]] = []
        for owner, own in by_owner(terms).items():
            found = _by_kind(own)
            whole, low, before = found[Dense], found[LowRank], _rank(pairs)
            dense = None
            if _is_dense(spec, whole, low):
                dense = place(_sum(spec, whole, low).reshape(spec.weight_shape))
            elif low:
                pairs += low
                self.ranks[owner] = slice(before, _rank(pairs))
            if dense is not None or found.keys() - {Dense, LowRank}:
                self.others[owner] = _Others(spec, own, dense, place)
        if pair is None and pairs:
            down, up = _stacked(spec, [pairs])
            pair = place(down[0]), place(up[0])
        self.down: Any = None if pair is None else pair[0]  # R in [k k]; both None where there is no pair
        self.up: Any = None if pair is None else pair[1]  # out R [1 1]
        self._divide()

    def _divide(self) -> None:
        """Where the safety LoRAs' ranks end and the task LoRAs' begin, and both halves of the up matrix."""
        self.pointwise = _is_pointwise(self.spec)
        self.split = max((ranks.stop for owner, ranks in self.ranks.items() if owner != TASKS), default=0)
        self.has_tasks = TASKS in self.ranks
        self.nbytes = sum(t.nbytes for t in self.tensors)

    def __call__(self, y: Tensor, x: Tensor, g: Tensor | None = None) -> Tensor:
        """(y + s) + g·t for y = W0·x + b; y may be changed in place."""
        return self.apply(y, x, self.reduced(x, g), g)

    def reduced(self, x: Tensor, g: Tensor | None = None) -> Tensor | None:
        """h = down·x of all pairs: (..., R), of a convolution (b, R, ...); None where there is no pair.

        The task LoRAs' rows are multiplied by g.
        """
        if self.down is None:
            return None
        h = self._down(x)
        if g is not None and self.has_tasks:
            ranks = -1 if self.spec.conv is None else h.dim() - self.down.dim() + 1  # 0 without a batch
            h.narrow(ranks, self.split, h.shape[ranks] - self.split).mul_(g)
        return h

    def _down(self, x: Tensor) -> Tensor:
        if self.spec.conv is None:
            return F.linear(x, self.down)
        if self.pointwise and x.is_contiguous() and x.dim() == self.down.dim():
            return (self.down.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[2:])
        return self.spec.conv(x, self.down)

    def apply(self, y: Tensor, x: Tensor, h: Tensor | None, g: Tensor | None = None) -> Tensor:
        """``__call__`` with h at hand, as `reduced` gives it for the same g."""
        s = t = None
        if self.others:  # before y changes: gains and rotations read W0·x + b
            s, t = self._sum_of_others(y, x, "safety"), self._sum_of_others(y, x, "task")
            t = t if t is None or g is None else t * g
        if self.has_tasks and h is not None:
            pair = self._expanded(h, slice(self.split, None), y)
            t = pair if t is None else pair + t
        if s is not None:
            y = y + s
        if self.split and h is not None:
            y = self._add_expanded(y, h, slice(self.split))
        if t is None:
            return y
        return y.add_(t) if t.dtype == y.dtype and t.shape == y.shape else y + t

    def _sum_of_others(self, y0: Tensor, x: Tensor, role: Role) -> Tensor | None:
        total = None
        for owner, others in self.others.items():
            if owner[0] == role:
                share = others(y0, x)
                total = share if total is None else total + share
        return total

    def _expanded(self, h: Tensor, ranks: slice, y: Tensor) -> Tensor:
        """up·h of these ranks in a new tensor of y's shape."""
        up = self.up[:, ranks]
        if self.spec.conv is None:
            return F.linear(h[..., ranks], up)
        if h.dim() != self.up.dim():  # without a batch
            return _ONCE(h[ranks], up)
        return (up.flatten(1) @ h[:, ranks].flatten(2)).view(y.shape)

    def _add_expanded(self, y: Tensor, h: Tensor, ranks: slice) -> Tensor:
        """y + up·h of these ranks, in place where the layout allows it."""
        up = self.up[:, ranks]
        if not y.is_contiguous() or (self.spec.conv is not None and h.dim() != self.up.dim()):
            return y + self._expanded(h, ranks, y)
        if self.spec.conv is None:
            rows = h[..., ranks].reshape(-1, up.shape[1])
            y.view(-1, y.shape[-1]).addmm_(rows, up.t())
        else:
            y.flatten(2).baddbmm_(up.flatten(1).expand(len(y), -1, -1), h[:, ranks].flatten(2))
        return y

    def share(self, owner: Owner, y0: Tensor, x: Tensor, h: Tensor | None, g: Tensor | None = None) -> Tensor:
        """What one owner adds to y0, in a tensor of y0's shape; h as of `apply`."""
        other = self.others[owner](y0, x) if owner in self.others else None
        if other is not None and g is not None and owner == TASKS:
            other = other * g
        if owner not in self.ranks or h is None:
            assert other is not None
            return other.expand_as(y0)
        total = self._expanded(h, self.ranks[owner], y0)
        return (total if other is None else total + other).expand_as(y0)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """All that act on the layer, safety LoRAs first."""
        return tuple(sorted(self.ranks.keys() | self.others.keys()))

    @property
    def low_rank(self) -> bool:
        """Whether all that acts is pairs."""
        return not self.others

    def only(self, role: Role, dtype: torch.dtype | None = None) -> Fused:
        """The part of one role, in another dtype if one is given; for measurements."""
        part = copy.copy(self)
        part.ranks = {owner: ranks for owner, ranks in self.ranks.items() if owner[0] == role}
        part.others = {owner: o.to(dtype) if dtype else o for owner, o in self.others.items() if owner[0] == role}
        kept = slice(self.split) if role == "safety" else slice(self.split, None)
        if not part.ranks:
            part.down = part.up = None
        else:
            part.down, part.up = self.down[kept], self.up[:, kept]
            if dtype:
                part.down, part.up = part.down.to(dtype), part.up.to(dtype)
            start = 0 if role == "safety" else self.split
            part.ranks = {o: slice(r.start - start, r.stop - start) for o, r in part.ranks.items()}
        part._divide()
        return part

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it holds."""
        own = (t for t in (self.down, self.up) if t is not None)
        return (*own, *(t for others in self.others.values() for t in others.tensors))


def by_owner(terms: Sequence[Term]) -> dict[Owner, list[Term]]:
    """Terms by whose they are: every safety LoRA by itself, then all task LoRAs as one."""
    found: dict[Owner, list[Term]] = defaultdict(list)
    for term in terms:
        found[(term.role, term.owner) if term.role == "safety" else TASKS].append(term)
    if TASKS in found:
        found[TASKS] = found.pop(TASKS)
    return found


Layers: TypeAlias = "Sequence[tuple[LayerSpec, Sequence[Term]]]"


def fuse(layers: Layers, dtype: torch.dtype, device: torch.device) -> list[Fused]:
    """``Fused`` of many layers; pairs of the same shapes are made together."""
    layers = [(spec, [term for own in by_owner(terms).values() for term in own]) for spec, terms in layers]
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for places in _alike(layers):
        alike = [_pairs(layers[place][1]) for place in places]
        made = (factors.to(device, dtype).unbind() for factors in _stacked(layers[places[0]][0], alike))
        pairs |= zip(places, zip(*made, strict=True), strict=True)
    return [Fused(spec, terms, dtype, device, pairs.get(place)) for place, (spec, terms) in enumerate(layers)]


def _alike(layers: Layers) -> Iterator[list[int]]:
    """The numbers of layers that have pairs and nothing else, of the same shapes and dtypes, none of them dense."""
    found = defaultdict(list)
    for place, (spec, terms) in enumerate(layers):
        pairs = _pairs(terms)
        if spec.narrow is None and len(pairs) == len(terms):
            factors = [(p.down.shape[0], p.down.dtype, p.up.dtype) for p, _ in pairs]
            kinds = tuple((t.role, t.owner, *own) for t, own in zip(terms, factors, strict=True))
            found[spec.weight_shape, spec.conv, kinds].append(place)
    for (shape, _, kinds), places in found.items():
        spec, terms = layers[places[0]]
        size = max(1, TOGETHER // (sum(rank for _, _, rank, *_ in kinds) * max(shape[0], spec.inputs)))
        if not any(_is_dense(spec, [], _pairs(own)) for own in by_owner(terms).values()):
            yield from (places[start : start + size] for start in range(0, len(places), size))


def _pairs(terms: Sequence[Term]) -> list[tuple[LowRank, float]]:
    return [(t.part, t.scale) for t in terms if isinstance(t.part, LowRank)]


def _stacked(spec: LayerSpec, layers: Sequence[Sequence[tuple[LowRank, float]]]) -> tuple[Tensor, Tensor]:
    """The pairs of L layers alike, each layer's as one: down (L R in [k k]), up with scales (L out R [1 1]); fp32."""
    downs = [p.down if spec.narrow is None else _wide(spec, p.down) for pairs in layers for p, _ in pairs]
    ups = [torch.stack([p.up for p, _ in ranked]) for ranked in zip(*layers, strict=True)]  # L out r each
    down, up = _joined(downs, 0), _joined(ups, 2)  # L·R in·k·k, L out R
    scales = [[s for p, s in pairs for _ in range(p.up.shape[1])] for pairs in layers]
    up.mul_(torch.tensor(scales, dtype=up.dtype, device=up.device)[:, None])
    down = down.reshape(len(layers), -1, *spec.weight_shape[1:])
    return down, up.reshape(*up.shape, *(1 for _ in spec.weight_shape[2:]))


def count(spec: LayerSpec, terms: Sequence[Term]) -> int:
    """How many numbers ``Fused`` holds for these terms."""
    return sum(_count(spec, own) for own in by_owner(terms).values())


def _count(spec: LayerSpec, terms: Sequence[Term]) -> int:
    """The same of one owner."""
    found = _by_kind(terms)
    whole, pairs = found[Dense], found[LowRank]
    rows, inputs = spec.weight_shape[0], spec.inputs
    total = rows * inputs if _is_dense(spec, whole, pairs) else _rank(pairs) * (rows + inputs)
    if len(pairs) == len(terms):
        return total
    total += sum(p.w1.numel() + p.w2.numel() for p, _ in found[Kron]) + sum(
        p.blocks.numel() for p, _ in found[Rotation]
    )
    has_bias = any(getattr(t.part, "bias", None) is not None for t in terms)
    return total + spec.outputs * (bool(found[Gain]) + has_bias)


def _is_dense(spec: LayerSpec, whole: list, pairs: list) -> bool:
    rows, inputs = spec.weight_shape[0], spec.inputs
    by_nature = spec.conv is not None and spec.conv.dense and bool(pairs)
    return bool(whole) or by_nature or _rank(pairs) * (rows + inputs) > rows * inputs


def _is_pointwise(spec: LayerSpec) -> bool:
    conv = spec.conv
    return conv is not None and set(spec.weight_shape[2:]) | set(conv.stride) == {1} and not any(conv.padding)


def _rank(pairs: list[tuple[LowRank, float]]) -> int:
    return sum(p.down.shape[0] for p, _ in pairs)


def _by_kind(terms: Sequence[Term]) -> Mapping[type, list]:
    """Parts and scales by the kind of part."""
    found = defaultdict(list)
    for t in terms:
        found[type(t.part)].append((t.part, t.scale))
    return found


def _sum(spec: LayerSpec, whole: list[tuple[Dense, float]], pairs: list[tuple[LowRank, float]]) -> Tensor:
    total = sum((s * _wide(spec, p.weight) for p, s in whole), torch.zeros(()))
    return total + sum((s * p.up.float() @ _wide(spec, p.down) for p, s in pairs), torch.zeros(()))  # out in·k·k


def _wide(spec: LayerSpec, rows: Tensor) -> Tensor:
    """Rows over the inputs in fp32, zero for inputs that another LoRA gave the layer."""
    return rows.float() if spec.narrow is None else F.pad(rows.float(), (0, spec.inputs - rows.shape[1]))


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenated, in fp32; first in the dtype of files that have one in common: that is half the bytes to move."""
    if len({t.dtype for t in tensors}) > 1:
        tensors = [t.float() for t in tensors]
    return torch.cat(tensors, dim).float()


def _column(spec: LayerSpec, vector: Tensor) -> Tensor:
    """A vector over the outputs in the shape that it has beside the layer's output."""
    return vector.reshape(-1, *(1 for _ in spec.weight_shape[2:])) if spec.conv is not None else vector


def _bias(found: Mapping[type, list]) -> Tensor | None:
    """What is added to every position: changes of the bias, less what gains and rotations of y = W0·x + b make of b."""
    terms = [s * p.bias.float() for p, s in found[Bias]]
    of_weight = (*found[Gain], *found[Rotation])
    terms += [-s * p.on_rows(p.bias.float()[:, None]).flatten() for p, s in of_weight if p.bias is not None]
    return sum(terms) if terms else None


def _rotate(spec: LayerSpec, blocks: Tensor, y: Tensor) -> Tensor:
    """diag(blocks)·y over the output dimension."""
    k, n, _ = blocks.shape
    if spec.conv is None:
        return torch.einsum("kmn,...kn->...km", blocks, y.unflatten(-1, (k, n))).flatten(-2)
    return torch.einsum("kmn,bkn...->bkm...", blocks, y.unflatten(1, (k, n))).flatten(1, 2)


def _kron(spec: LayerSpec, w1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    """(w1 ⊗ w2)·x without forming the product."""
    if spec.conv is None:
        h = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # ... i1 o2
        return torch.einsum("oi,...ic->...oc", w1, h).flatten(-2)
    h = spec.conv(x.unflatten(1, (w1.shape[1], w2.shape[1])).flatten(0, 1), w2)  # b·i1 o2 h w
    return torch.einsum("oi,bic...->boc...", w1, h.unflatten(0, (x.shape[0], w1.shape[1]))).flatten(1, 2)
