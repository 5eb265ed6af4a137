"""Projections compared with an independent solver, directions and norms with their definitions."""

from __future__ import annotations

import pytest
import torch

from attacks.norms import DEFAULT_EPS, odd_radius
from attacks.threat_models import THREAT_MODELS, get_threat_model


def points(dtype=torch.float64, n=4, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 5, generator=generator, dtype=torch.float64)
    x[0, 0], x[0, 1] = 0.0, 1.0
    x_new = x + spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), x_new.to(dtype)


def l1_by_bisection(x_new, x, eps):
    """Project with δ(λ) = clip(soft-threshold(u, λ), box) by bisection on λ, independently of the implementation."""
    u = x_new - x
    low, high = torch.zeros(len(x), dtype=x.dtype), u.abs().flatten(1).amax(dim=1)

    def delta(lam):
        shrunk = u.sign() * (u.abs() - lam.view(-1, 1, 1, 1)).clamp(min=0)
        return (x + shrunk).clamp(0, 1) - x

    inside = delta(low).abs().flatten(1).sum(1) <= eps
    for _ in range(200):
        middle = (low + high) / 2
        too_long = delta(middle).abs().flatten(1).sum(1) > eps
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    return x + delta(torch.where(inside, torch.zeros_like(high), high))


@pytest.mark.parametrize("spread", [0.01, 0.5, 5.0])
@pytest.mark.parametrize("eps", [0.3, 3.0, 12.0, 60.0])
def test_l1_projection_equals_bisection(eps, spread):
    x, x_new = points(spread=spread)
    torch.testing.assert_close(
        get_threat_model("L1").project(x_new, x, eps), l1_by_bisection(x_new, x, eps), atol=1e-10, rtol=0
    )


def test_l1_projection_leaves_zero_coordinates_exact():
    x, x_new = points(torch.float32)
    projected = get_threat_model("L1").project(x_new, x, 1.0)
    assert ((projected == x).flatten(1).sum(1) > 40).all()


def test_linf_projection():
    x, x_new = points()
    expected = torch.minimum(torch.maximum(x_new, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(get_threat_model("Linf").project(x_new, x, 0.1), expected, atol=1e-15, rtol=0)


def test_linf_ball_holds_exactly_in_float32():
    x, x_new = points(torch.float32, n=64, spread=5.0)
    for eps in (1 / 255, 4 / 255, 8 / 255, 1e-4):
        delta = get_threat_model("Linf").project(x_new, x, eps).double() - x.double()
        assert delta.abs().max() <= eps


def test_l2_projection_is_ball_then_box():
    x, x_new = points()
    u = x_new - x
    length = u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = torch.where(length > 1, x + u / length, x_new).clamp(0, 1)
    torch.testing.assert_close(get_threat_model("L2").project(x_new, x, 1.0), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", THREAT_MODELS)
def test_points_inside_stay(norm):
    x, x_new = points(spread=0.001)
    inside = x_new.clamp(0, 1)
    torch.testing.assert_close(get_threat_model(norm).project(inside, x, 1.0), inside, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm,order", [("Linf", torch.inf), ("L2", 2), ("L1", 1)])
def test_norms(norm, order):
    x, x_new = points()
    expected = torch.linalg.vector_norm((x_new - x).flatten(1), ord=order, dim=1)
    torch.testing.assert_close(get_threat_model(norm).norm(x_new - x), expected)


def test_l1_direction_keeps_the_largest_and_ties():
    grad = torch.tensor([[3.0, -2.0, 2.0, 1.0, 0.0, 0.5]]).view(1, 1, 2, 3)
    direction = get_threat_model("L1").direction
    torch.testing.assert_close(direction(grad, torch.tensor([1])).flatten(), torch.tensor([1.0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(direction(grad, torch.tensor([2])).flatten(), torch.tensor([1.0, -1, 1, 0, 0, 0]) / 3)
    torch.testing.assert_close(direction(grad, torch.tensor([4])).flatten(), torch.tensor([1.0, -1, 1, 1, 0, 0]) / 4)
    assert torch.equal(direction(torch.zeros(1, 1, 2, 3), torch.tensor([2])), torch.zeros(1, 1, 2, 3))


@pytest.mark.parametrize("norm", THREAT_MODELS)
def test_large_images_in_float32_stay_in_the_ball(norm):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 224, 224, generator=generator)
    x_new = x + 0.3 * torch.randn(x.shape, generator=generator)
    eps = {"Linf": 4 / 255, "L2": 2.0, "L1": 75.0}[norm]
    projected = get_threat_model(norm).project(x_new, x, eps)
    length = get_threat_model(norm).norm(projected.double() - x.double())
    assert (length <= eps * (1 + 2e-5)).all() and (length >= eps * 0.85).all()


@pytest.mark.parametrize(
    ("norm", "eps", "size", "odd"),
    [
        *((norm, eps, 224, "") for norm, eps in DEFAULT_EPS.items()),
        *((norm, eps, 32, "") for norm, eps in (("Linf", 8 / 255), ("L2", 0.5), ("L1", 12))),
        ("Linf", 0.3, 28, ""),
        ("Linf", 1, 224, "1/255 may be meant"),
        ("L2", 50, 32, "at 32 px every image can become the same grey"),
        ("L2", 4 / 255, 32, "0.072/255 at most"),
        ("Linf", 4 / 255**2, 224, "0.016/255 at most"),
        ("L2", 4 / 255, 224, "0.01/255 at most; radii of Linf, L2 and L1 differ (usual for L2: 2 at 224 px)"),
        ("L1", 2, 224, "0.0034/255 at most"),
    ],
)
def test_radius_of_another_norm_or_unit(norm, eps, size, odd):
    assert odd in odd_radius(norm, eps, size=size) and bool(odd) == bool(odd_radius(norm, eps, size=size))
