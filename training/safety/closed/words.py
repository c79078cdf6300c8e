"""Words in: prompts of the concept and of what is kept, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ....modular_lora.options import OptionError

Tokens = Literal["all", "subject", "last"]
EMPTY = ""
PLACE = "{}"  # of the concept in a template


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the layers see of one prompt: the rows of one input, and where the prompt's own words are in them."""

    rows: Tensor  # tokens d, float64
    spans: tuple[tuple[int, int], ...]  # first row of the words, and the row behind them; () where that is not known


def span(tokens: Sequence[object], empty: Sequence[object]) -> tuple[int, int] | None:
    """Where a prompt's own tokens are among ``tokens``: what was put into the tokens of the ``empty`` prompt.

    No encoder's special tokens need be known for it. None for a prompt without a token of its own.
    """
    start = next((i for i, (a, b) in enumerate(zip(tokens, empty, strict=False)) if a != b), None)
    if start is None:
        if len(tokens) == len(empty):
            return None
        start = min(len(tokens), len(empty))
    for length in range(1, len(tokens) - start + 1):
        rest = list(tokens[start + length :])
        if rest == list(empty[start : start + len(rest)]):
            return start, start + length
    return start, len(tokens)


def pair(concept: Encoded, guide: Encoded, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """C and G (d n each): the concept's rows that count, and for each the guide's row that it is moved to.

    last: the last token of the words onto the guide's last (UCE; SPEED for one thing). subject: every token of the
    words onto the guide's at the same place, onto its last one where the guide has fewer. all: what comes behind the
    words as well (SPEED for nudity), where an encoder with attention has gathered what the prompt says. A pooled row is
    the whole prompt's.
    """
    n, known = len(concept.rows), bool(concept.spans and guide.spans)
    if tokens != "all" and not known and n > 1:
        raise OptionError(
            f"tokens {tokens}: where the words are among this text encoder's {n} rows is not known: use tokens all.",
            code="option.tokens",
        )
    if not known:
        places = list(zip(range(n), [min(i, len(guide.rows) - 1) for i in range(n)], strict=True))
    else:
        places = []
        for number, (first, behind) in enumerate(concept.spans):
            start, end = guide.spans[number]
            last = max(start, end - 1)
            if tokens == "last":
                places.append((behind - 1, last))
                continue
            places += [(i, min(start + i - first, last)) for i in range(first, behind)]
            if tokens == "all":
                until = n if number + 1 == len(concept.spans) else concept.spans[number + 1][0]
                length = len(guide.rows)
                places += [(i, min(end + i - behind, length - 1)) for i in range(behind, until)]
    at, onto = (list(column) for column in zip(*places, strict=True))
    return concept.rows[at].T, guide.rows[onto].T


def own(concept: Encoded, tokens: Tokens) -> Tensor:
    """C (d n): the concept's rows that count; see `pair`."""
    return pair(concept, concept, tokens)[0]


def held(kept: Encoded, tokens: Tokens) -> Tensor:
    """K (d m): the rows of a kept prompt that count."""
    if tokens == "all" or not kept.spans:
        return kept.rows.T
    if tokens == "last":
        return kept.rows[[max(first, behind - 1) for first, behind in kept.spans]].T
    return torch.cat([kept.rows[first:behind] for first, behind in kept.spans if behind > first] or [kept.rows[:0]]).T


def distinct(*columns: Tensor) -> list[int]:
    """Numbers of the columns, of matrices side by side (each d n, as float32), that no earlier column is equal to."""
    seen: dict[bytes, int] = {}
    for i, column in enumerate(torch.cat(columns).float().T.contiguous()):
        seen.setdefault(column.numpy().tobytes(), i)
    return sorted(seen.values())
