"""Where an audit's units are drawn: in this process, in processes of this machine, on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .plan import Origin, Painter, Unit

Check = Callable[[], None]  # raises to interrupt


class Crew(Protocol):
    """Painters at work; units are drawn in any order, each given out once."""

    origin: Origin  # the same of every painter, else GuardError
    replaced: int  # workers that died so far

    def draw(self, units: Sequence[Unit], check: Check) -> Iterator[tuple[Unit, np.ndarray]]:
        """Pictures b h w 3, uint8, unit by unit. Raises GuardError where a painter does, or what ``check`` raises."""


class Engine(Protocol):
    def open(self, check: Check) -> AbstractContextManager[Crew]:
        """A crew with one painter ready; what it started is ended with the context."""


@dataclass(frozen=True)
class PainterSpec:
    """How a worker opens its painter: ``function`` of ``module`` gives a context manager of a Painter."""

    module: str  # relative to the pack: "nodes.painter"
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # plain values


class Local:
    """One painter in this process."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    @contextmanager
    def open(self, check: Check) -> Iterator[Crew]:
        check()
        yield _LocalCrew(self.painter)


class _LocalCrew:
    replaced = 0

    def __init__(self, painter: Painter) -> None:
        self.painter, self.origin = painter, Origin.of(painter)

    def draw(self, units: Sequence[Unit], check: Check) -> Iterator[tuple[Unit, np.ndarray]]:
        for unit in units:
            check()
            yield unit, self.painter.draw(unit.arm, unit.items, unit.sampling)
