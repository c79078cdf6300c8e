"""Net strength as it acted: what was left of each safety LoRA's share on a run's own activations.

The net strength of the files (interference.py) compares weights. Files can be made for it: dW_t = −dW_s + c·dW_s·C⁻¹
(C: second moments of a layer's inputs) keeps it at 1 in every layer and still cancels the safety LoRA on real inputs.
In the measured evaluations of a run this module looks at what each layer adds to y0 = W0·x + b instead. With z_i the
share of safety LoRA i (its strength in it) and z_other that of every other LoRA, over tokens, layers and measured
evaluations:

    net strength as it acted = strength_i · (1 + Σ <z_i, z_other> / Σ <z_i, z_i>)

for each image of the batch and each of the guider's conditionings (a prompt may stand in any of them). It is judged
only where Σ |z_i|² is at least SHARE of Σ |y0|²; where it is less, the safety LoRA had nothing to do there.

Where all that acts on a layer is low-rank, one small product hᵀ·h of h = down·x gives both sums (R numbers a token);
elsewhere the shares themselves are compared. The evaluations to measure are the first and one drawn with a key of the
process, which no graph can choose. In the first of a run a probe also compares (y0 + s + t) − (y0 + t), in the layer's
own dtype, with s in fp64, so that no share can be lost to rounding.

The same sums give each safety LoRA's activity: for one image, in the first evaluation that is measured,

    activity_i = mean over the layers on which i acts of |z_i|² / |y0|²

on the rows of the prompt alone, not on those of the negative one. What it is compared with is in guard/activity.py.
"""

from __future__ import annotations

import hmac
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import GuardError
from .changes import TASKS, Owner
from .fusing import Fused

SHARE = 1e-6  # least Σ|z|² / Σ|y0|² that is judged
PROBE_FLOOR = 0.5  # least <with s − without s, s> / <s, s> of a layer in the probe
PROBE_SHARE = 1e-6  # least |s|² / |y0|² of a layer that the probe judges
_KEY = secrets.token_bytes(32)
POSITIONS = 32  # least that the probe looks at, where a layer has more and treats each by itself

Row: TypeAlias = "tuple[int, int]"  # which of the guider's conditionings, which image of the batch
Rows: TypeAlias = "tuple[Row, ...]"  # of the batch dimension of one evaluation
EVERY = 2**31  # an image's number that stands for every image of the run
NOBODY = -1  # of a row whose result is not used
UNKNOWN: Rows = ((0, EVERY),)  # an evaluation whose rows are not told apart


def _kind(root: str, rows: Rows) -> tuple:
    """Evaluations of one kind have the same conditionings of the guider, and are for the same images."""
    whole = all(number != NOBODY for _, number in rows)
    return root, *sorted({conditioning for conditioning, _ in rows}), *(() if whole else rows)


@dataclass(frozen=True)
class Acted:
    """One safety LoRA in one run.

    Attributes:
        images: least net strength of every image over the conditionings that were judged; None: nothing to judge.
        share: Σ|z|² / Σ|y0|² over all that was measured.
        activity: of every image, see the module; None: no row of its prompt was measured.
    """

    images: tuple[float | None, ...]
    share: float
    activity: tuple[float | None, ...] = ()

    @property
    def least(self) -> float | None:
        """The least of all images; None where the safety LoRA had nothing to do in any."""
        return min((value for value in self.images if value is not None), default=None)

    def least_with(self, other: Acted | None) -> Acted:
        """Of a run in two parts: the lower figure of each image, and the lower share that is not 0."""
        if other is None:
            return self
        pairs = zip(self.images, other.images, strict=True)
        images = tuple(min((v for v in pair if v is not None), default=None) for pair in pairs)
        return Acted(images, min((share for share in (self.share, other.share) if share), default=0.0))


@dataclass
class _Layer:
    """What one layer gave in one measured evaluation; the tensors stay on its device until the run ends."""

    fused: Fused
    base: Tensor  # |y0|² of every row
    grams: Tensor | None = None  # h hᵀ (rows R R_s), all that acts against the safety LoRAs' ranks
    inner: dict[Owner, tuple[Tensor, Tensor]] = field(default_factory=dict)  # or <z, z_other> and <z, z> of every row


