"""Means over seeds and paired differences, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

LEVEL = 0.95
Z95 = 1.96
RULE_OF_THREE = 3.0  # an event not seen in n images has a rate of at most 3 / n, at 95 % confidence


@dataclass(frozen=True)
class Mean:
    """Mean of one value in [0, 1] per seed; `sd` over seeds (n − 1), None for a single seed."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of paired differences, each in [−1, 1].

    Attributes:
        mean: mean of the differences.
        ci95: Student's t interval over seeds, for training with other seeds and the same images; None for one seed.
        ci95_images: normal interval over images, for other test images and the same networks; paired by image if verdicts are
            known, else binomial and unpaired; None if the number of images is unknown.
        seeds: number of pairs.
    """

    mean: float
    ci95: tuple[float, float] | None
    ci95_images: tuple[float, float] | None
    seeds: int


@dataclass(frozen=True)
class Value:
    """One metric of one network: a share in [0, 1] of `n` images, and (N,) 0 or 1 per image, if known."""

    share: float
    n: int
    images: np.ndarray | None = None


def mean_of(values: Sequence[float]) -> Mean:
    """Return mean and standard deviation of at least one value."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), sd, len(values))


def t_interval(values: Sequence[float], *, grain: float = 0.0) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean, None for fewer than two values.

    Values are multiples of `grain`. The standard deviation is at least that of the rounding, so equal values do not give a zero
    interval.
    """
    if len(values) < 2:
        return None
    spread = max(float(np.std(values, ddof=1)), grain / math.sqrt(12))
    mean, error = float(np.mean(values)), spread / math.sqrt(len(values))
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def paired(terms: Sequence[tuple[int, Mapping[int, Value]]]) -> Difference | None:
    """Return the sum of signed metrics, paired by seed: [(−1, a), (+1, b)] is the difference b − a.

    Args:
        terms: (sign, seed → value).

    Returns:
        None if no seed has all metrics.
    """
    seeds = sorted(set.intersection(*(set(values) for _, values in terms)))
    if not seeds:
        return None
    by_seed = [sum(sign * values[seed].share for sign, values in terms) for seed in seeds]
    counts = [values[seed].n for _, values in terms for seed in seeds]
    interval = t_interval(by_seed, grain=1 / min(counts) if all(counts) else 0.0)
    return Difference(float(np.mean(by_seed)), interval, _over_images(terms, seeds), len(seeds))


def _over_images(terms: Sequence[tuple[int, Mapping[int, Value]]], seeds: Sequence[int]) -> tuple[float, float] | None:
    values = [[v[seed] for seed in seeds] for _, v in terms]
    mean = sum(sign * float(np.mean([v.share for v in row])) for (sign, _), row in zip(terms, values))
    if not all(v.n for row in values for v in row):
        return None
    counts = {len(v.images) if v.images is not None else -1 for row in values for v in row}
    if len(counts) == 1 and counts != {-1}:
        by_image = sum(sign * np.mean([v.images for v in row], axis=0) for (sign, _), row in zip(terms, values))
        spread = float(np.std(by_image, ddof=1)) / math.sqrt(len(by_image)) if len(by_image) > 1 else 1.0
        error = max(spread, RULE_OF_THREE / Z95 / len(by_image))
    else:  # all seeds share the test images, so several seeds do not reduce the error
        shares = [float(np.mean([v.share for v in row])) for row in values]
        error = math.sqrt(sum(p * (1 - p) / min(v.n for v in row) for p, row in zip(shares, values)))
        error = max(error, RULE_OF_THREE / Z95 / min(v.n for row in values for v in row))
    return mean - Z95 * error, mean + Z95 * error
