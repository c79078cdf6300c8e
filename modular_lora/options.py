"""Options as frozen dataclasses: one definition, with help and default, for command line, TOML and nodes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import typing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from .errors import GuardError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


class OptionError(GuardError):
    """An option that does not exist, or a value that does not fit it."""

    code = "option"


def opt(default: Any, description: str, **limits: float) -> Any:
    """A dataclass field with its help text and pydantic's limits (gt, ge, lt, le, multiple_of)."""
    return field(default=default, metadata={"description": description, **limits})


def listed(value: Any) -> Any:
    """A list, or a single text or number, as a tuple; anything else as it is."""
    return (value,) if isinstance(value, str | int | float) else tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(listed)]
Numbers = Annotated[tuple[Annotated[float, Field(strict=False)], ...], BeforeValidator(listed)]  # texts of numbers too


def load(cls: type[T], config: Path | None = None, values: dict[str, Any] | None = None) -> T:
    """Options from a TOML file, overridden by ``values``; OptionError for an unknown key and a value that is none."""
    return cls(**(parse(config) if config else {}) | (values or {}))


def parse(config: str | Path) -> dict[str, Any]:
    """What a TOML file, or a text, says; OptionError where it is none."""
    try:
        text = config.read_text(encoding="utf-8-sig") if isinstance(config, Path) else config
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # the reader's own, and Python's for a number of many digits
        what = config if isinstance(config, Path) else "options"
        raise OptionError(
            f"{what}: cannot be read as TOML ({error}): write name = value, texts in quotes.", code="option.toml"
        ) from error


def toml_value(value: Any) -> str:
    """A text, path, number or truth value as TOML; JSON's texts are TOML's, but for U+007F."""
    value = value.as_posix() if isinstance(value, Path) else value
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """One ``--name`` an option, with its help and default; an absent one leaves the TOML's value."""
    for f, hint in _fields(cls):
        what: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['description']} ({f.default!r})".replace("%", "%%"),
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


_hints = functools.cache(typing.get_type_hints)


def hints(cls: type) -> dict[str, Any]:
    """The types of a class's options, each as its own module names it; they are read once."""
    return _hints(cls)


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    found = hints(cls)
    return [(f, found[f.name]) for f in dataclasses.fields(cls)]
