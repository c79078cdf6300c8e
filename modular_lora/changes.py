"""The change of one weight against W0 in the forms that adapters have, and the sum of many as few products.

y = W0·x + b + Σᵢ strengthᵢ·(fᵢ(W0) − W0)·x. A part that is a function of W0 alone (a gain, a rotation) acts on
W0·x = y − b, never on another adapter's share, so no task adapter can rescale or rotate the safety LoRA's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Conv, LayerSpec

Role = Literal["safety", "task"]
_ONCE = Conv((1,), (0,), (1,))  # a kernel of 1
TOGETHER = 2**20  # numbers of a factor that are made at once


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = up·down: LoRA, LoCon, Tucker LoCon, LoHa of small rank."""

    down: Tensor  # r in·k·k
    up: Tensor  # out r


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW itself: a full difference, or factors that would be larger than it; for a norm the change of its weight."""

    weight: Tensor  # out in·k·k; out 1 for a norm


@dataclass(frozen=True, eq=False)
class Kron:
    """ΔW = w1 ⊗ w2 (LoKr), w2 with the layer's kernel: out = o₁·o₂, in = i₁·i₂."""

    w1: Tensor  # o1 i1
    w2: Tensor  # o2 i2 [k k]


@dataclass(frozen=True, eq=False)
class Gain:
    """ΔW = diag(gain)·W0 (the W0 half of DoRA); ``bias`` is the layer's own, which it leaves alone."""

    gain: Tensor  # out
    bias: Tensor | None  # out


@dataclass(frozen=True, eq=False)
class Rotation:
    """ΔW = diag(blocks)·W0 with blocks R − I (OFT); ``bias`` is the layer's own, which it leaves alone."""

    blocks: Tensor  # k n n, k·n = out: new row m of a block is Σ_n blocks[m, n]·row n
    bias: Tensor | None  # out


@dataclass(frozen=True, eq=False)
class Bias:
    """A change of the layer's bias."""

    bias: Tensor  # out


Part: TypeAlias = LowRank | Dense | Kron | Gain | Rotation | Bias


@dataclass(frozen=True, eq=False)
class Term:
    """One part of one adapter on one layer; ``scale`` is its strength, alpha/rank folded in."""

    role: Role
    part: Part
    scale: float