class Meter:
    """Measures the evaluations of one guarded model; a run begins with ``start`` and is read by ``finish``.

    Args:
        strengths: Strength of every safety LoRA by its owner.
        names: What people call it.
        floor: Least net strength as it acted; None judges nothing (audits, comparisons).
    """

    def __init__(self, strengths: Mapping[Owner, float], names: Mapping[Owner, str], floor: float | None):
        self.strengths, self.names, self.floor = dict(strengths), dict(names), floor
        self.running = self.measuring = False
        self.evaluations = 0  # measured since the start of the run
        self.images: frozenset[int] | None = None  # whose rows of an evaluation are used; None: all
        self._rows_of: Callable[[tuple, dict], Rows] | None = None
        self._steps, self._content = 1, b""
        self._prompt: int | None = None  # which conditioning is the prompt
        self._seen: dict[tuple, list[int]] = {}  # kind of evaluation -> how many there were, which is drawn
        self._made: list[tuple[Rows, list[_Layer]]] = []
        self._layers: list[_Layer] = []
        self._rows: Rows = UNKNOWN
        self._probes: list[tuple[str, float, Tensor]] = []  # layer, deviation of a number by rounding
        self._probing = False

    def start(
        self,
        rows_of: Callable[[tuple, dict], Rows] | None = None,
        steps: int = 1,
        content: bytes = b"",
        prompt: int | None = None,
    ) -> None:
        """Begin a run.

        Args:
            rows_of: Rows of an evaluation by the arguments of the model's forward; None: they are not told apart.
            steps: How many evaluations of each kind the run is expected to have; one of them is drawn.
            content: What the run starts from. The same run draws the same evaluation as long as the process lives, so
                that a compiled model, whose measured evaluations run eagerly, gives the same image again.
            prompt: Which of the guider's conditionings is the prompt; None: none, and no activity is measured.
        """
        self.stop()
        self._rows_of, self._steps, self._content, self.running = rows_of, steps, content, bool(self.strengths)
        self._prompt = prompt if rows_of else None

    def stop(self) -> None:
        """Forget the run."""
        self.running = self.measuring = self._probing = False
        self.evaluations = 0
        self._seen, self._made, self._layers, self._probes = {}, [], [], []

    def due(self, root: str, args: tuple, kwargs: dict) -> bool:
        """Whether the next evaluation of ``root``, with these arguments of its forward, is to be measured."""
        return self.running and self._next(_kind(root, self._rows_for(args, kwargs)))

    def seen(self, root: str, args: tuple, kwargs: dict) -> int:
        """How many evaluations of this kind there were in the run."""
        return self._seen.get(_kind(root, self._rows_for(args, kwargs)), (0, 0))[0]

    def passed(self, root: str, args: tuple, kwargs: dict) -> None:
        """Count an evaluation that went by unseen, as what torch.compile made of a model does."""
        self._count(_kind(root, self._rows_for(args, kwargs)))

    def _rows_for(self, args: tuple, kwargs: dict) -> Rows:
        rows = self._rows_of(args, kwargs) if self._rows_of else UNKNOWN
        if self.images is None:
            return rows
        return tuple((conditioning, n if n in self.images else NOBODY) for conditioning, n in rows)

    def _count(self, kind: tuple) -> None:
        self._seen.setdefault(kind, [0, self._drawn(kind)])[0] += 1

    def _drawn(self, kind: tuple) -> int:
        """The number of an evaluation after the first; without the key of this process nobody can tell it."""
        digest = hmac.digest(_KEY, self._content + repr(kind).encode(), "sha256")
        return 1 + int.from_bytes(digest, "big") % max(1, self._steps - 1)

    def _next(self, kind: tuple) -> bool:
        count, drawn = self._seen.get(kind, (0, 0))
        return count in (0, drawn)

    @contextmanager
    def evaluation(self, root: str, args: tuple, kwargs: dict) -> Iterator[None]:
        """Around one evaluation of ``root``, a model or text encoder, with the arguments of its forward."""
        if not self.running or self.measuring:  # a root inside another is measured with it
            yield
            return
        rows = self._rows_for(args, kwargs)
        kind = _kind(root, rows)
        self.measuring = self._next(kind)
        self._probing = self.measuring and not self._made
        self._rows, self._layers = rows, []
        self._count(kind)
        try:
            yield
        finally:
            measured, self.measuring = self.measuring, False
        if measured:
            self.evaluations += 1
            self._made.append((self._rows, self._layers))
        if self._probing:
            self._check_probes()

    def layer(self, path: str, fused: Fused, y: Tensor, x: Tensor, g: Tensor | None = None) -> Tensor:
        """The layer's result as ``fused(y, x, g)`` gives it, measured on the way."""
        if not any(role == "safety" for role, _ in fused.owners):
            return fused(y, x, g)
        rows = len(self._rows)
        h = fused.reduced(x, g)
        found = _Layer(fused, _by_rows(y, rows).square())
        if h is not None and fused.low_rank:
            found.grams = _grams(fused, h, rows)
        else:
            found.inner = _inner(fused, y, x, h, rows, g)
        self._layers.append(found)
        if not self._probing:
            return fused.apply(y, x, h, g)
        pick = _positions(fused, x)
        y0, h0 = pick(y).clone(), None if h is None else pick(h)
        y = fused.apply(y, x, h, g)
        rounding = torch.finfo(y.dtype).eps / math.sqrt(max(1, y0.numel()))
        self._probes.append((path, rounding, _probe(fused, y0, pick(x), h0, pick(y), g)))
        return y

    def _check_probes(self) -> None:
        """GuardError where a layer's result does not hold the safety LoRAs' share, or is not finite."""
        self._probing = False
        if not self._probes:
            return
        device = self._probes[0][2].device
        table = torch.stack([figures.to(device) for _, _, figures in self._probes]).tolist()
        for (path, rounding, _), (inner, energy, base, total) in zip(self._probes, table, strict=True):
            if not math.isfinite(energy) or not math.isfinite(total):
                raise GuardError(
                    f"Layer {path} gives values that are not finite: lower the strength of the LoRAs, or run the model "
                    "in a wider dtype (bf16 or fp32).",
                    code="run.not-finite",
                )
            if energy <= 0 or not energy >= PROBE_SHARE * base:
                continue
            kept, noise = inner / energy, rounding * math.sqrt(base / energy)
            if not kept >= PROBE_FLOOR - 4 * noise:
                raise GuardError(
                    f"Layer {path} kept {kept:.2f} of the safety LoRA's share in its result: another LoRA's values are "
                    "so large that the share is lost to rounding; leave that LoRA out.",
                    code="run.share-lost",
                )

    def finish(self, images: int | None = None) -> dict[Owner, Acted]:
        """What was measured of the run, by safety LoRA.

        Args:
            images: How many images the run had; rows beyond them, and layers without a row for each, count for all.

        Raises:
            GuardError: Where a figure lies below the floor or is not finite.
        """
        made, self._made, self.running = self._made, [], False
        found = {}
        for owner, strength in self.strengths.items():
            tables = _tables(made, owner)
            judged = _judged(_sums(tables), strength, images or 1)
            found[owner] = replace(judged, activity=_activity(tables, self._prompt, images or 1))
        for owner, acted in found.items():
            self._check(owner, acted)
        return found

    def _check(self, owner: Owner, acted: Acted) -> None:
        name = self.names[owner]
        if not math.isfinite(acted.share) or any(v is not None and not math.isfinite(v) for v in acted.images):
            raise GuardError(
                f"Safety LoRA {name}: what the layers gave is not finite, so nothing can be said of its strength: "
                "lower the strength of the LoRAs, or run the model in a wider dtype (bf16 or fp32).",
                code="run.not-finite",
            )
        least = acted.least
        if self.floor is not None and least is not None and least < self.floor:
            image = acted.images.index(least) + 1
            raise GuardError(
                f"Safety LoRA {name}: as it acted, a net strength of {least:.2f} is left of "
                f"{self.strengths[owner]:.2f} in image {image}, below the floor of {self.floor:.2f}: the other LoRAs "
                "work against it; lower their strength or leave them out.",
                code="run.net-strength",
            )


