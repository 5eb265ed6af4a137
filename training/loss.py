"""The loss of adversarial training for one micro-batch: the attack, then the forward pass of training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attacks.losses import cross_entropy
from attacks.registry import Attack
from training.state import TrainState

# Share of a micro-batch that may go through the network again. With APGD-2, 0 to 2 % of CIFAR-10's images have their highest loss
# before the last iterate.
AGAIN = 1 / 16


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
        return _loss_with_the_attacks_forward(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
    x = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step)
    return cross_entropy(state.parallel(x), y).mean()


def places_again(batch_size: int) -> int:
    """How many images of a micro-batch may go through the network again: the shape is fixed, so that it is compiled once."""
    return math.ceil(AGAIN * batch_size)


def _loss_with_the_attacks_forward(
    state: TrainState, x: Tensor, y: Tensor, *, attack: Attack, eps: float, on_attack_step: Callable | None
) -> Tensor:
    """The same, where the attack's evaluation of its last iterate is the forward pass of training.

    The few images whose best iterate is an earlier one go through the network again. If they are too many for the places kept
    for that, or a loss is not finite (its gradient is not, even times zero), all do, and the first pass is thrown away.
    """
    kept = {}

    def evaluate_last(x_last: Tensor) -> Tensor:
        kept["x"], kept["logits"] = x_last, state.parallel(x_last)
        return kept["logits"]

    x_best = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step, evaluate_last=evaluate_last)
    losses = cross_entropy(kept.pop("logits"), y)
    others = (x_best != kept.pop("x")).flatten(1).any(dim=1)
    count = int(torch.where(losses.isfinite().all(), others.sum(), len(y)))
    if count == 0:
        return losses.mean()
    places = places_again(len(y))
    if count > places:
        del losses
        return cross_entropy(state.parallel(x_best), y).mean()
    index = others.int().topk(places).indices
    again = cross_entropy(state.parallel(x_best[index]), y[index])
    return ((losses * ~others).sum() + (again * others[index]).sum()) / len(y)
