"""Auto-PGD, the parameter-free attack used for adversarial training and quick evaluation.

Croce & Hein 2020 (Linf, L2: Algorithm 1 with momentum 0.75) and Croce & Hein 2021 (L1: sparse steps), as in the training code
of Singh, Croce & Hein 2023: no random start, cross-entropy on hard or soft labels, and the iterate of highest loss as result.
Differences from AutoAttack's APGD: one restart, and L1 starts with 5 % of the coordinates instead of 20 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.gradients import Model, evaluate, evaluate_with_gradient, judge, under_attack
from attacks.threat_models import L1, get_threat_model

MOMENTUM = 0.75
# Coordinates of an L1 perturbation below this are rounding errors, not part of the perturbation.
RESIDUE = 1e-9


@dataclass(frozen=True)
class APGDResult:
    """Result of an attack on B images.

    Attributes:
        x_best: (B, …) iterate of highest loss, used by training. In [0, 1] and within eps of the input.
        loss_best: (B,) its loss, never below the loss of the input.
        acc: (B,) bool, whether the image is classified correctly at the start and after every update.
        x_best_adv: (B, …) last misclassified iterate among the updates; the input if there is none.
    """

    x_best: Tensor
    loss_best: Tensor
    acc: Tensor
    x_best_adv: Tensor


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    n_iter: int,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    evaluate_last: Model | None = None,
) -> APGDResult:
    """Maximise the cross-entropy of `model` over the perturbations allowed by a threat model.

    Runs the model in eval mode with frozen parameters and restores its modes and gradients. Costs `n_iter + 1` forward passes
    (one of them `evaluate_last`, if given) and `n_iter` backward passes. Never reads a value back from the device. Autocast, if
    active, covers the model; the images keep their dtype (half-precision images are converted to float32).

    Args:
        model: maps images (B, …) in [0, 1] to logits (B, K).
        x: images (B, C, H, W) in [0, 1].
        y: class indices (B,) int64 or soft labels (B, K).
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of pixels in [0, 1]; positive.
        n_iter: number of updates, at least 1.
        on_step: called with (update 0 … n_iter, best loss (B,), still correct (B,)) after each evaluation; for logging.
        evaluate_last: evaluates the last iterate in place of `model`, with modes and gradients restored. It is the same
            function. The caller can use its logits and their graph afterwards, which saves training a forward pass.

    Raises:
        ValueError: unknown norm, eps ≤ 0 or n_iter < 1.
    """
    threat = get_threat_model(norm)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    search = _SparseSearch(x, eps, n_iter) if isinstance(threat, L1) else _Search(threat, x, eps, n_iter)
    report = on_step if on_step is not None else lambda *_: None
    with under_attack(model):
        search.start(*evaluate_with_gradient(model, x, y))
        report(0, search.loss_best, search.acc)
        for i in range(n_iter - 1):
            search.record(*evaluate_with_gradient(model, search.update(i), y))
            report(i + 1, search.loss_best, search.acc)
        x_last = search.update(n_iter - 1)
        search.forget_gradients()
        if evaluate_last is None:
            loss, correct = evaluate(model, x_last, y)
    if evaluate_last is not None:
        loss, correct = judge(evaluate_last(x_last), y)
    search.finish(loss, correct)
    report(n_iter, search.loss_best, search.acc)
    return APGDResult(search.x_best, search.loss_best, search.acc, search.x_best_adv)


class _Search:
    """State of the search for Linf and L2, including the fields of `APGDResult`.

    All decisions are masks on the device; only counters are Python numbers.
    """

    def __init__(self, threat, x: Tensor, eps: float, n_iter: int) -> None:
        self.threat, self.x, self.eps = threat, x, eps
        self.project = threat.projection(x, eps)
        self.x_adv = self.x_old = x
        self.step = self._first_step()
        self.interval = max(int(0.22 * n_iter), 1)
        self.shortest = max(int(0.06 * n_iter), 1)
        self.decrement = max(int(0.03 * n_iter), 1)
        self.since_checkpoint = 0

    def _first_step(self) -> Tensor:
        return torch.full((self.x.shape[0],), 2 * self.eps, dtype=self.x.dtype, device=self.x.device)

    def over_images(self, value: Tensor) -> Tensor:
        """Reshape (B,) to (B, 1, …, 1)."""
        return value.view(-1, *[1] * (self.x.dim() - 1))

    def start(self, loss: Tensor, correct: Tensor, grad: Tensor) -> None:
        """Set loss, correctness of the prediction and gradient at the input."""
        self.acc, self.x_best_adv = correct, self.x
        self.x_best, self.loss_best, self.grad, self.grad_best = self.x, loss, grad, grad
        self.loss_best_at_checkpoint = loss
        # The first update counts as a rise of the loss, and the first checkpoint as one after a halving of the step.
        self.loss_last = torch.full_like(loss, -torch.inf)
        self.rises = torch.zeros_like(loss)
        self.halved = torch.ones_like(loss, dtype=torch.bool)

    def update(self, i: int) -> Tensor:
        """Compute the next iterate."""
        ascent = self.over_images(self.step) * self.threat.direction(self.grad)
        z = self.project(self.x_adv + ascent)
        if i > 0:
            z = self.project(self.x_adv + MOMENTUM * (z - self.x_adv) + (1 - MOMENTUM) * (self.x_adv - self.x_old))
        self.x_old, self.x_adv = self.x_adv, z
        return z

    def record(self, loss: Tensor, correct: Tensor, grad: Tensor) -> None:
        """Record the same values at the iterate of the last update, keep the best, then adapt the step."""
        better = self.over_images(loss > self.loss_best)
        self.grad, self.grad_best = grad, torch.where(better, grad, self.grad_best)
        self.finish(loss, correct)
        self.rises = self.rises + (loss > self.loss_last)
        self.loss_last = loss
        self.since_checkpoint += 1
        if self.since_checkpoint == self.interval:
            self._checkpoint()

    def forget_gradients(self) -> None:
        """Free the gradients: no update follows, and the last evaluation needs the memory."""
        self.grad = self.grad_best = self.x_old = self.x

    def finish(self, loss: Tensor, correct: Tensor) -> None:
        """Record loss and correctness at the iterate of the last update and keep the best."""
        self.acc = self.acc & correct
        self.x_best_adv = torch.where(self.over_images(correct), self.x_best_adv, self.x_adv)
        better = loss > self.loss_best
        self.x_best = torch.where(self.over_images(better), self.x_adv, self.x_best)
        self.loss_best = torch.where(better, loss, self.loss_best)

    def _restart(self, where: Tensor) -> None:
        """Continue from the best iterate. `x_old` stays: the next momentum starts from the point before the last update."""
        images = self.over_images(where)
        self.x_adv = torch.where(images, self.x_best, self.x_adv)
        self.grad = torch.where(images, self.grad_best, self.grad)

    def _checkpoint(self) -> None:
        oscillates = self.rises <= 0.75 * self.interval
        stuck = ~self.halved & (self.loss_best_at_checkpoint >= self.loss_best)
        self.halved = oscillates | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self._restart(self.halved)
        self.loss_best_at_checkpoint = self.loss_best
        self.rises = torch.zeros_like(self.rises)
        self.interval = max(self.interval - self.decrement, self.shortest)
        self.since_checkpoint = 0


class _SparseSearch(_Search):
    """State of the search for L1: no momentum; the best perturbation determines how many coordinates a step changes."""

    def __init__(self, x: Tensor, eps: float, n_iter: int) -> None:
        super().__init__(get_threat_model("L1"), x, eps, n_iter)
        self.interval = max(int(0.04 * n_iter), 1)
        n = x[0].numel()
        self.kept = torch.full((x.shape[0],), -(-n // 20), dtype=torch.int64, device=x.device)  # 5 %, rounded up
        self.non_zeros = torch.full_like(self.kept, n)

    def _first_step(self) -> Tensor:
        return super()._first_step() / 2

    def update(self, i: int) -> Tensor:
        ascent = self.over_images(self.step) * self.threat.direction(self.grad, self.kept)
        self.x_adv = self.project(self.x_adv + ascent)
        return self.x_adv

    def _checkpoint(self) -> None:
        non_zeros = ((self.x_best - self.x).abs() > RESIDUE).flatten(1).sum(dim=1)
        sparser = non_zeros < 0.95 * self.non_zeros
        self.kept = (2 * non_zeros + 2) // 3  # non-zeros / 1.5, rounded up
        self.step = torch.where(sparser, self.eps, (self.step / 1.5).clamp(min=self.eps / 10))
        self._restart(sparser)
        self.non_zeros = non_zeros
        self.since_checkpoint = 0
