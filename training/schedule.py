"""Learning rate, image size and eps as functions of training progress. Facts: reference recipe of Singh et al. 2023.

A new schedule is a function and an entry of `SCHEDULES`. Imports no PyTorch: command lines read this file.
`lr` and `resolution` are those sections of flags (`training.config`), or any object with their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

START_SHARE = 1e-4  # of the peak: where cosine and cyclic begin
COSINE_END = 5e-6  # learning rate at which cosine ends, whatever its peak


def _cosine(epoch: int, lr: Any, epochs: int) -> float:
    """Up to the peak in a line, then half a cosine down."""
    if epoch < lr.lr_peak_epoch:
        return _warmup(epoch, lr)
    return COSINE_END + 0.5 * (lr.lr - COSINE_END) * (1 + math.cos(math.pi * _after_peak(epoch, lr, epochs)))


def _cyclic(epoch: int, lr: Any, epochs: int) -> float:
    """Up to the peak in a line, then down to 0 in a line."""
    return _warmup(epoch, lr) if epoch < lr.lr_peak_epoch else lr.lr * (1 - _after_peak(epoch, lr, epochs))


def _step(epoch: int, lr: Any, epochs: int) -> float:
    """Times `step_ratio` every `step_length` epochs; `lr_at` spreads each drop over the epoch before it."""
    return lr.lr * lr.step_ratio ** (epoch // lr.step_length)


def _warmup(epoch: int, lr: Any) -> float:
    return lr.lr * (START_SHARE + (1 - START_SHARE) * epoch / lr.lr_peak_epoch)


def _after_peak(epoch: int, lr: Any, epochs: int) -> float:
    """Share in [0, 1] of the way from the peak to the end."""
    return (epoch - lr.lr_peak_epoch) / max(epochs - lr.lr_peak_epoch, 1)


@dataclass(frozen=True)
class Schedule:
    """One value of `lr.lr_schedule_type`.

    Attributes:
        at_epoch: (epoch, flags `lr.*`, epochs of the run) → learning rate at the beginning of that epoch, 0 … epochs.
        flags: names of all `lr.*` that it reads, beside lr. With another schedule they are idle, as in `attacks.registry`.
    """

    at_epoch: Callable[[int, Any, int], float]
    flags: tuple[str, ...]


SCHEDULES = {
    "cosine": Schedule(_cosine, flags=("lr_peak_epoch",)),
    "step": Schedule(_step, flags=("step_ratio", "step_length")),
    "cyclic": Schedule(_cyclic, flags=("lr_peak_epoch",)),
}


def lr_at_epoch(epoch: int, *, lr: Any, epochs: int) -> float:
    """Learning rate at the beginning of `epoch` (0 … `epochs`, the latter being the end of training)."""
    return SCHEDULES[lr.lr_schedule_type].at_epoch(epoch, lr, epochs)


def lr_at(progress: float, *, lr: Any, epochs: int) -> float:
    """Learning rate at `progress` in epochs (0 ≤ progress ≤ epochs): by epoch, linear between two epochs."""
    epoch = min(int(progress), epochs - 1)
    begin, end = (lr_at_epoch(e, lr=lr, epochs=epochs) for e in (epoch, epoch + 1))
    return begin + (end - begin) * (progress - epoch)


def resolution_at_epoch(epoch: int, *, resolution: Any) -> int:
    """Training image size in pixels: `min_res` up to `start_ramp`, `max_res` from `end_ramp`, multiples of 32 between.

    Where both are the same, that one, whatever the ramp.
    """
    r = resolution
    if epoch <= r.start_ramp or r.min_res == r.max_res:
        return r.min_res
    if epoch >= r.end_ramp:
        return r.max_res
    share = (epoch - r.start_ramp) / (r.end_ramp - r.start_ramp)
    return round((r.min_res + (r.max_res - r.min_res) * share) / 32) * 32


def eps_at(progress: float, *, eps: float, warmup_epochs: float) -> float:
    """Radius at `progress` in epochs: linear from 0 to `eps` over the warm-up."""
    return eps if progress >= warmup_epochs else eps * progress / warmup_epochs
