"""Catastrophic overfitting: the network learns to mask the training attack and loses its robustness."""

from __future__ import annotations

import math
from typing import Any

REMAINDER = 0.5  # share of the best robust accuracy below which it counts as lost
Z = 5.0  # standard errors by which it must have fallen
SHARED_FALL = 0.25  # largest part of that fall in which the accuracy under the training attack may take part


class OverfittingWatch:
    """Tells catastrophic overfitting from everything else that robust accuracy does, by two accuracies an epoch.

    In catastrophic overfitting of single-step attacks, accuracy under a multi-step attack falls to nearly 0 within an epoch or two,
    while accuracy under the training attack rises towards 1 (Wong, Rice & Kolter 2020; Andriushchenko & Flammarion 2020). Both
    halves must hold, against the epoch with the best accuracy under the stronger attack:

    - That accuracy is less than `REMAINDER` of the best, and lower by `Z` standard errors of the difference of two independent
      shares of `n` images; five, since the best is the luckiest of hundreds of epochs. Ordinary robust overfitting takes about
      five points of fifty on CIFAR-10, over many epochs (Rice, Wong & Kolter 2020).
    - Accuracy under the training attack fell by at most `SHARED_FALL` of that fall. In ordinary robust overfitting, and where
      training breaks down altogether, it falls with the other one.

    An accuracy within `Z` standard errors of guessing is no best: a constant network is "robust" at that level, and loses it by
    learning. So a run that never was robust gives no verdict.

    Args:
        chance: accuracy of guessing, 1 / classes.
        best: the attribute of the watch that this one goes on for.

    Attributes:
        best: epoch, strong and weak of the best epoch so far, plain values; None before the first.
    """

    def __init__(self, *, chance: float, best: dict[str, Any] | None = None) -> None:
        self.chance, self.best = chance, best

    def update(self, *, epoch: int, strong: float, weak: float, n: int) -> str | None:
        """Take in one validated epoch.

        Args:
            strong: share in [0, 1] of `n` images classified correctly under an attack stronger than the training attack.
            weak: the same under the training attack itself, at the same radius.

        Returns:
            None, or one sentence with the numbers at every epoch at which the network is overfitted.
        """
        above_chance = strong - self.chance > Z * _standard_error(self.chance, n=n)
        if above_chance and (self.best is None or strong > self.best["strong"]):
            self.best = {"epoch": epoch, "strong": strong, "weak": weak}
        if self.best is None:
            return None
        best = self.best
        fall = best["strong"] - strong
        noise = math.hypot(_standard_error(best["strong"], n=n), _standard_error(strong, n=n))
        lost = strong < REMAINDER * best["strong"] and fall > Z * noise
        if not lost or best["weak"] - weak > SHARED_FALL * fall:
            return None
        return (
            f"Catastrophic overfitting at epoch {epoch}: accuracy under the stronger attack fell from "
            f"{best['strong']:.1%} (epoch {best['epoch']}) to {strong:.1%}, while that under the training attack went from "
            f"{best['weak']:.1%} to {weak:.1%}."
        )


def _standard_error(share: float, *, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)
