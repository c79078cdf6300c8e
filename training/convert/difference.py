"""ΔW = W_safe − W0 of one model, weight by weight, and the tensors of a LoRA that carry it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...modular_lora.errors import shown
from ..choices import SavePrecision
from ..output import DTYPES
from .change import Rounding, factored, outside
from .errors import ConvertError
from .names import Parts, lora_name
from .weights import Get

LIMIT = 0.1  # of ‖W0 + UD − W_safe‖ / ‖ΔW‖
COMPARED = 8  # layers by which W0 as it is and W0 rounded are compared
_EMBEDDING = re.compile(r".*(token_embedding|position_embedding)\.weight")


@dataclass(frozen=True)
class ConvertOptions:
    """What the command takes.

    Attributes:
        rank: largest rank of a layer; 0: as many as ``limit`` asks for.
        limit: largest ‖W0 + UD − W_safe‖ / ‖ΔW‖ of the whole.
        save_precision: type of the factors.
        concept: prompts of what the weights erase, for the metadata.
        base_sha256: SHA-256 that the base's file must have; "": none.
        leave_out_embeddings: leave out changes of token and position embeddings, which no LoRA carries.
    """

    rank: int = 0
    limit: float = LIMIT
    save_precision: SavePrecision = "float"
    concept: tuple[str, ...] = ()
    base_sha256: str = ""
    leave_out_embeddings: bool = False


@dataclass
class Part:
    """What was found in one model of a file: names of its weights, and sums over the changed ones."""

    name: str
    tensors: int = 0
    equal: int = 0
    changed: list[str] = field(default_factory=list)  # embeddings aside
    embeddings: list[str] = field(default_factory=list)
    energy: float = 0.0  # ‖ΔW‖²
    base: float = 0.0  # ‖W0‖² of the same weights
    noise: float = 0.0  # expected ‖rounding of the file‖²
    left_out: float = 0.0  # ‖ΔW‖² of embeddings
    rest: float = 0.0  # ‖W0 + UD − W_safe‖²
    ranks: Counter[int] = field(default_factory=Counter)
    inexact: int = 0  # layers whose rank the limit chose, or the largest rank that was asked for
    low: int = 0  # layers whose change has a low rank of its own
    full: int = 0  # layers that are written as a full difference

    @property
    def change(self) -> float:
        """‖ΔW‖ / ‖W0‖."""
        return math.sqrt(self.energy / self.base) if self.base else math.inf

    @property
    def proof(self) -> str:
        """What shows that W0 is the one that the eraser started from; "" where nothing does."""
        if self.equal:
            return f"{self.equal} of {self.tensors} weights are W0's own"
        if self.ranks and self.low == self.ranks.total() + self.full:
            return "every change has a low rank of its own, which the difference of two bases has not"
        return ""


def pair(ours: Get, theirs: Get, name: str) -> tuple[Tensor, Tensor]:
    """W_safe and W0 in one shape: a 1x1 kernel and a linear weight are the same; ConvertError for other shapes."""
    safe, base = ours(), theirs()
    if safe.shape != base.shape and [n for n in safe.shape if n != 1] == [n for n in base.shape if n != 1]:
        safe = safe.reshape(base.shape)
    if safe.shape != base.shape:
        raise ConvertError(
            f"weight {shown(name)}: is {list(safe.shape)}, {list(base.shape)} in the base: use the base that the "
            "eraser started from.",
            code="convert.other-base",
        )
    return safe, base


def rounded_to(ours: Parts, theirs: Parts) -> torch.dtype | None:
    """The type of the file where W0 rounded to it leaves the smaller rest, None where W0 as it is does.

    Weights that are W0's own cannot tell, rounded they are the same either way: the energy of the largest changes
    beyond a low rank does.
    """
    dtypes = set()
    changed: list[tuple[float, Tensor, Tensor]] = []
    for part, names in ours.items():
        for name, get in names.items():
            safe, base = pair(get, theirs[part][name], name)
            if not safe.is_floating_point() or _eps(safe) <= _eps(base):
                continue  # rounding to a finer type changes nothing
            dtypes.add(safe.dtype)
            if safe.dim() > 1 and not _equal(safe, base):
                changed.append((float((safe.double() - base.double()).norm()), safe, base))
                changed = sorted(changed, key=lambda one: -one[0])[:COMPARED]
    if not dtypes:
        return None
    dtype = max(dtypes, key=lambda one: torch.finfo(one).eps)
    as_it_is = sum(outside(_flat(safe) - _flat(base)) for _, safe, base in changed)
    rounded = sum(outside(_flat(safe) - _flat(base.to(dtype))) for _, safe, base in changed)
    return dtype if rounded < as_it_is else None


def _equal(safe: Tensor, base: Tensor) -> bool:
    """Whether a weight is W0's own, as far as the coarser of the two types can say it."""
    coarser = safe.dtype if _eps(safe) > _eps(base) else base.dtype
    return torch.equal(safe.to(coarser), base.to(coarser))


