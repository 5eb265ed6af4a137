"""FGSM compared with its definition and the claims of its docstring."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attacks.fgsm import fgsm

EPS = 0.1


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 48, generator=generator)
    x = torch.rand(3, 3, 4, 4, generator=generator)
    x[0] = 1.0
    return (lambda x: torch.tanh(x.flatten(1)) @ weight.T), x, torch.tensor([0, 1, 2])


def by_hand(model, x, y, start, alpha):
    start = start.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    return (start + alpha * EPS * grad.sign()).detach()


@pytest.mark.parametrize("alpha", [1.0, 1.25])
@pytest.mark.parametrize("noise_level", [0.0, 1.0, 2.0])
def test_definition(case, alpha, noise_level):
    model, x, y = case
    noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(5)) * noise_level * EPS
    expected = by_hand(model, x, y, x + noise, alpha)
    options = {"eps": EPS, "alpha": alpha, "noise_level": noise_level}
    free = fgsm(model, x, y, **options, skip_projection=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(free, expected, atol=1e-6, rtol=0)
    clipped = fgsm(model, x, y, **options, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(clipped, (x + (expected - x).clamp(-EPS, EPS)).clamp(0, 1), atol=1e-6, rtol=0)


def test_ball_and_box(case):
    model, x, y = case
    x_adv = fgsm(model, x, y, eps=EPS, alpha=2.0)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= EPS * (1 + 2e-5)
    assert (x_adv != x).any()


def test_random_start_follows_the_generator(case):
    model, x, y = case
    first, again, other = (fgsm(model, x, y, eps=EPS, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_soft_labels(case):
    model, x, y = case
    options = {"eps": EPS, "noise_level": 0.0}
    assert torch.equal(fgsm(model, x, y, **options), fgsm(model, x, F.one_hot(y, 4).float(), **options))


@pytest.mark.parametrize("change", [{"norm": "L2"}, {"eps": 0.0}, {"noise_level": -1.0}])
def test_rejects(case, change):
    model, x, y = case
    with pytest.raises(ValueError, match="|".join(change)):
        fgsm(model, x, y, **({"eps": EPS} | change))
