"""Everything that training changes, in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.ema import EMA


@dataclass
class TrainState:
    """Model, EMA, optimiser, loss scaler and step.

    Attributes:
        model: the bare network (with its normaliser); attacks, EMA, validation and files use it.
        parallel: the same network as training calls it; `model` itself until `training.compiled.prepare_networks` compiles it, or
            wraps it for several processes.
        attacked: the same network as the attack calls it; `model` itself unless it is compiled.
        optimizer, scaler: torch objects; the scaler is disabled unless training runs in float16.
        ema: None without `model.model_ema`.
        frozen: modules without trained parameters; they stay in eval mode while the network trains.
        first_weights: file, key in it and SHA-256 of the start weights (`model.ckpt_path`); None without.
        step: optimiser steps done, including skipped ones.
        reuses_forward: whether the last evaluation of the attack is the forward pass of training (`training.step.training_loss`).
        statistics: running means and variances of batch normalisation, which a forward pass changes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    frozen: Sequence[nn.Module] = ()
    first_weights: Mapping[str, str] | None = None
    step: int = 0
    parallel: nn.Module = field(init=False)
    attacked: nn.Module = field(init=False)
    reuses_forward: bool = field(init=False, default=False)
    statistics: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parallel = self.attacked = self.model
        frozen = {part for module in self.frozen for part in module.modules()}
        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm) and module not in frozen]
        both = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        self.statistics = [buffer for buffer in both if buffer is not None]

    def train_mode(self) -> None:
        """Put the network into training mode, except the frozen modules."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks to validate and save: "raw", and "ema" if there is one."""
        return {"raw": self.model} | ({"ema": self.ema.model} if self.ema is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values by name. No RNG state: random numbers depend only on the step."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the output of `state_dict`, strictly.

        Raises:
            RuntimeError, ValueError, KeyError: it belongs to another network, optimiser or EMA setting.
        """
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError("only one of them has an EMA of the weights")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        if [group.keys() - {"params"} for group in state["optimizer"]["param_groups"]] != [
            group.keys() for group in own
        ]:
            raise ValueError("the optimiser differs")
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own):
            group.update(settings)  # keep this run's settings: resume_force may have changed, for example, weight decay
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # A fused optimiser reads all of them in memory order, channels_last or not.
                    moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
