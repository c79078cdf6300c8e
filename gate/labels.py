"""The labels file of a classifier: JSON that says what its outputs mean and what it wants to see. See docs/gate.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..modular_lora.errors import one_line
from .errors import GateError

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr"]
Resize = Literal["stretch", "crop", "pad"]
Activation = Literal["softmax", "sigmoid", "none"]
KINDS = {str: "text", bool: "true or false", dict: "a JSON object"}
CHOICES = {"layout": Layout, "channels": Channels, "resize": Resize, "activation": Activation}


@dataclass(frozen=True)
class Labels:
    """One labels file; `read` makes it."""

    name: str
    licence: str
    labels: tuple[str, ...]  # in the order of the output
    size: tuple[int, int]  # height, width of the input
    activation: Activation  # what makes scores of the output; none: it holds scores already
    covers: str  # in words, for the report
    blind_to: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    layout: Layout = "nchw"
    channels: Channels = "rgb"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in the order of ``channels``, of pictures 0..1
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Resize = "stretch"
    output: str = ""  # "" for the first
    embedding: str = ""  # output to compare pictures by, "" for none
    exclusive: bool = False  # with activation none: the labels exclude each other and their scores sum to 1
    sha256: str = ""  # of the ONNX file that this file belongs to

    @property
    def excludes(self) -> bool:
        """Whether a picture has exactly one of the labels."""
        return self.activation == "softmax" or self.exclusive


def read(path: str | Path) -> Labels:
    """A labels file, checked. Raises GateError that names the key."""
    path = Path(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(f"{path.name}: cannot be read as JSON ({one_line(error)}): check the labels file.") from error
    try:
        return _parse(said)
    except _Wrong as error:
        raise GateError(f"{path.name}: {one_line(error)}: correct it (docs/gate.md).") from None


class _Wrong(ValueError):
    """A key and what is wrong with it."""


def _parse(said: Any) -> Labels:
    if not isinstance(said, dict):
        raise _Wrong("is not a JSON object")
    known = {f.name: f for f in fields(Labels)}
    if unknown := said.keys() - known.keys():
        raise _Wrong(f"unknown key {min(unknown)!r}")
    for name, f in known.items():
        if name not in said and f.default is MISSING and f.default_factory is MISSING:
            raise _Wrong(f"{name} is missing")
    labels = Labels(**{name: _value(name, value) for name, value in said.items()})
    _check(labels)
    return labels


def _value(name: str, value: Any) -> Any:
    """One key's value in the type of its field."""
    if name in CHOICES:
        if value not in get_args(CHOICES[name]):
            raise _Wrong(f"{name} is {value!r}, must be one of {', '.join(get_args(CHOICES[name]))}")
        return value
    if name == "exclusive":
        return _typed(name, value, bool)
    if name == "labels":
        return _words(name, value)
    if name == "groups":
        return {group: _words(f"groups.{group}", members) for group, members in _typed(name, value, dict).items()}
    if name in ("block", "report"):
        return {label: _number(f"{name}.{label}", least) for label, least in _typed(name, value, dict).items()}
    if name in ("mean", "std"):
        return tuple(_number(name, v) for v in _listed(name, value, 3))
    if name == "size":
        size = _listed(name, value, 2)
        if not all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= 4096 for v in size):
            raise _Wrong(f"size is {value!r}, must be [height, width] in pixels")
        return tuple(size)
    return _typed(name, value, str)


def _check(said: Labels) -> None:
    """What keys say of each other."""
    names = (*said.labels, *said.groups)
    if len(set(names)) < len(names):
        raise _Wrong("labels and groups hold a name twice")
    for group, members in said.groups.items():
        if missing := [m for m in members if m not in said.labels]:
            raise _Wrong(f"groups.{group} names {missing[0]!r}, which is no label")
    for key in ("block", "report"):
        for label, least in getattr(said, key).items():
            if label not in names:
                raise _Wrong(f"{key} names {label!r}, which is no label and no group")
            if not 0 < least <= 1:
                raise _Wrong(f"{key}.{label} is {least:g}, must be above 0 and at most 1")
    if not all(said.std):
        raise _Wrong("std holds a 0")
    if said.exclusive and said.activation != "none":
        raise _Wrong("exclusive is for activation none alone")


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Wrong(f"{name} is {value!r:.80}, must be {KINDS[kind]}")
    return value


def _listed(name: str, value: Any, length: int) -> list:
    if not isinstance(value, list) or len(value) != length:
        raise _Wrong(f"{name} is {value!r:.80}, must be a list of {length}")
    return value


def _words(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise _Wrong(f"{name} must be a list of words, at least one")
    if len(set(value)) < len(value):
        raise _Wrong(f"{name} holds a word twice")
    return tuple(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _Wrong(f"{name} is {value!r:.80}, must be a number")
    return float(value)
