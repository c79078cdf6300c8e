"""What an audit's images show, with how sure that is.

Images of one concept resemble each other, and so do those of one training: they are no independent draws, and an
interval over images is far too narrow. The intervals of the verdict are therefore bootstraps over concepts and
training seeds, both drawn with replacement (Owen 2007, the pigeonhole bootstrap), each with all its images: 10,000
draws, seeded, the 2.5 and 97.5 % points. With few training seeds such an interval is still somewhat narrow, and where
no image is a hit, or all are, it is a point. One concept says nothing of others: its interval is all there is.
Wilson's interval over images and McNemar's test stand beside for description.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from ..gate.statistics import Rate, wilson
from .plan import Item
from .results import Drawn

DRAWS, SEED, TAIL = 10_000, 20_240_401, 0.025
TOGETHER = 1_000  # draws at a time: with a cluster a prompt of a large set, all of them would not fit into memory
Metric = Callable[[Drawn], bool]


def hit(one: Drawn) -> bool:
    """The suppressed concept is there."""
    return one.verdict.hit


def right_concept(one: Drawn) -> bool:
    """Collateral damage shows here: a kept concept is what the image shows."""
    return one.verdict.top == one.item.concept


def right_style(one: Drawn) -> bool:
    """Task fidelity."""
    return one.verdict.style == one.item.style


def cluster(one: Drawn) -> str:
    """What the bootstrap draws as one: the concept, of prompts without one the prompt."""
    return one.item.concept or one.item.prompt


@dataclass(frozen=True)
class Estimate:
    """The difference of two arms' rates with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """The ratio of two arms' rates with its 95 % interval.

    It is inf where its denominator alone is 0, and ``value`` None where both are. Of bootstrap draws with both at 0 any
    ratio is possible: they count as 0 for ``low`` and as inf for ``high``, and ``undefined`` says how many.
    """

    value: float | None
    low: float
    high: float
    undefined: int = 0


@dataclass(frozen=True)
class Paired:
    """The same items drawn by two arms, image by image."""

    n: int
    only_first: int  # McNemar's b
    only_second: int  # and c
    p: float  # exact McNemar; too small where images cluster, so for description only


@dataclass(frozen=True, eq=False)
class _Counts:
    """One arm: k of n images a training seed and cluster, both sorted."""

    seeds: tuple[int, ...]
    clusters: tuple[str, ...]
    k: np.ndarray  # seeds clusters, float64
    n: np.ndarray  # seeds clusters, float64

    @property
    def rate(self) -> float:
        return float(self.k.sum() / self.n.sum())

    @property
    def several(self) -> bool:
        """Whether there are clusters to draw from."""
        return len(self.clusters) > 1


def rates(drawn: Sequence[Drawn], metric: Metric = hit) -> dict[str, Rate]:
    """Arm by arm the rate with the bootstrap's interval, arms in the order they come in."""
    counts = {name: _count(some, metric) for name, some in _arms(drawn).items()}
    return {name: Rate(int(c.k.sum()), int(c.n.sum()), *_interval(c)) for name, c in counts.items()}


def wilson_rates(drawn: Sequence[Drawn], metric: Metric = hit) -> dict[str, Rate]:
    """The same rates with Wilson's interval over images, for description."""
    counted = {name: (sum(map(bool, map(metric, some))), len(some)) for name, some in _arms(drawn).items()}
    return {name: Rate(k, n, *wilson(k, n)) for name, (k, n) in counted.items()}


def by_cluster(drawn: Sequence[Drawn]) -> dict[str, dict[str, tuple[int, int]]]:
    """Cluster -> arm -> (k, n), training seeds together; clusters by name, arms in the order they come in."""
    rows = {name: dict.fromkeys(_arms(drawn), (0, 0)) for name in _clusters(drawn)}
    for one in drawn:
        k, n = rows[cluster(one)][one.arm.name]
        rows[cluster(one)][one.arm.name] = k + hit(one), n + 1
    return rows


def difference(drawn: Sequence[Drawn], first: str, second: str, metric: Metric = hit) -> Estimate:
    """Rate of arm ``first`` minus that of ``second``, with the same clusters in every bootstrap draw of both.

    Training seeds are drawn together where both arms have the same ones, and else for each arm on its own; an arm of
    one training has none to draw. Raises ValueError for an arm that is not there, and for arms of other concepts.
    """
    a, b = _both(drawn, first, second, metric)
    span = _span(_bootstrap(a) - _bootstrap(b)) if a.several else (-1.0, 1.0)
    return Estimate(a.rate - b.rate, *span)