Table: TypeAlias = "list[list[float]]"  # <z, z_other>, <z, z>, |y0|² of every row of a layer, or of all as one
Sums: TypeAlias = "dict[Row | None, list[float]]"  # <z, z_other>, <z, z>, |y0|²; None: of layers without these rows


def _tables(made: Sequence[tuple[Rows, Sequence[_Layer]]], owner: Owner) -> list[tuple[Rows, list[Table]]]:
    """The three figures of one safety LoRA by evaluation, layer and row (or one row for all), in fp64."""
    ups: dict[Fused, Tensor] = {}
    measured = [(rows, [_figures(layer, owner, ups) for layer in layers]) for rows, layers in made]
    found = [(rows, [table for table in tables if table is not None]) for rows, tables in measured]
    every = [table for _, tables in found for table in tables]
    if not every:
        return []
    device = every[0].device
    values = iter(torch.cat([table.to(device) for table in every]).tolist())  # off the device at once
    return [(rows, [list(islice(values, len(table))) for table in tables]) for rows, tables in found]


def _sums(tables: Sequence[tuple[Rows, Sequence[Table]]]) -> Sums:
    """The three sums of one safety LoRA for every row, over layers and evaluations."""
    sums: Sums = defaultdict(lambda: [0.0, 0.0, 0.0])
    for rows, layers in tables:
        for table in layers:
            for row, three in _assigned(rows, table):
                sums[row] = [total + value for total, value in zip(sums[row], three, strict=True)]
    return sums


