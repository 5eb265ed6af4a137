"""The geometry of the threat models: Linf, L2 and L1 balls of perturbations, intersected with the image box [0, 1].

Each norm is one class with `project` (a point), `direction` (unit step of steepest ascent) and `norm`. The direction of L1 is
sparse; its argument `kept` is the number of coordinates to keep.
Linf and L2 follow Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (2020); L1 follows Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (2021).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, …, 1), to broadcast over the images `like`."""
    return value.view(-1, *[1] * (like.dim() - 1))


def _image_dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))


class Linf:
    """max_i |δ_i| ≤ eps."""

    name = "Linf"

    def project(self, x_new: Tensor, x: Tensor, eps: float) -> Tensor:
        """Return the nearest point to `x_new` (B, …) in the ball of radius `eps` around `x` (B, …) and in [0, 1]."""
        return self.projection(x, eps)(x_new)

    def projection(self, x: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
        """Return `project` with `x` and `eps` fixed, for many points: the bounds are computed once."""
        # x ± eps is rounded to the pixel's dtype. A bound that was rounded outwards is moved in by one unit in the last
        # place, so that |x_new − x| ≤ eps holds exactly for any eps.
        exact = x.double()
        lower, upper = (exact - eps).to(x.dtype), (exact + eps).to(x.dtype)
        lower = torch.where(exact - lower > eps, torch.nextafter(lower, x), lower).clamp_(min=0.0)
        upper = torch.where(upper - exact > eps, torch.nextafter(upper, x), upper).clamp_(max=1.0)
        return lambda x_new: torch.minimum(torch.maximum(x_new, lower), upper)

    def direction(self, grad: Tensor) -> Tensor:
        """Return the sign of the gradient (B, …), the unit step of steepest ascent."""
        return grad.sign()

    def norm(self, delta: Tensor) -> Tensor:
        """Return the norm of each sample: (B, …) → (B,)."""
        return delta.abs().amax(dim=_image_dims(delta))


class L2:
    """‖δ‖₂ ≤ eps."""

    name = "L2"

    def project(self, x_new: Tensor, x: Tensor, eps: float) -> Tensor:
        """Scale `x_new` (B, …) back onto the ball of radius `eps` around `x`, then clip to [0, 1] (which only shortens δ)."""
        delta = x_new - x
        length = _per_sample(self.norm(delta), x)
        return (x + delta * (eps / length.clamp(min=1e-12)).clamp(max=1.0)).clamp_(0.0, 1.0)

    def projection(self, x: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
        """Return `project` with `x` and `eps` fixed, for many points."""
        return partial(self.project, x=x, eps=eps)

    def direction(self, grad: Tensor) -> Tensor:
        """Return the gradient (B, …) divided by its norm."""
        return grad / (_per_sample(self.norm(grad), grad) + 1e-12)

    def norm(self, delta: Tensor) -> Tensor:
        """Return the norm of each sample: (B, …) → (B,)."""
        return torch.linalg.vector_norm(delta, dim=_image_dims(delta))


class L1:
    """‖δ‖₁ ≤ eps, with sparse steps."""

    name = "L1"

    def project(self, x_new: Tensor, x: Tensor, eps: float) -> Tensor:
        """Compute the exact Euclidean projection of `x_new` (B, …) onto the intersection of the L1 ball around `x` and [0, 1].

        The minimiser is δ_i = sign(u_i)·clip(|u_i| − λ, 0, c_i). Here u = x_new − x, c_i is the distance from x_i to the side of
        the box in the direction of u_i, and λ ≥ 0 is the smallest value with Σ|δ_i| ≤ eps (Croce & Hein 2021, Section 3). Σ|δ_i|
        is piecewise linear in λ with kinks at |u_i| (a coordinate starts to grow as λ falls) and |u_i| − c_i (it reaches the
        box). Sorting the 2n kinks and one cumulative sum therefore give λ without iteration. Sums use float64: over the 150,528
        coordinates of a 224-pixel image float32 loses the fourth digit of the radius.
        """
        u = (x_new - x).flatten(1).double()
        magnitude = u.abs()
        room = torch.where(u > 0, 1.0 - x.flatten(1).double(), x.flatten(1).double())
        kinks, order = torch.cat([magnitude, magnitude - room], dim=1).sort(dim=1, descending=True)
        slopes = torch.where(order < magnitude.shape[1], 1.0, -1.0).to(u.dtype).cumsum(dim=1)
        growth = slopes[:, :-1] * (kinks[:, :-1] - kinks[:, 1:])
        total = torch.cat([torch.zeros_like(growth[:, :1]), growth.cumsum(dim=1)], dim=1)  # Σ|δ_i| at λ = kinks
        # `total` never decreases; the radius is crossed in the segment that starts at the last kink whose total is ≤ eps.
        target = torch.full_like(total[:, :1], eps)
        start = (torch.searchsorted(total, target, right=True) - 1).clamp(max=total.shape[1] - 1)
        slope = slopes.gather(1, start).clamp(min=1.0)
        lam = kinks.gather(1, start) - (eps - total.gather(1, start)) / slope
        shrunk = torch.minimum((magnitude - lam.clamp(min=0.0)).clamp(min=0.0), room)
        delta = (u.sign() * shrunk).view_as(x).to(x.dtype)
        return (x + delta).clamp_(0.0, 1.0)

    def projection(self, x: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
        """Return `project` with `x` and `eps` fixed, for many points."""
        return partial(self.project, x=x, eps=eps)

    def direction(self, grad: Tensor, kept: Tensor) -> Tensor:
        """Return the sign of the `kept` (B,) int64 largest gradient coordinates (B, …), ties included, divided by their number."""
        magnitude = grad.abs().flatten(1)
        threshold = magnitude.sort(dim=1, descending=True).values.gather(1, (kept - 1).clamp(min=0).unsqueeze(1))
        sparse = grad.sign() * (grad.abs() >= _per_sample(threshold.squeeze(1), grad))
        return sparse / (_per_sample(self.norm(sparse), grad) + 1e-10)

    def norm(self, delta: Tensor) -> Tensor:
        """Return the norm of each sample: (B, …) → (B,)."""
        return delta.abs().sum(dim=_image_dims(delta))


THREAT_MODELS: dict[str, Linf | L2 | L1] = {t.name: t for t in (Linf(), L2(), L1())}


def get_threat_model(norm: str) -> Linf | L2 | L1:
    """Return the threat model called `norm`; raises a ValueError with the nearest name if there is none."""
    if norm not in THREAT_MODELS:
        nearest = difflib.get_close_matches(norm, THREAT_MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown norm {norm!r}: expected one of {', '.join(THREAT_MODELS)} (did you mean {nearest!r}?)"
        )
    return THREAT_MODELS[norm]
