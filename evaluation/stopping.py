"""Stopping rule: evaluate chunks until the accuracy under every norm is known to a given precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.optimize import brentq
from scipy.special import betaln

ERROR = 0.05
METHOD = "beta-binomial mixture confidence sequence (Robbins 1970; Howard et al., Annals of Statistics 49, 2021)"


def anytime_interval(standing: int, n: int, *, points: float) -> tuple[float, float]:
    """Return a 95 % interval for the true share, given `standing` of `n` images; valid for every rule that decides when to stop.

    It contains each share p for which the data are less than 20 times as likely under a mixture of shares around p, fixed in
    advance, as under p. By Ville's inequality, the true share is ever outside with a probability of at most 5 %. The mixture is
    the one with the narrowest interval at a half-width of `points` percentage points.
    """
    fallen, weight = n - standing, 2_900 / points**2
    tiny = 1e-12

    def evidence(p: float) -> float:
        a, b = weight * p, weight * (1 - p)
        likely = standing * math.log(p) + fallen * math.log1p(-p)
        return betaln(standing + a, fallen + b) - betaln(a, b) - likely + math.log(ERROR)

    share = min(max(standing / n, tiny), 1 - tiny)
    low = brentq(evidence, tiny, share) if evidence(tiny) > 0 else 0.0
    high = brentq(evidence, share, 1 - tiny) if evidence(1 - tiny) > 0 else 1.0
    return low, high


def half_width(standing: int, n: int, *, points: float) -> float:
    """Return the half-width of `anytime_interval` in percentage points."""
    low, high = anytime_interval(standing, n, points=points)
    return 50 * (high - low)


def chunks_enough(by_norm: Sequence[Mapping[int, Mapping[str, Any]]], *, points: float) -> int | None:
    """Return the smallest number of first chunks after which every norm's half-width is at most `points`; None: not yet.

    The result does not depend on the order in which chunks finish.

    Args:
        by_norm: for each norm, the records of finished chunks by number.
    """
    standing, n = [0] * len(by_norm), [0] * len(by_norm)
    chunk = 0
    while all(chunk in records for records in by_norm):
        for i, records in enumerate(by_norm):
            broken_by = records[chunk]["broken_by"]
            standing[i] += broken_by.count("")
            n[i] += len(broken_by)
        chunk += 1
        if all(count and half_width(stood, count, points=points) <= points for stood, count in zip(standing, n)):
            return chunk
    return None
