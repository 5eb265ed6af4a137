"""Optimiser and weight-decay groups."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from training.config import TrainingConfig

ADAMW_BETAS = (0.9, 0.95)


def is_decayed(name: str, parameter: nn.Parameter, *, arch: str) -> bool:
    """Return whether weight decay applies to a parameter, by the published rule.

    For architectures named *convnext* or *resnet*, it applies to all parameters except those whose name contains `bn` or `.bias`
    (so LayerNorm weights and layer scale are decayed). For others: to all except one-dimensional parameters and `*.bias`.
    """
    if "convnext" in arch or "resnet" in arch:
        return "bn" not in name and ".bias" not in name
    return parameter.dim() > 1 and not name.endswith(".bias")


def parameter_groups(
    model: nn.Module, *, arch: str, weight_decay: float, head: Set[str] = frozenset(), body_factor: float = 1.0
) -> list[dict]:
    """Return two optimiser groups of the trainable parameters: with and without weight decay.

    If `body_factor` is not 1, return two groups for the parameters named in `head` and two for the others with that `lr_factor`.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for part, more in ((True, {}), (False, {"lr_factor": body_factor})) if body_factor != 1 else ((None, {}),):
        members = [(name, p) for name, p in trained if part is None or (name in head) == part]
        decayed = [p for name, p in members if is_decayed(name, p, arch=arch)]
        exempt = [p for name, p in members if not is_decayed(name, p, arch=arch)]
        groups += [
            {"params": decayed, "weight_decay": weight_decay, **more},
            {"params": exempt, "weight_decay": 0.0, **more},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, *, arch: str, training: TrainingConfig, head: Set[str] = frozenset(), body_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Build AdamW or SGD for the groups of `parameter_groups`; the learning rate is set at every step.

    The optimiser is fused: one kernel for all weights, and the device can skip a step.

    Raises:
        ValueError: `training.optimizer` is unknown.
    """
    groups = parameter_groups(model, arch=arch, weight_decay=training.weight_decay, head=head, body_factor=body_factor)
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, fused=True)
        if training.momentum:
            # torch does not initialise the momentum if the very first step is skipped; zeros give the same first step.
            for parameter in (p for group in groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=ADAMW_BETAS, fused=True)
    raise ValueError(f"training.optimizer: {training.optimizer!r} is unknown; expected adamw or sgd")
