"""The changes of a layer by all LoRAs, summed as few products: the safety LoRAs' and the task LoRAs' apart."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .changes import TASKS, Bias, Dense, Gain, Kron, LowRank, Owner, Role, Rotation, Term
from .layer_spec import Conv, LayerSpec

_ONCE = Conv((1,), (0,), (1,))  # a kernel of 1
TOGETHER = 2**20  # numbers of a factor that are made at once


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
    """``Fused`` of many layers; those with pairs of the same shapes are stacked and moved to the device together."""
    layers = [(spec, [term for own in by_owner(terms).values() for term in own]) for spec, terms in layers]
    pairs: dict[int, tuple[Tensor, Tensor]] = {}  # down and up of all pairs, by the number of the layer
    for numbers in _of_same_shapes(layers):
        down, up = _stacked(layers[numbers[0]][0], [_pairs(layers[number][1]) for number in numbers])
        each = zip(down.to(device, dtype).unbind(), up.to(device, dtype).unbind(), strict=True)
        pairs |= zip(numbers, each, strict=True)
    return [Fused(spec, terms, dtype, device, pairs.get(number)) for number, (spec, terms) in enumerate(layers)]


def _of_same_shapes(layers: Layers) -> Iterator[list[int]]:
    """The numbers of layers whose pairs have the same shapes and dtypes, no more at a time than TOGETHER allows.

    Only layers that have pairs and nothing else are among them, and whose pairs are not summed to a matrix.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, (spec, terms) in enumerate(layers):
        pairs = _pairs(terms)
        if spec.narrow is None and len(pairs) == len(terms):
            kinds = [
                (term.role, term.owner, pair.down.shape[0], pair.down.dtype, pair.up.dtype)
                for term, (pair, _) in zip(terms, pairs, strict=True)
            ]
            groups[spec.weight_shape, spec.conv, tuple(kinds)].append(number)
    for numbers in groups.values():
        spec, terms = layers[numbers[0]]
        if not any(_is_dense(spec, [], _pairs(own)) for own in by_owner(terms).values()):
            size = max(1, TOGETHER // (_rank(_pairs(terms)) * max(spec.weight_shape[0], spec.inputs)))
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _pairs(terms: Sequence[Term]) -> list[tuple[LowRank, float]]:
    return [(t.part, t.scale) for t in terms if isinstance(t.part, LowRank)]


def _stacked(spec: LayerSpec, layers: Sequence[Sequence[tuple[LowRank, float]]]) -> tuple[Tensor, Tensor]:
    """The pairs of L layers of the same shapes, each layer's pairs joined to one of rank R = Σ r.

    Returns:
        down (L R in [k k]), and up with the scales in it (L out R [1 1]); fp32.
    """
    downs = [pair.down if spec.narrow is None else _wide(spec, pair.down) for pairs in layers for pair, _ in pairs]
    ups = [torch.stack([pair.up for pair, _ in nth]) for nth in zip(*layers, strict=True)]  # L out r, of the nth pair
    down, up = _joined(downs, 0), _joined(ups, 2)  # L·R in·k·k, L out R
    scales = [[scale for pair, scale in pairs for _ in range(pair.up.shape[1])] for pairs in layers]  # L R
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
