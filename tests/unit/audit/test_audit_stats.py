"""Intervals and tests of the audit: over concepts and training seeds, not over images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.audit import stats
from modular_lora_guard.audit.plan import Arm, Item
from modular_lora_guard.audit.results import Drawn, Verdict
from modular_lora_guard.audit.stats import Estimate, Ratio

QUICK = settings(max_examples=25, deadline=None)
CONCEPTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=8)


def images(arm: str, hits: list[list[bool]], training_seed: int = 0) -> list[Drawn]:
    """One list a concept."""
    made = []
    for concept, outcomes in enumerate(hits):
        for seed, hit in enumerate(outcomes):
            item = Item(f"a picture of {concept}", seed, "suppressed", f"concept {concept}")
            verdict = Verdict(hit, float(hit), (), "", "")
            made.append(Drawn(Arm(arm, training_seed=training_seed), item, Path(f"{seed}.png"), verdict))
    return made


def test_a_rate_counts_all_trainings_of_an_arm_and_lies_in_its_interval():
    drawn = images("task", [[True, False], [True, True]], 1) + images("task", [[False, False], [True, False]], 2)
    rate = stats.rates(drawn)["task"]
    assert (rate.k, rate.n) == (4, 8)
    assert 0 <= rate.low < rate.rate < rate.high <= 1
    assert stats.by_cluster(drawn) == {"concept 0": {"task": (1, 4)}, "concept 1": {"task": (3, 4)}}


@QUICK
@given(CONCEPTS)
def test_wilsons_interval_contains_the_rate(hits):
    rate = stats.wilson_rates(images("base", hits))["base"]
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


@QUICK
@given(st.integers(1, 5), st.integers(0, 5), st.integers(2, 8), st.integers(1, 3))
def test_the_interval_of_data_that_does_not_vary_is_a_point(misses, hits, concepts, trainings):
    one = [True] * hits + [False] * misses
    drawn = [d for seed in range(trainings) for d in images("base", [one] * concepts, seed)]
    rate = stats.rates(drawn)["base"]
    assert rate.low == rate.rate == rate.high


@QUICK
@given(CONCEPTS, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(hits, random):
    drawn = images("base", hits) + images("task", hits, 1) + images("task", [h[::-1] for h in hits], 2)
    shuffled = random.sample(drawn, len(drawn))
    assert stats.rates(shuffled) == stats.rates(drawn)
    assert stats.ratio(shuffled, "task", "base") == stats.ratio(drawn, "task", "base")
    assert stats.paired(shuffled, "task", "base") == stats.paired(drawn, "task", "base")


@QUICK
@given(CONCEPTS)
def test_an_arm_differs_from_itself_by_nothing_since_both_get_the_same_concepts_and_seeds(hits):
    reverse = [[not h for h in concept] for concept in hits]
    drawn = [d for arm in ("a", "b") for d in images(arm, hits, 1) + images(arm, reverse, 2)]
    assert stats.difference(drawn, "a", "b") == Estimate(0.0, 0.0, 0.0)
    assert stats.paired(drawn, "a", "b") == stats.Paired(2 * sum(map(len, hits)), 0, 0, 1.0)


@QUICK
@given(CONCEPTS, CONCEPTS)
def test_a_difference_turns_its_sign_with_its_arms(first, second):
    size = min(len(first), len(second))
    drawn = images("a", first[:size]) + images("b", second[:size])
    there, back = stats.difference(drawn, "a", "b"), stats.difference(drawn, "b", "a")
    assert there == Estimate(-back.value, -back.high, -back.low)


def test_trainings_of_different_seeds_are_drawn_for_each_arm_alone():
    """An arm whose trainings all agree and one whose trainings do not: the interval is that of the second."""
    varied = images("b", [[True], [True]], 1) + images("b", [[False], [False]], 2)
    alone = stats.difference(images("a", [[True], [True]], 7) + varied, "a", "b")
    assert (alone.low, alone.value, alone.high) == (0.0, 0.5, 1.0)


def test_one_concept_says_nothing_of_others():
    drawn = images("a", [[True, False]]) + images("b", [[False, False]])
    assert (stats.rates(drawn)["a"].low, stats.rates(drawn)["a"].high) == (0.0, 1.0)
    assert stats.difference(drawn, "a", "b") == Estimate(0.5, -1.0, 1.0)
    assert stats.ratio(drawn, "a", "b") == Ratio(math.inf, 0.0, math.inf)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[True], [True]], [[False], [False]], Ratio(math.inf, math.inf, math.inf)),
        ([[False], [False]], [[True], [True]], Ratio(0.0, 0.0, 0.0)),
        ([[False], [False]], [[False], [False]], Ratio(None, 0.0, math.inf, stats.DRAWS)),
    ],
)
def test_a_ratio_with_zeros_says_so(first, second, expected):
    assert stats.ratio(images("a", first) + images("b", second), "a", "b") == expected


def test_bootstrap_draws_without_a_hit_in_either_arm_widen_the_ratio_and_are_counted():
    hits = [[True], [False], [False]]
    found = stats.ratio(images("a", hits) + images("b", hits), "a", "b")
    assert (found.value, found.low, found.high) == (1.0, 0.0, math.inf)
    assert found.undefined == pytest.approx(stats.DRAWS * (2 / 3) ** 3, rel=0.05)


@QUICK
@given(CONCEPTS, CONCEPTS)
def test_no_estimate_is_nan(first, second):
    size = min(len(first), len(second))
    drawn = images("a", first[:size]) + images("b", second[:size])
    for found in (stats.difference(drawn, "a", "b"), stats.ratio(drawn, "a", "b")):
        assert not any(math.isnan(v) for v in (found.value or 0.0, found.low, found.high))
        assert found.low <= found.high


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth_where_images_cluster_and_wilson_does_not():
    """300 audits of 20 concepts × 10 images; a concept comes back always or hardly ever."""
    random = np.random.default_rng(7)
    held = {"bootstrap": 0, "wilson": 0}
    for _ in range(300):
        chance = random.choice([0.05, 0.95], size=20, p=[0.6, 0.4])
        drawn = images("a", (random.random((20, 10)) < chance[:, None]).tolist())
        for name, rates in (("bootstrap", stats.rates(drawn)), ("wilson", stats.wilson_rates(drawn))):
            held[name] += rates["a"].low <= 0.6 * 0.05 + 0.4 * 0.95 <= rates["a"].high
    assert held["bootstrap"] / 300 == pytest.approx(0.95, abs=0.05)
    assert held["wilson"] / 300 < 0.7


def test_non_inferiority_wants_the_whole_interval_below_the_margin():
    assert stats.non_inferior(Estimate(0.0, -0.02, 0.04), 0.05)
    assert not stats.non_inferior(Estimate(0.0, -0.02, 0.05), 0.05)
    with pytest.raises(ValueError):
        stats.non_inferior(Estimate(0.0, 0.0, 0.0), 0.0)


def test_pairs_are_images_of_one_item_and_an_arm_of_one_training_is_paired_with_every_other():
    base = images("base", [[True, True, False, False]])
    task = images("task", [[True, False, True, False]], 1) + images("task", [[False, False, False, False]], 2)
    found = stats.paired(base + task, "base", "task")
    assert (found.n, found.only_first, found.only_second) == (8, 3, 1)
    assert found.p == pytest.approx(0.625)  # 2 × P(X ≤ 1), X binomial of 4 at 1/2
    again = stats.paired(task + images("other", [[True] * 4], 2), "task", "other")
    assert (again.n, again.only_second) == (8, 6)


def test_arms_that_cannot_be_compared_are_refused():
    drawn = images("a", [[True], [False]]) + images("b", [[True]])
    with pytest.raises(ValueError, match=r"'c'.* a, b"):
        stats.difference(drawn, "a", "c")
    with pytest.raises(ValueError, match="different concepts"):
        stats.difference(drawn, "a", "b")
    with pytest.raises(ValueError, match="not every training seed"):
        stats.rates(drawn + images("b", [[True], [True]], 2))