def ratio(drawn: Sequence[Drawn], first: str, second: str, metric: Metric = hit) -> Ratio:
    """Rate of arm ``first`` over that of ``second``, drawn as for ``difference``; see Ratio for zeros."""
    a, b = _both(drawn, first, second, metric)
    value = a.rate / b.rate if b.rate else (math.inf if a.rate else None)
    if not a.several:
        return Ratio(value, 0.0, math.inf)
    drawn_a, drawn_b = _bootstrap(a), _bootstrap(b)
    empty = (drawn_a == 0) & (drawn_b == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn_a / drawn_b
    low, _ = _span(np.where(empty, 0.0, ratios))
    _, high = _span(np.where(empty, np.inf, ratios))
    return Ratio(value, low, high, int(empty.sum()))


def non_inferior(worse_by: Estimate, margin: float) -> bool:
    """Whether an arm is not worse than its reference by ``margin``, which was fixed before the images were drawn.

    ``worse_by`` is the difference in the direction that is worse: arm − reference for a rate of the suppressed concept.
    """
    if margin <= 0:
        raise ValueError(f"margin {margin}: non-inferiority needs one above 0")
    return worse_by.high < margin


def paired(drawn: Sequence[Drawn], first: str, second: str, metric: Metric = hit) -> Paired:
    """Images of two arms for the same item and training seed; an arm of one training is paired with every seed.

    Images without a partner are left out of ``n``. Raises ValueError for an arm that is not there.
    """
    a, b = (_outcomes(_arm(drawn, name), metric) for name in (first, second))
    if len(a) == 1 or len(b) == 1:
        matched = [(of_a, of_b) for of_a in a.values() for of_b in b.values()]
    else:
        matched = [(a[seed], b[seed]) for seed in a.keys() & b.keys()]
    pairs = [(of_a[item], of_b[item]) for of_a, of_b in matched for item in of_a.keys() & of_b.keys()]
    b_only, c_only = pairs.count((True, False)), pairs.count((False, True))
    p = float(binomtest(b_only, b_only + c_only).pvalue) if b_only + c_only else 1.0
    return Paired(len(pairs), b_only, c_only, p)


def _arms(drawn: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    arms: dict[str, list[Drawn]] = {}
    for one in drawn:
        arms.setdefault(one.arm.name, []).append(one)
    return arms


def _arm(drawn: Sequence[Drawn], name: str) -> list[Drawn]:
    arms = _arms(drawn)
    if name not in arms:
        raise ValueError(f"no images of arm {name!r}, only of {', '.join(arms)}")
    return arms[name]


def _clusters(drawn: Sequence[Drawn]) -> list[str]:
    """In an order that does not depend on the images' order, so that the bootstrap does not either."""
    return sorted({cluster(one) for one in drawn})


def _outcomes(drawn: Sequence[Drawn], metric: Metric) -> dict[int, dict[Item, bool]]:
    """Training seed -> item -> outcome."""
    found: dict[int, dict[Item, bool]] = {}
    for one in drawn:
        found.setdefault(one.arm.training_seed, {})[one.item] = bool(metric(one))
    return found


def _count(drawn: Sequence[Drawn], metric: Metric) -> _Counts:
    seeds, clusters = sorted({one.arm.training_seed for one in drawn}), _clusters(drawn)
    k, n = np.zeros((2, len(seeds), len(clusters)))
    rows, columns = {s: i for i, s in enumerate(seeds)}, {c: i for i, c in enumerate(clusters)}
    for one in drawn:
        place = rows[one.arm.training_seed], columns[cluster(one)]
        k[place] += bool(metric(one))
        n[place] += 1
    if not n.all():  # some bootstrap draw would have no image at all
        raise ValueError(f"arm {drawn[0].arm.name!r}: not every training seed has images of every concept")
    return _Counts(tuple(seeds), tuple(clusters), k, n)


def _both(drawn: Sequence[Drawn], first: str, second: str, metric: Metric) -> tuple[_Counts, _Counts]:
    a, b = (_count(_arm(drawn, name), metric) for name in (first, second))
    if a.clusters != b.clusters:
        raise ValueError(f"arms {first!r} and {second!r} have images of different concepts")
    return a, b


def _interval(counts: _Counts) -> tuple[float, float]:
    return _span(_bootstrap(counts)) if counts.several else (0.0, 1.0)


def _bootstrap(counts: _Counts) -> np.ndarray:
    """Rates of DRAWS draws; draw i has the same clusters for every arm, and the same seeds for arms of equal seeds."""
    of_clusters = np.random.default_rng(SEED)
    of_seeds = np.random.default_rng([SEED, zlib.crc32(repr(counts.seeds).encode())])
    drawn = [_some_draws(counts, of_clusters, of_seeds) for _ in range(DRAWS // TOGETHER)]
    return np.concatenate(drawn)


def _some_draws(counts: _Counts, of_clusters: np.random.Generator, of_seeds: np.random.Generator) -> np.ndarray:
    """TOGETHER rates, from how often each cluster and each seed is drawn."""
    seeds, clusters = counts.k.shape
    often = of_clusters.multinomial(clusters, np.full(clusters, 1 / clusters), TOGETHER).astype(float)
    seeds_often = of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), TOGETHER)
    k, n = ((often @ some.T * seeds_often).sum(1) for some in (counts.k, counts.n))
    return k / n


def _span(values: np.ndarray) -> tuple[float, float]:
    """The outer ones of the values around the 2.5 and 97.5 % points: no mean is taken, which inf would spoil."""
    low = np.quantile(values, TAIL, method="lower")
    return float(low), float(np.quantile(values, 1 - TAIL, method="higher"))