def _assigned(rows: Rows, table: Table) -> list[tuple[Row | None, list[float]]]:
    """Whose the figures of a layer are; of one without a row for each, in an evaluation for some images, all theirs."""
    used = [row for row in rows if row[1] != NOBODY]
    if len(table) == len(rows):
        return [(row, three) for row, three in zip(rows, table, strict=True) if row[1] != NOBODY]
    return [(None, table[0])] if len(used) == len(rows) else [(row, table[0]) for row in used]


def _activity(
    tables: Sequence[tuple[Rows, Sequence[Table]]], prompt: int | None, images: int
) -> tuple[float | None, ...]:
    """Mean over layers of |z|² / |y0|² on the rows of the prompt, by image, in the first evaluation that has one.

    An image with several such rows in it (areas with prompts of their own) has the greatest of them.
    """
    found: list[float | None] = [None] * images
    for rows, layers in tables:
        here: dict[int, float] = {}
        for place, (conditioning, number) in enumerate(rows):
            parts = [table[place] for table in layers if len(table) == len(rows)]
            ratios = [energy / base for _, energy, base in parts if base > 0]
            if conditioning != prompt or number == NOBODY or not ratios:
                continue
            value = math.fsum(ratios) / len(ratios)
            for image in [number] if number < images else range(images):
                here[image] = max(value, here.get(image, value))
        for image, value in here.items():
            if found[image] is None:
                found[image] = value
    return tuple(found)


def _figures(layer: _Layer, owner: Owner, ups: dict[Fused, Tensor]) -> Tensor | None:
    """<z, z_other>, <z, z> and |y0|² of every row (rows or one, 3; fp64); None where the safety LoRA does not act.

    ``ups`` keeps what was worked out about the up matrices, for the layer's next evaluation.
    """
    if layer.grams is None:
        if (found := layer.inner.get(owner)) is None:
            return None
        return torch.stack([*map(_double, found), _double(layer.base)], -1)
    if (own := layer.fused.ranks.get(owner)) is None:
        return None
    if layer.fused not in ups:
        up = _double(layer.fused.up.flatten(1))  # out R
        ups[layer.fused] = up.T @ up[:, own]
    each = (ups[layer.fused] * _double(layer.grams[:, :, own])).sum(2)  # rows R: Σ_i <u_a h_a, u_i h_i>
    inside = each[:, own].sum(1)
    outside = each[:, : own.start].sum(1) + each[:, own.stop :].sum(1)
    return torch.stack([outside, inside, _double(layer.base)], -1)


def _single(t: Tensor) -> torch.dtype:
    """fp32, or what is wider."""
    return torch.promote_types(t.dtype, torch.float32)


def _double(t: Tensor) -> Tensor:
    """In fp64; on the CPU where the device may have none."""
    return (t if t.device.type in ("cpu", "cuda") else t.cpu()).double()


def _judged(sums: Sums, strength: float, images: int) -> Acted:
    common = sums.get(None, [0.0, 0.0, 0.0])
    least: list[float | None] = [None] * images
    rows = {row: own for row, own in sums.items() if row is not None} or {UNKNOWN[0]: [0.0, 0.0, 0.0]}
    for (_, number), own in rows.items():
        other, energy, base = (a + b for a, b in zip(own, common, strict=True))
        if not all(map(math.isfinite, (other, energy, base))):
            value = math.nan
        elif energy <= 0 or energy < SHARE * base:
            continue
        else:
            value = strength * (1 + other / energy)
        for image in [number] if number < images else range(images):
            before = least[image]
            least[image] = value if before is None or not before <= value else before
    energy, base = (math.fsum(own[i] for own in sums.values()) for i in (1, 2))
    return Acted(tuple(least), energy / base if base else 0.0)


