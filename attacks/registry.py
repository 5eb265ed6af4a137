"""The attacks that training can select by name.

To add one, write a function and an entry of `ATTACKS`; add new flags to `training.config.AdvConfig` too. The entry determines
the choices of `adv.attack`, rejected norms, idle flags and the run's name. Imports no PyTorch, because command lines import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attacks.norms import NORMS

if TYPE_CHECKING:
    from torch import Tensor

    from attacks.gradients import Model


@dataclass(frozen=True)
class AttackEntry:
    """One value of `adv.attack`.

    Attributes:
        build: flags `adv.*` → the attack itself, called as (model, x, y, eps=…) like `attacks.fgsm`. `y` may be soft labels, the
            model may be in training mode (`attacks.gradients.under_attack` restores everything) and autocast may be active.
            Random numbers come from PyTorch's default generator, which `train_step` seeds for each micro-batch.
        flags: names of all `adv.*` that `build` or the attack reads, besides norm and eps. With another attack they are idle:
            a warning says so, and they count neither for the run's name nor when it resumes.
        norms: the threat models that it supports; the command line rejects others.
        reports_steps: it accepts `on_step`, as in `attacks.apgd`, and calls it after each evaluation.
        evaluates_last: it accepts `evaluate_last`, as in `attacks.apgd`, and always calls it.
        passes: flags `adv.*` → how many forward passes and how many input gradients an image costs.
    """

    build: Callable[[Any], Callable[..., Tensor]]
    flags: tuple[str, ...] = ()
    norms: tuple[str, ...] = NORMS
    reports_steps: bool = False
    evaluates_last: bool = False
    passes: Callable[[Any], tuple[int, int]] = lambda adv: (0, 0)


# Attacks are imported only when they are built, because they import PyTorch.
def _none(adv: Any) -> Callable[..., Tensor]:
    return lambda model, x, y, *, eps: x


def _apgd(adv: Any) -> Callable[..., Tensor]:
    from attacks.apgd import apgd

    def run(model: Model, x: Tensor, y: Tensor, **call: Any) -> Tensor:
        return apgd(model, x, y, norm=adv.norm, n_iter=adv.n_iter, **call).x_best

    return run


def _fgsm(adv: Any) -> Callable[..., Tensor]:
    from attacks.fgsm import fgsm

    def run(model: Model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return fgsm(
            model,
            x,
            y,
            norm=adv.norm,
            eps=eps,
            alpha=adv.alpha,
            noise_level=adv.noise_level,
            skip_projection=adv.skip_projection,
        )

    return run


ATTACKS = {
    "none": AttackEntry(_none),
    "apgd": AttackEntry(
        _apgd,
        flags=("n_iter",),
        reports_steps=True,
        evaluates_last=True,
        passes=lambda adv: (adv.n_iter + 1, adv.n_iter),
    ),
    "fgsm": AttackEntry(
        _fgsm, flags=("alpha", "noise_level", "skip_projection"), norms=("Linf",), passes=lambda adv: (1, 1)
    ),
}


@dataclass(frozen=True)
class Attack:
    """Maps images (B, C, H, W) in [0, 1] and labels to the images to train on.

    They are within `eps` of the images and in [0, 1], unless the attack's flags say otherwise (`adv.skip_projection`).

    Attributes:
        run: the result of `AttackEntry.build`.
        reports_steps, evaluates_last: as in `AttackEntry`.
    """

    run: Callable[..., Tensor]
    reports_steps: bool
    evaluates_last: bool

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
        """Run the attack; `on_step` and `evaluate_last` are passed only to attacks that accept them."""
        taken = {"on_step": on_step} if self.reports_steps else {}
        taken |= {"evaluate_last": evaluate_last} if self.evaluates_last else {}
        return self.run(model, x, y, eps=eps, **taken)


def forward_equivalents(adv: Any, *, reused: bool = False) -> int:
    """Return what a training step with the flags `adv.*` costs, in forward passes of its images.

    A gradient of the input costs one, as a forward pass does, and a gradient of input and weights costs two.

    Args:
        reused: the attack's last forward pass is also that of training.
    """
    return sum(ATTACKS[adv.attack].passes(adv)) + 3 - reused


def build_attack(adv: Any) -> Attack:
    """Build the attack of the flags `adv.*`, given as any object with those attributes.

    Raises:
        KeyError: no attack has the name `adv.attack`.
    """
    entry = ATTACKS[adv.attack]
    return Attack(entry.build(adv), entry.reports_steps, entry.evaluates_last)
