"""What all formats of LoRA files have in common.

A format is one class in one file of this package and one line in ``FORMATS`` (``__init__``). The class says by which
names its tensors are known, what makes them sound and how they are read; an object of it is one layer of a file and
says which weights it fits and what it changes of one. Names and shapes are those of kohya-ss sd-scripts, LyCORIS and
PEFT, and what a layer changes is what ComfyUI's own merge of it on W0 gives (comfy/weight_adapter).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ...branches.changes import Additive, Parts
from ..target import Place

RANK_LIMIT = 4096
DAMAGED = "the file is damaged: download it again"

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # role -> shape of the tensor


class Unread(ValueError):
    """A variant of a format that this version does not read; the reader says which it does."""


def demand(fits: bool, problem: str) -> None:
    """ValueError with what makes a layer unsound."""
    if not fits:
        raise ValueError(f"{problem}: {DAMAGED}")


def check_rank(rank: int) -> None:
    if rank > RANK_LIMIT:
        raise ValueError(f"rank {rank}, at most {RANK_LIMIT} allowed: resize the LoRA")


def check_row(role: str, shapes: Shapes, out: int | None) -> None:
    """ValueError where the tensor of a role is not one row of ``out`` numbers (None: of any number)."""
    shape = shapes.get(role)
    fits = shape is None or (len(shape) == 1 and out in (None, shape[0]))
    demand(fits, f"{role} has shape {list(shape or ())}, {out or 'a'} numbers in one row are needed")


def check_not_zero(role: str, tensor: Tensor) -> None:
    """ValueError for what stands in a weight's place, or is its length, and is zero."""
    demand(bool(tensor.float().any()), f"{role} is 0, it would erase the weight")


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has an entry that is not zero; the first one settles it in every trained file."""
    if tensor.flatten()[0].item() != 0:
        return True
    return bool(tensor.float().any())  # fp8 has no any()


def same(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes are one: a kernel may come flattened, or as 1s where there is none."""
    if have == wanted or len(have) < 2 or len(wanted) < 2:
        return have == wanted
    flat = len(have) == 2 and have[1] == math.prod(wanted[1:])
    padded = len(wanted) == 2 and have[:2] == wanted and set(have[2:]) == {1}
    return have[0] == wanted[0] and (flat or padded)


def is_rounding(parts: Parts, W0: Callable[[], Tensor], stored: torch.dtype) -> bool:
    """Whether the sum of parts is no more than what storing W0 in a dtype costs."""
    total = sum((scale * part.dense(W0) for part, scale in parts), torch.zeros(()))
    return float(total.norm()) <= torch.finfo(stored).eps * float(W0().norm())


