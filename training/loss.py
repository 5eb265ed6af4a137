"""The loss of adversarial training for one micro-batch: the attack, then the forward pass of training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attacks.losses import cross_entropy
from attacks.registry import Attack
from training.shortcuts import loss_reusing_forward
from training.state import TrainState


def training_loss(
    state: TrainState,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    eps: float,
    on_attack_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Mean cross-entropy on the attacked images, a scalar with its graph.

    Nothing is read back from the device unless `state.reuses_forward`: then one number is, for which the host waits.
    """
    if state.reuses_forward and attack.evaluates_last:
        return loss_reusing_forward(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
    x_adv = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step)
    return cross_entropy(state.parallel(x_adv), y).mean()
