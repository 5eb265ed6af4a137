"""FGSM with a random start (Wong, Rice & Kolter 2020; noise and skipped projection as in N-FGSM, de Jorge et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.gradients import Model, evaluate_with_gradient, under_attack
from attacks.threat_models import get_threat_model


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "Linf",
    eps: float,
    alpha: float = 1.0,
    noise_level: float = 1.0,
    skip_projection: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take one signed gradient step from a random point: start uniform in ±noise_level·eps, step alpha·eps, project.

    Args:
        model: maps images (B, …) in [0, 1] to logits (B, K); runs in eval mode, its modes and gradients are restored.
        x: images (B, C, H, W) in [0, 1].
        y: class indices (B,) int64 or soft labels (B, K).
        norm: "Linf"; any other raises an error.
        eps: radius of the ball, in units of pixels in [0, 1]; positive.
        alpha: step length in units of eps.
        noise_level: half-width of the random start in units of eps; 0 for none.
        skip_projection: do not project the result, which may lie outside the ball and [0, 1] by design (N-FGSM).
        generator: of the random start, on the device of `x`.

    Returns:
        x_adv (B, C, H, W), float32 (float64 for float64 images).

    Raises:
        ValueError: norm is not Linf, eps ≤ 0 or noise_level < 0.
    """
    if norm != "Linf":
        raise ValueError(f"FGSM is defined for norm Linf only, got {norm!r}; use APGD for other norms")
    if not eps > 0 or noise_level < 0:
        raise ValueError(f"eps must be positive and noise_level at least 0, got eps {eps}, noise_level {noise_level}")
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator) * (noise_level * eps)
    start = x + noise
    with under_attack(model):
        _, _, grad = evaluate_with_gradient(model, start, y)
    threat = get_threat_model(norm)
    x_adv = start + alpha * eps * threat.direction(grad)
    return x_adv if skip_projection else threat.project(x_adv, x, eps)
