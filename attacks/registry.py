"""The attacks that training knows by name. A new one is a function and a line in `ATTACKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from attacks.apgd import apgd
from attacks.fgsm import fgsm
from attacks.gradients import Model


@dataclass(frozen=True)
class Attack:
    """Images (B, C, H, W) in [0, 1] and labels → the images to train on, within `eps` of them.

    Attributes:
        evaluates_last: whether it evaluates its last iterate, and can let the caller do that (`evaluate_last` of `attacks.apgd`).
    """

    run: Callable[..., Tensor]
    evaluates_last: bool = False

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
        evaluate_last: Model | None = None,
    ) -> Tensor:
        """`on_step` and `evaluate_last` as in `attacks.apgd`; attacks without several steps do without."""
        if not self.evaluates_last:
            return self.run(model, x, y, eps=eps)
        return self.run(model, x, y, eps=eps, on_step=on_step, evaluate_last=evaluate_last)


def _apgd(model: Model, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    return apgd(model, x, y, **settings).x_best


# Value of `adv.attack` → what makes the attack of the flags `adv.*`.
ATTACKS: dict[str, Callable[[Any], Attack]] = {
    "none": lambda adv: Attack(lambda model, x, y, eps: x),
    "apgd": lambda adv: Attack(partial(_apgd, norm=adv.norm, n_iter=adv.n_iter), evaluates_last=True),
    "fgsm": lambda adv: Attack(
        partial(
            fgsm,
            norm=adv.norm,
            alpha=adv.alpha,
            noise_level=adv.noise_level,
            skip_projection=adv.skip_projection,
        )
    ),
}


def build_attack(adv: Any) -> Attack:
    """The attack of the flags `adv.*`: any object with those attributes.

    Raises:
        KeyError: no attack has the name `adv.attack`.
    """
    return ATTACKS[adv.attack](adv)
