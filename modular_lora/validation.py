"""Settings checked by pydantic, and what it finds wrong as this pack says it: place, value, remedy."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from .errors import GuardError, one_line, plain, shown
from .util import plain_json

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # a whole number counts as a number, as in TOML
WORDS = {  # kind of error -> what must be there, as TOML and JSON name it; pydantic's own words for the others
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_too_short": "must not be empty",
    "string_type": "must be a text in quotes",
    "tuple_type": "must be a list",
    "value_error": "{error}",
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("dataclass_type", "dict_type", "mapping_type"), "must be a table of names and values"),
}
UNKNOWN = "unexpected_keyword_argument"

Place = tuple[str | int, ...]
T = TypeVar("T", bound=type)
Made = TypeVar("Made")


class Problem(NamedTuple):
    """Why settings cannot be made."""

    place: Place
    text: str  # a sentence that names the place, the value and the remedy
    code: str = "wrong-value"  # the end of the error's code; "unknown-key" and "missing-key" are the others


@functools.cache
def checks(cls: type[Made]) -> TypeAdapter[Made]:
    """Pydantic's checks of a dataclass: made when the first object is, not when ComfyUI starts."""
    return TypeAdapter(cls)


def raises(kind: type[GuardError]) -> Callable[[T], T]:
    """A decorator on top of ``dataclass``: values are checked by STRICT; one that does not fit raises ``kind``."""

    def decorate(cls: T) -> T:
        def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
            try:
                checks(cls).validator.validate_python(ArgsKwargs(args, kwargs), self_instance=self)
            except ValidationError as error:
                found = problem(cls, error)
                raise kind(found.text, code=f"{kind.code}.{found.code}") from None

        cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[misc]  # with the arguments of the dataclass's own
        return cls

    return decorate


def from_json(make: Callable[..., Made], path: str | Path, kind: type[GuardError], what: str, hint: str = "") -> Made:
    """What ``make`` makes of the keys and values of a JSON file.

    Args:
        make: Takes them by name and raises ``kind`` for one that does not fit.
        kind: The error that is raised.
        what: What the file is, for the error.
        hint: The end of an error of ``make``.

    Raises:
        GuardError: of ``kind``, naming the file and what is wrong in it.
    """
    path = Path(path)
    try:
        said = plain_json.read_object(path)
    except (OSError, ValueError) as error:
        why = f"{path.name}: cannot be read as JSON ({one_line(error)}): check the {what}."
        raise kind(why, code=f"{kind.code}.unreadable") from error
    try:
        return make(**said)
    except kind as error:
        raise kind(f"{path.name}: {one_line(error)}{hint}", code=error.code) from error


def problem(cls: type, error: ValidationError) -> Problem:
    """The first problem of a ``cls``.

    A key that does not exist comes first: a missing one is often the same key, mistyped.
    """
    found = min(error.errors(), key=lambda one: one["type"] != UNKNOWN)
    kind, place = found["type"], found["loc"]
    if kind in (UNKNOWN, "missing"):
        fields = _fields(cls, place[:-1])
        if kind == "missing":
            wanted = fields[str(place[-1])].metadata.get("description", "add it")
            return Problem(place, f"{dotted(place)} is missing: {wanted}.", "missing-key")
        near = difflib.get_close_matches(str(place[-1]), fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}."
        return Problem(place, f"{dotted(place)} does not exist: {hint}", "unknown-key")
    own = found["msg"].replace("Input should", "must", 1)
    words = WORDS[kind].format(**found.get("ctx", {})) if kind in WORDS else own
    return Problem(place, f"{dotted(place)} {words}, not {shown(found['input'])}: correct it.")


def dotted(place: Place) -> str:
    """``guard.required[1].sha256``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{plain(part)}" for part in place).lstrip(".")


def _fields(cls: type, place: Place) -> dict[str, dataclasses.Field]:
    """The fields of the dataclass at a place below ``cls``."""
    for name in place:
        if isinstance(name, str):
            hint = typing.get_type_hints(cls)[name]
            cls = next(iter(typing.get_args(hint)), hint)  # of a list of tables: the table
    return {f.name: f for f in dataclasses.fields(cls)}
