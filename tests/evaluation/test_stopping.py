"""Enough images: the interval holds however one stops, and where one stops does not depend on the order of work."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.stopping import anytime_interval, chunks_enough, half_width


@pytest.mark.parametrize("share", [0.03, 0.5, 0.8])
def test_the_share_leaves_the_interval_of_no_stopping_time(share: float) -> None:
    """Looked at again and again, an interval for a fixed number of images misses the share far more often than in 5 % of cases."""
    generator, looks, missed, missed_by_wilson = np.random.RandomState(0), range(200, 2001, 200), 0, 0
    for _ in range(80):
        standing = np.cumsum(generator.rand(2000) < share)
        intervals = [anytime_interval(int(standing[n - 1]), n, points=5.0) for n in looks]
        missed += any(not low <= share <= high for low, high in intervals)
        wilson = [binomtest(int(standing[n - 1]), n).proportion_ci(0.95, method="wilson") for n in looks]
        missed_by_wilson += any(not interval.low <= share <= interval.high for interval in wilson)
    assert missed / 80 <= 0.05 < missed_by_wilson / 80


def test_ends_of_the_interval_are_20_times_as_likely_under_the_mixture() -> None:
    n, standing, weight = 400, 130, 2_900 / 9
    for p in anytime_interval(standing, n, points=3.0):
        a, b = weight * p, weight * (1 - p)
        beta = [math.lgamma(s + a) + math.lgamma(n - s + b) - math.lgamma(n + a + b) for s in (standing,)]
        prior = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        plain = standing * math.log(p) + (n - standing) * math.log(1 - p)
        assert math.exp(beta[0] - prior - plain) == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 5000])
def test_none_and_all(n: int) -> None:
    low, high = anytime_interval(0, n, points=1.0)
    assert low == 0.0 < high <= 1.0
    assert anytime_interval(n, n, points=1.0) == pytest.approx((1 - high, 1.0), abs=1e-9)


def test_images_that_one_point_takes() -> None:
    """README says so many."""
    assert half_width(11_550, 23_100, points=1.0) <= 1.0 < half_width(11_450, 22_900, points=1.0)


def records(*chunks: str) -> dict[int, dict[str, Any]]:
    """One chunk a text, one image a letter: s(tanding) or b(roken)."""
    return {
        i: {"broken_by": ["" if letter == "s" else "apgd-ce" for letter in chunk]} for i, chunk in enumerate(chunks)
    }


def test_stops_after_the_smallest_number_of_first_chunks() -> None:
    generator = random.Random(0)
    chunks = ["".join(generator.choice("sb") for _ in range(10)) for _ in range(40)]
    enough = chunks_enough([records(*chunks)], points=15.0)
    assert enough is not None and 1 < enough < 40
    assert chunks_enough([records(*chunks[:enough])], points=15.0) == enough
    assert chunks_enough([records(*chunks[: enough - 1])], points=15.0) is None
    later = records(*chunks)
    del later[0]
    assert chunks_enough([later], points=15.0) is None  # others were faster than the first chunk


def test_every_norm_has_to_be_known_well() -> None:
    sure, unsure = records(*["ssssssssss"] * 30), records(*["sbsbsbsbsb"] * 30)
    alone = chunks_enough([sure], points=12.0)
    both = chunks_enough([sure, unsure], points=12.0)
    assert alone < both == chunks_enough([unsure], points=12.0)


def test_chunks_without_a_readable_image_say_nothing() -> None:
    assert chunks_enough([records("", "s")], points=60.0) == 2
