"""Where a prompt's words are among its tokens, and which rows of concept, guide and kept prompts go together."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.training.safety.closed.everything_else import LISTS
from modular_lora_guard.training.safety.closed.words import Encoded, distinct, held, pair, span
from support.errors import refuses

START, END, PAD = 900, 901, 902


@pytest.mark.parametrize(
    ("tokens", "empty", "found"),
    [
        ([START, 1, 2, END, PAD, PAD], [START, END, PAD, PAD, PAD, PAD], (1, 3)),
        ([START, 1, 2, END, END, END], [START, END, END, END, END, END], (1, 3)),  # padded with the end token
        ([1, 2, END], [END], (0, 2)),
        ([7, 8, 1, 2, 3, 9, 6], [7, 8, 9, 6], (2, 5)),  # inside a chat template
        ([START, END, PAD], [START, END, PAD], None),
        ([START, 1, 2, 3], [START, END, PAD, PAD], (1, 4)),  # cut off
    ],
)
def test_the_words_are_what_was_put_into_the_empty_prompt(tokens, empty, found):
    assert span(tokens, empty) == found


def rows(n: int, spans, first: int) -> Encoded:
    """Rows that say their number: row i is (first + i, 1)."""
    values = torch.stack([first + torch.arange(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)], 1)
    return Encoded(values, spans)


def pairs(tokens: str, concept: Encoded, guide: Encoded) -> list[tuple[int, int]]:
    C, G = pair(concept, guide, tokens)
    return [(int(c), int(g) - 100) for c, g in zip(C[0], G[0], strict=True)]


def test_tokens_are_paired_as_the_papers_pair_them():
    concept, guide = rows(8, ((1, 4),), 0), rows(8, ((1, 3),), 100)
    assert pairs("last", concept, guide) == [(3, 2)]
    assert pairs("subject", concept, guide) == [(1, 1), (2, 2), (3, 2)]  # a guide of fewer words repeats its last
    assert pairs("all", concept, guide) == [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6)]
    empty = rows(8, ((1, 1),), 100)
    assert pairs("last", concept, empty) == [(3, 1)]
    assert pairs("subject", concept, empty) == [(1, 1), (2, 1), (3, 1)]
    assert pairs("all", concept, empty)[3:] == [(4, 1), (5, 2), (6, 3), (7, 4)]


def test_two_encoders_behind_each_other_have_words_in_both():
    concept, guide = rows(9, ((1, 3), (5, 7)), 0), rows(9, ((1, 2), (5, 6)), 100)
    assert pairs("last", concept, guide) == [(2, 1), (6, 5)]
    assert pairs("all", concept, guide) == [(1, 1), (2, 1), (3, 2), (4, 3), (5, 5), (6, 5), (7, 6), (8, 7)]
    assert held(concept, "last")[0].tolist() == [2, 6]
    assert held(concept, "subject")[0].tolist() == [1, 2, 5, 6]
    assert held(concept, "all")[0].tolist() == list(range(9))


def test_a_pooled_row_counts_whole_and_unknown_places_are_said():
    assert pairs("last", rows(1, (), 0), rows(1, (), 100)) == [(0, 0)]
    assert pairs("all", rows(3, (), 0), rows(2, (), 100)) == [(0, 0), (1, 1), (2, 1)]
    with refuses("option.tokens", "last", 3):
        pair(rows(3, (), 0), rows(3, (), 100), "last")


def test_a_column_counts_once():
    columns = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    assert distinct(columns) == [0, 1]
    assert distinct(columns, torch.tensor([[0.0, 0.0, 0.0, 5.0]])) == [0, 1, 3]


def test_lists_hold_thirty_prompts_each_and_all_of_them():
    lists = LISTS
    assert set(lists) == {"things", "people", "places", "styles", "all"}
    assert all(len(set(found)) == 30 for name, found in lists.items() if name != "all")
    assert set(lists["all"]) == {text for name, found in lists.items() if name != "all" for text in found}
