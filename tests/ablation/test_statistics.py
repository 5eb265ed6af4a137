"""Means and paired differences, compared with SciPy and with known results."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from ablation.statistics import Value, mean_of, paired, t_interval


def values(*shares: float, n: int = 0, images=None) -> dict[int, Value]:
    return {seed: Value(share, n, images) for seed, share in enumerate(shares)}


def test_paired_interval_is_that_of_the_t_test() -> None:
    a, b = [0.31, 0.28, 0.35, 0.30], [0.36, 0.30, 0.36, 0.37]
    difference = paired([(-1, values(*a)), (1, values(*b))])
    expected = ttest_rel(b, a).confidence_interval(0.95)
    assert difference.ci95 == pytest.approx((expected.low, expected.high))
    assert difference.mean == pytest.approx(np.mean(b) - np.mean(a)) and difference.seeds == 4
    assert difference.ci95_images is None


def test_seeds_are_matched_and_missing_ones_omitted() -> None:
    a = {0: Value(0.1, 0), 1: Value(0.2, 0), 2: Value(0.9, 0)}
    b = {1: Value(0.25, 0), 0: Value(0.2, 0), 5: Value(0.0, 0)}
    difference = paired([(-1, a), (1, b)])
    assert (difference.mean, difference.seeds) == (pytest.approx(0.075), 2)
    assert paired([(-1, a), (1, {7: Value(0.1, 0)})]) is None


def test_one_seed_has_an_interval_over_images_alone() -> None:
    first, second = np.repeat([0.0, 1.0], [60, 40]), np.repeat([0.0, 1.0], [50, 50])
    difference = paired([(-1, values(0.4, n=100, images=first)), (1, values(0.5, n=100, images=second))])
    assert difference.ci95 is None and t_interval([0.1]) is None
    # Ten of a hundred images differ, all in the same direction.
    half = 1.96 * np.std(second - first, ddof=1) / 10
    assert difference.ci95_images == pytest.approx((0.1 - half, 0.1 + half))


def test_equal_verdicts_do_not_give_a_zero_interval() -> None:
    images = np.zeros(30)
    difference = paired([(-1, values(0.0, n=30, images=images)), (1, values(0.0, n=30, images=images))])
    assert difference.ci95_images == pytest.approx((-0.1, 0.1))


def test_equal_differences_of_seeds_do_not_give_a_zero_interval() -> None:
    difference = paired([(-1, values(0.2, 0.3, n=10)), (1, values(0.3, 0.4, n=10))])
    half = 12.7062 * 0.1 / np.sqrt(12) / np.sqrt(2)
    assert difference.ci95 == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)


def test_without_verdicts_the_images_count_as_unpaired() -> None:
    difference = paired([(-1, values(0.4, 0.4, n=100)), (1, values(0.5, 0.5, n=100))])
    half = 1.96 * np.sqrt(0.4 * 0.6 / 100 + 0.5 * 0.5 / 100)
    assert difference.ci95_images == pytest.approx((0.1 - half, 0.1 + half))


def test_images_interval_has_the_stated_coverage() -> None:
    """Two networks with accuracies of 30 % and 40 %, mostly on the same images; 400 test sets of 200 images."""
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        draw = generator.random(200)
        a, b = (draw < 0.3).astype(float), ((draw > 0.05) & (draw < 0.45)).astype(float)
        difference = paired([(-1, values(a.mean(), n=200, images=a)), (1, values(b.mean(), n=200, images=b))])
        low, high = difference.ci95_images
        inside += low <= 0.1 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_difference_of_differences() -> None:
    terms = [(-1, values(0.1, 0.2)), (1, values(0.4, 0.6)), (1, values(0.3, 0.3)), (-1, values(0.5, 0.4))]
    assert paired(terms).mean == pytest.approx(((0.3 - 0.2) + (0.4 - 0.1)) / 2)


def test_mean() -> None:
    found = mean_of([0.1, 0.2, 0.3])
    assert (found.mean, found.sd, found.n) == (pytest.approx(0.2), pytest.approx(0.1), 3)
    assert mean_of([0.1]).sd is None
