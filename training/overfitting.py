"""Catastrophic overfitting: the network learns to mask the training attack and loses its robustness."""

from __future__ import annotations

import math
from typing import Any

REMAINDER = 0.5  # robust accuracy below this share of the best one counts as lost
Z = 5.0  # it must have fallen by more than this number of standard errors
SHARED_FALL = 0.25  # largest fall of the accuracy under the training attack, as a share of that fall


class OverfittingWatch:
    """Detects catastrophic overfitting from two accuracies per epoch, and separates it from other changes of robust accuracy.

    In catastrophic overfitting of single-step attacks, accuracy under a multi-step attack falls to nearly 0 within an epoch or two,
    while accuracy under the training attack rises towards 1 (Wong, Rice & Kolter 2020; Andriushchenko & Flammarion 2020). Both
    conditions must hold, compared with the epoch with the best accuracy under the stronger attack:

    - That accuracy is less than `REMAINDER` of the best, and lower by `Z` standard errors of the difference of two independent
      shares of `n` images. `Z` is five because the best is the maximum of hundreds of epochs. Ordinary robust overfitting loses
      about five points of fifty on CIFAR-10, over many epochs (Rice, Wong & Kolter 2020).
    - Accuracy under the training attack fell by at most `SHARED_FALL` of that fall. In ordinary robust overfitting, and when
      training breaks down altogether, both accuracies fall.

    An accuracy within `Z` standard errors of chance does not count as best: a constant network is "robust" at that level, and
    loses this by learning. So a run that was never robust gives no verdict.

    Args:
        chance: accuracy of guessing, 1 / classes.
        best: attribute `best` of an earlier watch that this one continues.

    Attributes:
        best: epoch, strong and weak of the best epoch so far, plain values; None before the first.
    """

    def __init__(self, *, chance: float, best: dict[str, Any] | None = None) -> None:
        self.chance, self.best = chance, best

    def update(self, *, epoch: int, strong: float, weak: float, n: int) -> str | None:
        """Process one validated epoch.

        Args:
            strong: share in [0, 1] of `n` images classified correctly under an attack stronger than the training attack.
            weak: the same under the training attack itself, at the same radius.

        Returns:
            One sentence with the numbers for every epoch at which the network is overfitted, else None.
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
            f"{best['strong']:.1%} (epoch {best['epoch']}) to {strong:.1%}, while accuracy under the training attack changed "
            f"from {best['weak']:.1%} to {weak:.1%}."
        )


def _standard_error(share: float, *, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)
