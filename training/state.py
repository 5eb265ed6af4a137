"""All that training changes, in one object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from training.ema import EMA


@dataclass
class TrainState:
    """Model, average, optimiser, loss scaler and step.

    Attributes:
        model: the bare network (with its normaliser); attacks, EMA, validation and files use it.
        parallel: the same network as training calls it: wrapped for several processes, else `model` itself.
        optimizer, scaler: of torch; the scaler is disabled unless training runs in float16.
        ema: None without `model.model_ema`.
        step: optimiser steps done.
    """

    model: nn.Module
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    step: int = 0

    def networks(self) -> dict[str, nn.Module]:
        """The networks to validate and save: "raw", and "ema" where there is one."""
        return {"raw": self.model} | ({"ema": self.ema.model} if self.ema is not None else {})