def _parts(t: Tensor, rows: int) -> int:
    """Into how many parts a tensor's first dimension is cut: one a row, or one in all where it has none for each."""
    return rows if t.dim() > 1 and t.shape[0] % rows == 0 else 1


def _by_rows(t: Tensor, rows: int) -> Tensor:
    """The length of every row's part of a tensor (rows; fp32 or wider); one length where it has no part for each."""
    return torch.linalg.vector_norm(t.reshape(_parts(t, rows), -1), dim=1, dtype=_single(t))


def _grams(fused: Fused, h: Tensor, rows: int) -> Tensor:
    """hᵀ·h of every row (rows R R_s, fp32): all ranks against those of the safety LoRAs."""
    parts = _parts(h, rows)
    h = _tokens(fused, h).unflatten(0, (parts, -1)).float()
    return h.mT @ h[..., : fused.split]


def _inner(
    fused: Fused, y0: Tensor, x: Tensor, h: Tensor | None, rows: int, g: Tensor | None = None
) -> dict[Owner, tuple[Tensor, Tensor]]:
    """<z, z_other> and <z, z> of every row, by safety LoRA, from the shares themselves."""
    parts = _parts(y0, rows)
    shares = {owner: fused.share(owner, y0, x, h, g).reshape(parts, -1).float() for owner in fused.owners}
    total = sum(shares.values())
    found = {}
    for owner, share in shares.items():
        if owner[0] == "safety":
            found[owner] = (share * (total - share)).sum(1), share.square().sum(1)
    return found


def _positions(fused: Fused, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What picks the positions that the probe looks at, alike of a layer's input, of h and of its result."""
    spec = fused.spec
    if spec.conv is None and spec.norm is None:
        step = max(1, x.numel() // x.shape[-1] // POSITIONS)
        return lambda t: t.reshape(-1, t.shape[-1])[::step]
    if x.dim() <= len(spec.weight_shape) - (spec.conv is not None):  # without a batch
        return lambda t: t
    if fused.pointwise:
        step = max(1, x.numel() // x.shape[1] // POSITIONS)
        return lambda t: t.flatten(2)[..., ::step].unflatten(2, (-1, *spec.weight_shape[3:]))
    return lambda t: t[:1]  # it needs an image as a whole


def _probe(fused: Fused, y0: Tensor, x: Tensor, h: Tensor | None, result: Tensor, g: Tensor | None = None) -> Tensor:
    """<(y0 + s + g·t) − (y0 + g·t), s>, |s|², |y0|² and Σ (y0 + s + g·t) over some positions of a layer (4).

    The two results are in the layer's own dtype, s in fp64. A value of the result that is not finite makes the last
    sum so, one of s makes |s|² so.
    """
    wide = torch.float64 if y0.device.type in ("cpu", "cuda") else torch.float32  # others may have no fp64
    without = y0 + fused.share(TASKS, y0, x, h, g) if TASKS in fused.owners else y0
    single = _single(y0)
    kept = result.to(single) - without.to(single)
    safety, x = fused.only("safety", wide), x.to(wide, memory_format=torch.contiguous_format)
    h = safety.reduced(x)
    if h is not None and fused.low_rank:  # <k, up·h> = <k·up, h>, |up·h|² = <up·up, h·h>: no tensor of y's size in fp64
        up = safety.up.flatten(1)
        h, kept = _tokens(fused, h), _tokens(fused, kept)
        inner, energy = ((kept @ up.to(single)) * h).sum(), ((up.T @ up) * (h.T @ h)).sum()
    else:
        exact = y0.to(wide)
        s = reduce(torch.add, (safety.share(owner, exact, x, h) for owner in safety.owners))
        inner, energy = (kept * s).sum(), s.square().sum()
    return torch.stack([inner, energy, _by_rows(y0, 1)[0].square(), result.sum(dtype=single)])


def _tokens(fused: Fused, t: Tensor) -> Tensor:
    """Inputs, h or results by position (positions, features)."""
    if fused.spec.conv is not None:
        t = t.movedim(1 if t.dim() == fused.down.dim() else 0, -1)
    return t.reshape(-1, t.shape[-1])
