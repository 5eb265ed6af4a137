"""Learning rate, image size and eps as functions of training progress. Facts: reference recipe of Singh et al. 2023."""

from __future__ import annotations

import math

from training.config import LRConfig, ResolutionConfig

LR_FLOOR = 5e-6  # where cosine ends
LR_START = 1e-4  # share of the peak at which cosine and cyclic begin


def lr_at_epoch(epoch: int, *, lr: LRConfig, epochs: int) -> float:
    """Learning rate at the beginning of `epoch` (0 … `epochs`, the latter being the end of training)."""
    if lr.lr_schedule_type == "step":
        return lr.lr * lr.step_ratio ** (epoch // lr.step_length)
    peak = lr.lr_peak_epoch
    if epoch < peak:
        return lr.lr * (LR_START + (1 - LR_START) * epoch / peak)
    progress = (epoch - peak) / max(epochs - peak, 1)
    if lr.lr_schedule_type == "cyclic":
        return lr.lr * (1 - progress)
    return LR_FLOOR + 0.5 * (lr.lr - LR_FLOOR) * (1 + math.cos(math.pi * progress))


def lr_at(progress: float, *, lr: LRConfig, epochs: int) -> float:
    """Learning rate at `progress` in epochs (0 ≤ progress ≤ epochs): by epoch, linear between two epochs."""
    epoch = min(int(progress), epochs - 1)
    begin, end = (lr_at_epoch(e, lr=lr, epochs=epochs) for e in (epoch, epoch + 1))
    return begin + (end - begin) * (progress - epoch)


def resolution_at_epoch(epoch: int, *, resolution: ResolutionConfig) -> int:
    """Training image size in pixels: `min_res` up to `start_ramp`, `max_res` from `end_ramp`, multiples of 32 between."""
    r = resolution
    if epoch <= r.start_ramp:
        return r.min_res
    if epoch >= r.end_ramp:
        return r.max_res
    share = (epoch - r.start_ramp) / (r.end_ramp - r.start_ramp)
    return round((r.min_res + (r.max_res - r.min_res) * share) / 32) * 32


def eps_at(progress: float, *, eps: float, warmup_epochs: float) -> float:
    """Radius at `progress` in epochs: linear from 0 to `eps` over the warm-up."""
    return eps if progress >= warmup_epochs else eps * progress / warmup_epochs