@dataclass(frozen=True, eq=False)
class Adapter(ABC):
    """One layer of a LoRA file; tensors on the CPU in the file's dtype.

    Attributes:
        name: of the layer in the file, without the ends that tell its tensors apart.

    Class attributes say how files hold the format:
        form: what errors call it.
        reads: what the list of all formats that are read calls it.
        endings: end of a tensor's name -> the tensor's role in the layer.
        patterns: patterns of whole names with the groups ``layer`` and, for PEFT's name of the adapter, ``adapter``.
        whole: sets of roles, of which a layer has exactly one; none for what stands beside another format.
        beside: roles of other formats that may stand beside it.
        roles: those that the fields after ``name`` hold, in their order, without that of the alpha.
        alpha_counts: whether an alpha is held, in the last field.
        power: how often ComfyUI multiplies by the strength.
        on_norms: whether a norm takes it.
        host: the class of comfy/weight_adapter that holds it once ComfyUI has loaded it, and the roles of its
            ``weights`` in their order.
    """

    name: str

    form: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    endings: ClassVar[Mapping[str, str]] = {}
    patterns: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = ()
    whole: ClassVar[tuple[Set[str], ...]] = ()
    beside: ClassVar[Set[str]] = frozenset()
    roles: ClassVar[tuple[str, ...]] = ()
    power: ClassVar[int] = 1
    alpha_counts: ClassVar[bool] = True
    on_norms: ClassVar[bool] = False
    host: ClassVar[tuple[str, tuple[str, ...]] | None] = None

    @classmethod  # noqa: B027, most formats have nothing to say here
    def check_roles(cls, roles: Set[str]) -> None:
        """ValueError for roles of a whole layer that do not go together."""

    @classmethod
    def check(cls, shapes: Shapes) -> int | None:
        """How many outputs a layer of these shapes has, if they tell; ValueError where they do not fit together."""
        return None

    @classmethod
    def refuse_alpha(cls, alpha: float, roles: Set[str]) -> None:
        """ValueError for an alpha that is below 0 or not finite."""
        what = ", below 0: set a negative strength" if alpha < 0 else ": train or convert the LoRA again"
        raise ValueError(f"alpha is {alpha}{what}")

    @classmethod
    def expanded(cls, parts: Mapping[str, Tensor]) -> int:
        """How many numbers reading a layer makes beside those of the file."""
        return 0

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None, wide: bool) -> Adapter:
        """A layer of a file; ValueError for values that are none.

        Args:
            name: of the layer.
            parts: role -> tensor, checked before by `check`; what is taken leaves it.
            alpha: None where the file has none.
            wide: whether the file gives the layer more inputs than the weight has.
        """
        held = [parts.pop(role, None) for role in cls.roles]
        make: Callable[..., Adapter] = cls
        return make(name, *held, alpha) if cls.alpha_counts else make(name, *held)

    @property
    def kind(self) -> str:
        """What reports call it."""
        return self.form

    @property
    def rank(self) -> int | None:
        """None where it has none."""
        return None

    @property
    def scale(self) -> float:
        """What its change is multiplied by beside the strength."""
        return 1.0

    @property
    def inner(self) -> Adapter:
        """The layer without what stands beside it."""
        return self

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """Whether it changes nothing whatever the weight; looks at which entries are zero and forms no product."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes, as far as its tensors tell; (out,) of OFT or a bias."""

    def fits(self, wanted: tuple[int, ...]) -> bool:
        """Whether it is a change of a weight of shape ``wanted``, and of the bias beside it."""
        return same(self.shape, wanted)

    def split(self) -> tuple[Adapter | None, Adapter | None]:
        """The change of the weight and that of the bias, each by itself."""
        return self, None

    def resolve(self, place: Place) -> Parts:
        """The parts of its change there, and what each is multiplied by at strength 1.

        All tensors are on the CPU and in the shape of the whole weight, in fp32; a LoRA's factors in the file's dtype.
        Raises GuardError for a rearrangement of the weight that is none.
        """
        parts, conv = self.change(place), place.spec.conv
        if conv is None or not conv.dense:
            return parts
        return tuple((part.as_weight(conv, place.original), scale) for part, scale in parts)

    @abstractmethod
    def change(self, place: Place) -> Parts:
        """`resolve` for every layer but a convolution that takes changes in the shape of its weight alone."""

    def does_nothing(self, parts: Parts, W0: Callable[[], Tensor]) -> bool:
        """Whether it changes nothing of W0, to rounding; ``parts`` are what `resolve` gave for it."""
        return self.is_zero

    def rescaled(self, scale: float, bias: bool) -> Adapter:
        """The same at another scale; ``bias``: that of the bias too."""
        raise TypeError(f"{self.kind} has no scale")

    def content(self, digest: Callable[[Tensor], str]) -> str:
        """All that it holds but its name in one line, tensors by a digest; an alpha equal to the rank is as none."""
        return f"{self.kind} {' '.join(self._values(digest))}"

    def _values(self, digest: Callable[[Tensor], str]) -> Iterator[str]:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield f"{field.name} {digest(value)}"
            elif isinstance(value, Adapter):
                yield from value._values(digest)
            elif field.name == "alpha":
                yield f"scale {self.scale if isinstance(self, Scaled) else value}"


class Scaled(Adapter):
    """A change of a weight that does not look at it, times alpha / rank."""

    alpha: float | None

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where the file gives no alpha, or there is no rank to divide it by."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def rescaled(self, scale: float, bias: bool) -> Adapter:
        changed: dict[str, Any] = {"alpha": scale * (self.rank or 1)}
        return replace(self, **changed)

    def change(self, place: Place) -> Parts:
        return ((place.weight(self.additive(place.shape)), self.scale),)

    @abstractmethod
    def additive(self, shape: tuple[int, ...]) -> Additive:
        """The change without its scale, of a slice of this shape (out in [k k])."""


@dataclass(frozen=True, eq=False)
class Beside(Adapter):
    """What a layer of another format has beside it."""

    base: Adapter

    @classmethod
    @abstractmethod
    def around(cls, base: Adapter, parts: dict[str, Tensor]) -> Adapter:
        """``base`` with those of its roles that are in ``parts``; what is taken leaves them."""

    @classmethod
    def check_beside(cls, shapes: Shapes, out: int | None) -> None:
        """ValueError where its tensors do not fit a layer of ``out`` outputs."""

    @property
    def rank(self) -> int | None:
        return self.base.rank

    @property
    def inner(self) -> Adapter:
        return self.base.inner

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rescaled(self, scale: float, bias: bool) -> Adapter:
        return replace(self, base=self.base.rescaled(scale, bias))
