"""Exponential moving average of the weights, kept on the training device."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.profiler import record_function


class EMA:
    """EMA of the whole state dict from the start of training: θ_ema ← d·θ_ema + (1 − d)·θ.

    Buffers of floating dtype are averaged too, other buffers are copied.

    Args:
        model: network to average; it is copied.
        decay: d.
        warmup: use min(d, (1 + step)/(10 + step)) instead, so that short runs are not mostly initial weights.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    @record_function("ema")
    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the EMA with the weights after optimiser step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name])
            else:
                average.copy_(current[name])
        # One kernel for many tensors; a Python loop of 500 small kernels would cost more than the optimiser.
        torch._foreach_lerp_(averages, values, 1 - decay)
