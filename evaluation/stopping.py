"""How many images are enough: chunk by chunk, until the accuracy under every norm is known to a given precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.optimize import brentq
from scipy.special import betaln

ERROR = 0.05
METHOD = "beta-binomial mixture confidence sequence (Robbins 1970; Howard et al., Annals of Statistics 49, 2021)"


def anytime_interval(standing: int, n: int, *, points: float) -> tuple[float, float]:
    """95 % interval for the share of which `standing` of `n` images are a sample, valid however it was decided to stop at `n`.

    It holds each share p that a mixture of shares around p, chosen beforehand, does not make 20 times as likely as p itself does;
    by Ville's inequality the true share leaves it at any time with a probability of at most 5 %. The mixture is the one that
    makes the interval narrowest where it comes to `points` percentage points to each side.
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
    """Of `anytime_interval`, in percentage points."""
    low, high = anytime_interval(standing, n, points=points)
    return 50 * (high - low)


def chunks_enough(by_norm: Sequence[Mapping[int, Mapping[str, Any]]], *, points: float) -> int | None:
    """The smallest number of first chunks after which no norm's half-width is above `points`; None: more chunks are needed.

    It does not depend on the order in which chunks were finished.

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
