"""What is exchanged inside of values, and what stays as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
from modular_lora_guard.comfy_host.values import exchange


class Model:
    """Stands for a MODEL."""


class Pair(NamedTuple):
    one: object
    other: object


class Pipe:
    def __init__(self, **parts: object):
        self.__dict__.update(parts)


@dataclass(frozen=True)
class Frozen:
    model: object


class Stubborn:
    def __init__(self, model: Model):
        self.model = model

    def __copy__(self):
        raise TypeError("no copies")


OLD, NEW = Model(), "new"


def changed(value: object) -> object:
    return exchange(value, lambda one: isinstance(one, Model), lambda some: {id(one): NEW for one in some})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (OLD, NEW),
        ([1, (OLD, "a")], [1, (NEW, "a")]),
        ({"a": {"b": [OLD]}}, {"a": {"b": [NEW]}}),
        (Pair(OLD, 2), Pair(NEW, 2)),
        (Frozen(OLD), Frozen(NEW)),
    ],
)
def test_it_is_exchanged_wherever_it_lies(value: object, expected: object) -> None:
    found = changed(value)
    assert found == expected
    assert type(found) is type(expected)


def test_what_held_it_is_copied_and_all_else_is_the_same_object() -> None:
    kept, pipe = [1, 2], Pipe(model=OLD, name="x")
    value = {"pipe": pipe, "kept": kept}
    found = changed(value)
    assert (found["pipe"].model, found["pipe"].name) == (NEW, "x")
    assert found["kept"] is kept
    assert pipe.model is OLD
    assert value["pipe"] is pipe
    assert changed(kept) is kept


def test_what_holds_itself_or_is_held_twice_stays_so() -> None:
    ring: list = [OLD]
    ring.append(ring)
    found = changed(ring)
    assert found[0] == NEW
    assert found[1] is found
    shared = Pipe(model=OLD)
    one, two = changed([shared, shared])
    assert one is two
    assert one.model == NEW


def test_what_cannot_be_copied_keeps_what_it_holds() -> None:
    value = Stubborn(OLD)
    assert changed([value, OLD]) == [value, NEW]
    assert value.model is OLD


def test_deep_and_broad_values_end() -> None:
    deep: object = OLD
    for _ in range(50):
        deep = [deep]
    assert changed(deep) is deep  # beyond the depth that is looked at
    wide = [[] for _ in range(200_000)]
    wide.append([OLD])
    assert changed(wide) is wide
