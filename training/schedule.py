"""Learning rate, image size and eps as functions of training progress. Source: reference recipe of Singh et al. 2023.

To add a schedule, write a function and add it to `SCHEDULES`. This module does not import PyTorch, because command lines read it.
`lr` and `resolution` are those sections of flags (`training.config`), or any object with their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

START_SHARE = 1e-4  # start value of cosine and cyclic, as a share of the peak
COSINE_END = 5e-6  # learning rate at the end of cosine, for any peak


def _cosine(epoch: int, lr: Any, epochs: int) -> float:
    """Return a linear warm-up to the peak, then half a cosine."""
    if epoch < lr.lr_peak_epoch:
        return _warmup(epoch, lr)
    return COSINE_END + 0.5 * (lr.lr - COSINE_END) * (1 + math.cos(math.pi * _after_peak(epoch, lr, epochs)))


def _cyclic(epoch: int, lr: Any, epochs: int) -> float:
    """Return a linear warm-up to the peak, then a linear decay to 0."""
    return _warmup(epoch, lr) if epoch < lr.lr_peak_epoch else lr.lr * (1 - _after_peak(epoch, lr, epochs))


def _step(epoch: int, lr: Any, epochs: int) -> float:
    """Multiply by `step_ratio` every `step_length` epochs; `lr_at` spreads each reduction over the epoch before it."""
    return lr.lr * lr.step_ratio ** (epoch // lr.step_length)


def _warmup(epoch: int, lr: Any) -> float:
    return lr.lr * (START_SHARE + (1 - START_SHARE) * epoch / lr.lr_peak_epoch)


def _after_peak(epoch: int, lr: Any, epochs: int) -> float:
    """Return the progress from the peak to the end, in [0, 1]."""
    return (epoch - lr.lr_peak_epoch) / max(epochs - lr.lr_peak_epoch, 1)


@dataclass(frozen=True)
class Schedule:
    """One value of `lr.lr_schedule_type`.

    Attributes:
        at_epoch: (epoch, flags `lr.*`, epochs of the run) → learning rate at the beginning of that epoch, 0 … epochs.
        flags: names of all `lr.*` flags that it reads, besides lr. They have no effect with another schedule.
    """

    at_epoch: Callable[[int, Any, int], float]
    flags: tuple[str, ...]


SCHEDULES = {
    "cosine": Schedule(_cosine, flags=("lr_peak_epoch",)),
    "step": Schedule(_step, flags=("step_ratio", "step_length")),
    "cyclic": Schedule(_cyclic, flags=("lr_peak_epoch",)),
}


def lr_at_epoch(epoch: int, *, lr: Any, epochs: int) -> float:
    """Return the learning rate at the beginning of `epoch` (0 … `epochs`, where `epochs` is the end of training)."""
    return SCHEDULES[lr.lr_schedule_type].at_epoch(epoch, lr, epochs)


def lr_at(progress: float, *, lr: Any, epochs: int) -> float:
    """Return the learning rate at `progress` in epochs (0 ≤ progress ≤ epochs), linear between two epochs."""
    epoch = min(int(progress), epochs - 1)
    begin, end = (lr_at_epoch(e, lr=lr, epochs=epochs) for e in (epoch, epoch + 1))
    return begin + (end - begin) * (progress - epoch)


def resolution_at_epoch(epoch: int, *, resolution: Any) -> int:
    """Return the training image size in pixels: `min_res` up to `start_ramp`, `max_res` from `end_ramp`, multiples of 32 between.

    If `min_res` and `max_res` are equal, the ramp has no effect.
    """
    r = resolution
    if epoch <= r.start_ramp or r.min_res == r.max_res:
        return r.min_res
    if epoch >= r.end_ramp:
        return r.max_res
    share = (epoch - r.start_ramp) / (r.end_ramp - r.start_ramp)
    return round((r.min_res + (r.max_res - r.min_res) * share) / 32) * 32


def eps_at(progress: float, *, eps: float, warmup_epochs: float) -> float:
    """Return the radius at `progress` in epochs: linear from 0 to `eps` over the warm-up."""
    return eps if progress >= warmup_epochs else eps * progress / warmup_epochs
