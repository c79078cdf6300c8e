"""The labels file of a classifier: JSON that says what its outputs mean and what it wants to see. See docs/gate.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..modular_lora.validation import from_json, raises
from .errors import GateError

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr"]
Resize = Literal["stretch", "crop", "pad"]
Activation = Literal["softmax", "sigmoid", "none"]


def _each_once(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or len(set(words)) < len(words):
        raise ValueError("must hold words, at least one, each once")
    return words


def _length(n: int) -> AfterValidator:
    def check(numbers: tuple[float, ...]) -> tuple[float, ...]:
        if len(numbers) != n:
            raise ValueError(f"must hold {n} numbers")
        return numbers

    return AfterValidator(check)


# Lists come as JSON gives them; what is in them is strict.
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False), AfterValidator(_each_once)]
Colour = Annotated[tuple[float, ...], Field(strict=False), _length(3)]
Size = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(strict=False), _length(2)]
Threshold = Annotated[float, Field(gt=0, le=1)]


@raises(GateError)
@dataclass(frozen=True)
class Labels:
    """One labels file; `read` makes it."""

    name: str
    licence: str
    labels: Words  # in the order of the output
    size: Size  # height, width of the input
    activation: Activation  # what makes scores of the output; none: it holds scores already
    covers: str  # in words, for the report
    blind_to: str
    groups: Mapping[str, Words] = field(default_factory=dict)
    block: Mapping[str, Threshold] = field(default_factory=dict)
    report: Mapping[str, Threshold] = field(default_factory=dict)
    layout: Layout = "nchw"
    channels: Channels = "rgb"
    mean: Colour = (0.0, 0.0, 0.0)  # in the order of ``channels``, of images 0..1
    std: Colour = (1.0, 1.0, 1.0)
    resize: Resize = "stretch"
    output: str = ""  # "" for the first
    embedding: str = ""  # output to compare images by, "" for none
    exclusive: bool = False  # with activation none: the labels exclude each other and their scores sum to 1
    sha256: str = ""  # of the ONNX file that this file belongs to

    def __post_init__(self) -> None:
        names = (*self.labels, *self.groups)
        _check(len(set(names)) == len(names), "labels and groups hold a name twice")
        for group, members in self.groups.items():
            for member in members:
                _check(member in self.labels, f"groups.{group} names {member!r}, which is not a label")
        for key in ("block", "report"):
            for label in getattr(self, key):
                _check(label in names, f"{key} names {label!r}, which is neither a label nor a group")
        _check(all(self.std), "std holds a 0")
        _check(not self.exclusive or self.activation == "none", "exclusive is for activation none alone")

    @property
    def excludes(self) -> bool:
        """Whether an image has exactly one of the labels."""
        return self.activation == "softmax" or self.exclusive


def _check(holds: bool, wrong: str) -> None:
    if not holds:
        raise GateError(f"{wrong}: correct it.", code="gate.wrong-value")


def read(path: str | Path) -> Labels:
    """A labels file, checked. Raises GateError that names the key."""
    return from_json(Labels, path, GateError, "labels file", " See docs/gate.md.")
