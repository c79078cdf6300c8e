"""Options as frozen dataclasses: one definition, with help and default, for command line, TOML and nodes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import typing
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import GuardError

Scale = Literal["refuse", "tensors", "metadata"]  # of a safety LoRA whose tensors and metadata give two, see scales.py

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


class OptionError(GuardError):
    """An option that does not exist, or a value that does not fit it."""


def opt(default: Any, help: str) -> Any:
    """A dataclass field with its help text; sequences default to () and hold texts or floats."""
    return field(default=default, metadata={"help": help})


def load(cls: type[T], config: Path | None = None, values: dict[str, Any] | None = None) -> T:
    """Options from a TOML file, overridden by ``values``; OptionError for an unknown key (with the nearest known)."""
    found = (parse(config) if config else {}) | (values or {})
    known = {f.name: hint for f, hint in _fields(cls)}
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise OptionError(
                f"Option {name!r} does not exist: {f'did you mean {near[0]!r}?' if near else 'see --help.'}"
            )
    return cls(**{name: coerce(name, value, known[name]) for name, value in found.items()})


def parse(config: str | Path) -> dict[str, Any]:
    """What a TOML file, or a text, says; OptionError where it is none."""
    try:
        text = config.read_text(encoding="utf-8-sig") if isinstance(config, Path) else config
        return tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = config if isinstance(config, Path) else "options"
        raise OptionError(f"{what}: cannot be read as TOML ({error}): write name = value, texts in quotes.") from error


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type of option ``name``; OptionError where it is none."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise OptionError(f"{name}: {value!r} is none of {', '.join(map(repr, typing.get_args(hint)))}: choose one.")
    if typing.get_origin(hint) is tuple:
        return _list(name, [value] if isinstance(value, str | int | float) else value, typing.get_args(hint)[0])
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise OptionError(f"{name}: {value} is no finite number: correct it.")
    if type(value) is not hint:
        raise OptionError(f"{name}: {value!r} is a {type(value).__name__}, {hint.__name__} is needed: correct it.")
    return value


def _list(name: str, values: Any, hint: type) -> tuple:
    """A list of texts or, from numbers or texts of numbers, of floats."""
    if hint is float and isinstance(values, list | tuple):
        with suppress(ValueError, TypeError, OverflowError):
            if all(map(math.isfinite, numbers := tuple(map(float, values)))):
                return numbers
        raise OptionError(f"{name}: {values!r} is no list of numbers: give one, e.g. [0.5, 1.0].")
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise OptionError(f"{name}: {values!r} is no list of texts: give one, each in quotes.")
    return tuple(values)


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """One ``--name`` an option, with its help and default; an absent one leaves the TOML's value."""
    for f, hint in _fields(cls):
        what: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} ({f.default!r})".replace("%", "%%"),
        }
        if hint is bool:
            what["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            what |= {"choices": typing.get_args(hint), "type": type(typing.get_args(hint)[0])}
        elif typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            what |= {"nargs": "+", "type": item, "metavar": "TEXT" if item is str else "NUMBER"}
        else:
            what |= {"type": hint, "metavar": hint.__name__.upper()}
        parser.add_argument(f"--{f.name}", **what)


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]
