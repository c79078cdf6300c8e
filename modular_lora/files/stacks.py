"""LORA_STACK, by which packs hand LoRAs on: rows of (name, model strength, clip strength), and what else they send."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import GuardError, shown

_KEYS = {  # of a row that is a dict -> what it means
    **dict.fromkeys(("name", "lora_name", "lora", "file", "path"), "name"),
    **dict.fromkeys(("strength", "strength_model", "model_strength", "weight", "lora_strength"), "model"),
    **dict.fromkeys(("strength_clip", "clip_strength", "clipStrength", "strengthTwo"), "clip"),
    **dict.fromkeys(("block_weights",), "blocks"),
    **dict.fromkeys(("on", "enabled", "active"), "on"),
}
_WANTED = "a row is (name, strength), (name, model strength, clip strength), the same with block weights, or a dict"


@dataclass(frozen=True)
class Row:
    """One LoRA of a stack; ``place`` names it in errors."""

    place: str
    name: str
    model: float
    clip: float
    blocks: str = ""


def parse_stack(stack: object) -> tuple[Row, ...]:
    """The rows of a LORA_STACK; empty ones ("None", or switched off) are left out.

    A row has two to four entries, or is a dict with the names that packs use. Strengths may be text; a clip strength
    that is missing or None is the model's. Raises GuardError with row, value and remedy for anything else.
    """
    if stack is None or (isinstance(stack, str | list | tuple) and not stack):
        return ()
    if not isinstance(stack, list | tuple):
        raise GuardError(
            f"LORA_STACK is {_kind(stack)}, not a list of rows: connect a stacker's LORA_STACK output.",
            code="stack.no-list",
        )
    rows = [stack] if isinstance(stack[0], str) else stack  # one row, without the list around it
    return tuple(_parsed(rows))


def _parsed(rows: Sequence[object]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        place = f"LORA_STACK row {number}"
        said = _said(row, place)
        name, on = said.get("name"), said.get("on", True)
        if _is_empty(name) or on is False:
            continue
        if not isinstance(name, str | os.PathLike):
            raise GuardError(
                f"{place}: name {shown(name)} is {_kind(name)}, not a file's name: correct it.", code="stack.name"
            )
        model = _strength(said.get("model"), "strength", place)
        clip = model if said.get("clip") is None else _strength(said["clip"], "clip strength", place)
        blocks = said.get("blocks") or ""
        if not isinstance(blocks, str):
            raise GuardError(
                f"{place}: block weights {shown(blocks)} are not text: give them as '1,0.5,...' or leave out.",
                code="stack.blocks",
            )
        yield Row(place, os.fspath(name), model, clip, blocks)


def _said(row: object, place: str) -> dict[str, Any]:
    """What a row says, by meaning."""
    if isinstance(row, Mapping):
        said: dict[str, Any] = {}
        for key, value in row.items():
            if key in _KEYS:
                said.setdefault(_KEYS[key], value)
            elif isinstance(value, int | float) and not isinstance(value, bool):  # a strength under an unknown name
                raise GuardError(
                    f"{place}: {shown(key)} {shown(value)} is not known: use strength or clip_strength.",
                    code="stack.unknown-key",
                )
        return said
    if _is_empty(row) or (isinstance(row, list | tuple) and len(row) > 0 and _is_empty(row[0])):
        return {}
    if not isinstance(row, list | tuple) or not 2 <= len(row) <= 4:
        size = f" of {len(row)}" if isinstance(row, list | tuple) else ""
        raise GuardError(f"{place}: {shown(row)} is {_kind(row)}{size}: {_WANTED}.", code="stack.row")
    return dict(zip(("name", "model", "clip", "blocks"), row, strict=False))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in ("", "None"))


def _strength(value: object, what: str, place: str) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise GuardError(
            f"{place}: {what} {shown(value)} is not a finite number: give a number.", code="stack.strength"
        )
    return number


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