class Fused:
    """The sum of a layer's terms in compute dtype on its device: at most one product pair, or one dense product."""

    def __init__(
        self,
        spec: LayerSpec,
        terms: Sequence[Term],
        dtype: torch.dtype,
        device: torch.device,
        pair: tuple[Tensor, Tensor] | None = None,
    ):
        """``pair``: down and up, where they are made already and all that the terms are."""
        self.spec = spec
        self.down, self.up = pair or (None, None)  # R in [k k], out R [1 1]
        self.dense = self.gain = self.bias = None  # out in [k k], out, out
        self.krons, self.rotations = (), ()
        if pair is None:
            self._make(terms, lambda t: t.to(device, dtype).contiguous())
        self.pointwise = spec.conv is not None and _is_pointwise(spec)
        self.inputs = slice(spec.narrow)  # of x, as W0 has them
        others = self.krons or self.rotations or self.gain is not None or self.bias is not None
        self.plain = self.down is not None and not others
        self.nbytes = sum(t.nbytes for t in self.tensors)

    def _make(self, terms: Sequence[Term], place: Callable[[Tensor], Tensor]) -> None:
        spec, found = self.spec, _by_kind(terms)
        whole, pairs = found[Dense], found[LowRank]
        if _is_dense(spec, whole, pairs):
            self.dense = place(_sum(spec, whole, pairs).reshape(spec.weight_shape))
        elif pairs:
            self.down, self.up = (place(factors[0]) for factors in _stacked(spec, [pairs]))
        self.krons = tuple((place(s * p.w1.float()), place(p.w2.float())) for p, s in found[Kron])
        self.rotations = tuple(place(s * p.blocks.float()) for p, s in found[Rotation])
        if gains := found[Gain]:
            self.gain = place(_column(spec, sum(s * p.gain.float() for p, s in gains)))
        if (bias := _bias(found)) is not None:
            self.bias = place(_column(spec, bias))

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y + Σ scale·ΔW·x; y may be changed in place."""
        if not self.plain:
            y = self._others(y, x)
        if self.down is None:
            return y
        if self.spec.conv is not None:
            return self._convolved(y, x)
        h = F.linear(x, self.down)  # ... R
        if y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.up.t())
            return y
        return y + F.linear(h, self.up)

    def _convolved(self, y: Tensor, x: Tensor) -> Tensor:
        """y + up·(down ∗ x), as products of matrices where layout and kernel allow it."""
        if y.dim() != self.down.dim() or not y.is_contiguous():
            return y.add_(_ONCE(self.spec.conv(x, self.down), self.up))
        if self.pointwise and x.is_contiguous():
            h = self.down.flatten(1) @ x.flatten(2)  # b R h·w
        else:
            h = self.spec.conv(x, self.down).flatten(2)  # b R h·w
        y.flatten(2).baddbmm_(self.up.flatten(1).expand(len(y), -1, -1), h)
        return y

    def _others(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus all parts but the low-rank pair."""
        change = [_rotate(self.spec, blocks, y) for blocks in self.rotations]
        if self.gain is not None:
            change.append(self.gain * y)
        norm, conv = self.spec.norm, self.spec.conv
        if self.dense is not None and norm is not None:
            change.append(norm.normalised(x) * norm.beside(self.dense, y))
        elif self.dense is not None:
            change.append(F.linear(x, self.dense) if conv is None else conv(x, self.dense))
        change += [_kron(self.spec, w1, w2, x[..., self.inputs] if conv is None else x) for w1, w2 in self.krons]
        if self.bias is not None:
            change.append(self.bias if norm is None else norm.beside(self.bias, y))
        for part in change:
            y = y + part
        return y

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it holds."""
        own = (self.down, self.up, self.dense, self.gain, self.bias)
        return (*(t for t in own if t is not None), *self.rotations, *(w for pair in self.krons for w in pair))


Layers: TypeAlias = "Sequence[tuple[LayerSpec, Sequence[Term]]]"


def fuse(layers: Layers, dtype: torch.dtype, device: torch.device) -> list[Fused]:
    """``Fused`` of many layers; pairs of the same shapes are made together."""
    pairs = {}
    for places in _alike(layers):
        alike = [[(t.part, t.scale) for t in layers[place][1]] for place in places]
        made = (factors.to(device, dtype).unbind() for factors in _stacked(layers[places[0]][0], alike))
        pairs |= zip(places, zip(*made, strict=True), strict=True)
    return [Fused(spec, terms, dtype, device, pairs.get(place)) for place, (spec, terms) in enumerate(layers)]


def _alike(layers: Layers) -> Iterator[list[int]]:
    """The numbers of layers that have a pair and nothing else, of the same shapes and dtypes."""
    found = defaultdict(list)
    for place, (spec, terms) in enumerate(layers):
        parts = [t.part for t in terms]
        if spec.narrow is None and all(isinstance(part, LowRank) for part in parts):
            kinds = tuple((part.down.shape[0], part.down.dtype, part.up.dtype) for part in parts)
            found[spec.weight_shape, spec.conv, kinds].append(place)
    for (shape, _, kinds), places in found.items():
        spec, terms = layers[places[0]]
        size = max(1, TOGETHER // (sum(rank for rank, *_ in kinds) * max(shape[0], spec.inputs)))
        if not _is_dense(spec, [], [(t.part, t.scale) for t in terms]):
            yield from (places[start : start + size] for start in range(0, len(places), size))


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
    found = _by_kind(terms)
    whole, pairs = found[Dense], found[LowRank]
    rows, inputs = spec.weight_shape[0], spec.inputs
    total = rows * inputs if _is_dense(spec, whole, pairs) else _rank(pairs) * (rows + inputs)
    if len(pairs) == len(terms):
        return total
    total += sum(p.w1.numel() + p.w2.numel() for p, _ in found[Kron])
    total += sum(p.blocks.numel() for p, _ in found[Rotation])
    has_bias = any(isinstance(t.part, Bias) or getattr(t.part, "bias", None) is not None for t in terms)
    return total + spec.outputs * (bool(found[Gain]) + has_bias)


def _is_dense(spec: LayerSpec, whole: list, pairs: list) -> bool:
    rows, inputs = spec.weight_shape[0], spec.inputs
    by_nature = spec.conv is not None and spec.conv.dense and bool(pairs)
    return bool(whole) or by_nature or _rank(pairs) * (rows + inputs) > rows * inputs


def _is_pointwise(spec: LayerSpec) -> bool:
    return set(spec.weight_shape[2:]) | set(spec.conv.stride) == {1} and not any(spec.conv.padding)


def _rank(pairs: list[tuple[LowRank, float]]) -> int:
    return sum(p.down.shape[0] for p, _ in pairs)


def dense(part: Part, W0: Callable[[], Tensor]) -> Tensor:
    """ΔW of a part (out in·k·k, fp32); ``W0`` gives the weight (out in [k k]) where the part is a function of it."""
    if isinstance(part, LowRank):
        return part.up.float() @ part.down.float()
    if isinstance(part, Dense):
        return part.weight.float()
    if isinstance(part, Kron):
        w1 = part.w1.float().reshape(*part.w1.shape, *(1 for _ in part.w2.shape[2:]))
        return torch.kron(w1, part.w2.float()).flatten(1)
    return _on_rows(part, W0().float().flatten(1))


def times(part: Part, W0: Callable[[], Tensor], x: Tensor) -> Tensor:
    """ΔW·x of a part (x in·k·k n -> out n, fp32) without making ΔW; ``W0`` as in ``dense``."""
    if isinstance(part, LowRank):
        return part.up.float() @ (part.down.float() @ x)
    if isinstance(part, Dense):
        return part.weight.float() @ x
    if isinstance(part, Kron):
        w1, w2 = part.w1.float(), part.w2.float().flatten(1)  # o1 i1, o2 i2·k·k
        h = w2 @ x.T.reshape(-1, w1.shape[1], w2.shape[1]).transpose(1, 2)  # n o2 i1
        return (h @ w1.T).transpose(1, 2).flatten(1).T  # n o1 o2
    return _on_rows(part, W0().float().flatten(1) @ x)


def _on_rows(part: Part, rows: Tensor) -> Tensor:
    """What a function of W0 makes of rows over the outputs (out n): of W0 itself, of W0·x, of the bias."""
    if isinstance(part, Gain):
        return part.gain.float()[:, None] * rows
    if isinstance(part, Rotation):
        k, n, _ = part.blocks.shape
        return (part.blocks.float() @ rows.reshape(k, n, -1)).flatten(0, 1)
    raise TypeError(f"{type(part).__name__} is no change of a weight")


def _by_kind(terms: Sequence[Term]) -> Mapping[type, list]:
    """Parts and scales by the kind of part."""
    found = defaultdict(list)
    for t in terms:
        found[type(t.part)].append((t.part, t.scale))
    return found


def _sum(spec: LayerSpec, whole: list[tuple[Dense, float]], pairs: list[tuple[LowRank, float]]) -> Tensor:
    total = sum(s * _wide(spec, p.weight) for p, s in whole)
    return total + sum(s * p.up.float() @ _wide(spec, p.down) for p, s in pairs)  # out in·k·k


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
    terms += [-s * _on_rows(p, p.bias.float()[:, None]).flatten() for p, s in of_weight if p.bias is not None]
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