def _eps(weight: Tensor) -> float:
    return torch.finfo(weight.dtype).eps if weight.is_floating_point() else 0.0


def _flat(weight: Tensor) -> Tensor:
    return weight.double().reshape(weight.shape[0], -1)


@dataclass(frozen=True)
class Difference:
    """The weights of one model of a file, beside W0's.

    Attributes:
        part: "unet", "text_encoder", ...
        ours, theirs: W_safe and W0 by name.
        rounded: the type that W0 is rounded to first.
    """

    part: str
    ours: Mapping[str, Get]
    theirs: Mapping[str, Get]
    rounded: torch.dtype | None

    def survey(self) -> Part:
        """What is changed and by how much; ConvertError for values that are not finite."""
        found = Part(self.part)
        for name in self.ours:
            safe, base = self._pair(name)
            if not safe.is_floating_point():
                continue
            found.tensors += 1
            if _equal(safe, base):
                found.equal += 1
                continue
            if not bool(safe.isfinite().all()):
                raise ConvertError(
                    f"weight {shown(name)}: holds values that are not finite: download the file again.",
                    code="convert.not-finite",
                )
            energy = float(self._change(safe, base).square().sum())
            found.energy += energy
            found.base += float(base.double().square().sum())
            found.noise += sum(one.error**2 for one in self._rounding(safe, base)[:1]) * safe.numel()
            if _EMBEDDING.fullmatch(name):
                found.embeddings.append(name)
                found.left_out += energy
            else:
                found.changed.append(name)
        found.rest = found.left_out
        return found

    def layers(self, found: Part, second_encoder: bool, o: ConvertOptions) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the LoRA under their names in the file; what came out is added to ``found``."""
        dtype = DTYPES[o.save_precision]
        for name in found.changed:
            safe, base = self._pair(name)
            change = self._change(safe, base)
            layer, _, end = name.rpartition(".")
            written = lora_name(self.part, layer, second_encoder, self._width)
            if change.dim() > 1:
                yield from _matrix(found, written, change, self._rounding(safe, base), o)
                continue
            row = change.to(dtype)
            found.rest += float((change - row.double()).square().sum())
            yield f"{written}.{'diff_b' if end == 'bias' else 'w_norm'}", row

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return pair(self.ours[name], self.theirs[name], name)

    def _change(self, safe: Tensor, base: Tensor) -> Tensor:
        return safe.double() - (base if self.rounded is None else base.to(self.rounded)).double()

    def _rounding(self, safe: Tensor, base: Tensor) -> tuple[Rounding, ...]:
        """Of the file, and of a base whose type is coarser: the eraser may have had it in a finer one."""
        types = [safe.dtype, *([base.dtype] if _eps(base) > _eps(safe) else [])]
        return tuple(Rounding.of(safe, dtype) for dtype in types)

    @property
    def _width(self) -> int:
        """Of a text encoder."""
        ends = (
            get for name, get in self.theirs.items() if name.endswith(("layer_norm1.bias", "final_layer_norm.bias"))
        )
        return next((get().shape[-1] for get in ends), 0)


def _matrix(
    found: Part, layer: str, change: Tensor, rounding: tuple[Rounding, ...], o: ConvertOptions
) -> Iterator[tuple[str, Tensor]]:
    """Factors of a weight's change, or the change itself where that is smaller."""
    dtype, flat = DTYPES[o.save_precision], _flat(change)
    made = factored(flat, rounding, o.limit, o.rank)
    found.low += made.low
    if made.up is None or made.down is None:
        found.full += 1
        whole = change.to(dtype)
        found.rest += float((change - whole.double()).square().sum())
        yield f"{layer}.diff", whole
        return
    up, down = made.up.to(dtype), made.down.to(dtype)
    found.ranks[made.rank] += 1
    found.inexact += not made.exact
    found.rest += float((flat - up.double() @ down.double()).square().sum())
    yield f"{layer}.lora_down.weight", down.reshape(made.rank, *change.shape[1:])
    yield f"{layer}.lora_up.weight", up.reshape(*up.shape, *(1 for _ in change.shape[2:]))
    yield f"{layer}.alpha", torch.tensor(float(made.rank), dtype=dtype)
