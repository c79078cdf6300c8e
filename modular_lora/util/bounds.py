"""Texts of bounded length, with the SHA-256 of the whole where they are cut: a request may hold any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

NAME = 120  # characters of a node's name or type in a sentence
TEXT = 4096  # characters of one text in a line
TEXTS = 32_768  # characters of all texts of a run
MOST_TEXTS = 256  # texts of a run that are named
MARK = 128  # characters for what a cut text says of the whole, so that it is not cut again


def cut(text: str, most: int = TEXT) -> str:
    """A text as it is or, where it is longer than ``most`` characters, its beginning, its length and its SHA-256."""
    if len(text) <= most + MARK:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:most]}… ({len(text)} characters, SHA-256 {digest})"


def bounded(value: Any) -> Any:
    """JSON values with every text in them cut."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, Mapping):
        return {cut(str(key)): bounded(entry) for key, entry in value.items()}
    return [bounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def texts(found: Sequence[str]) -> list[str]:
    """The texts of a run; of those for which there is no room in a line their number and the SHA-256."""
    kept, left = [], TEXTS
    for text in found[:MOST_TEXTS]:
        if left <= 0:
            break
        kept.append(cut(text))
        left -= len(kept[-1])
    if more := found[len(kept) :]:
        digest = hashlib.sha256("\0".join(more).encode("utf-8", "surrogatepass")).hexdigest()
        kept.append(f"… ({len(more)} more texts, SHA-256 of them with zero bytes between {digest})")
    return kept
