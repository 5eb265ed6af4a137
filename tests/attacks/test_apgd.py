"""APGD compared with the published attack's numbers, an independent brute force, and the claims of its docstring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.apgd import APGDResult, apgd
from attacks.norms import DEFAULT_EPS
from attacks.threat_models import THREAT_MODELS
from utils_architecture import get_new_model, normalize_model

GOLDEN = Path(__file__).parent.parent / "golden" / "apgd_reference.npz"
EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
NORMS = tuple(EPS)


class GoldenNet(nn.Module):
    """The network of golden/README, in float64."""

    def __init__(self, numbers) -> None:
        super().__init__()
        for name in ("c1", "b1", "c2", "b2", "w", "b"):
            self.register_parameter(name, nn.Parameter(torch.from_numpy(numbers[f"model_{name}"]).double()))

    def forward(self, x):
        x = F.gelu(F.conv2d(x, self.c1, self.b1, stride=2, padding=1))
        x = F.gelu(F.conv2d(x, self.c2, self.b2, stride=2, padding=1))
        return F.linear(x.mean(dim=(2, 3)) * 4, self.w, self.b)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("n_iter", [2, 10, 20])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_published_attack(golden, norm, n_iter, labels):
    x = torch.from_numpy(golden["x"]).double()
    y = torch.from_numpy(golden["y"]) if labels == "hard" else torch.from_numpy(golden["y_soft"]).double()
    eps = float(golden["eps"][NORMS.index(norm)])
    result = apgd(GoldenNet(golden), x, y, norm=norm, eps=eps, n_iter=n_iter)
    case = f"{norm}_{n_iter}_{labels}_"
    for name in ("x_best", "loss_best", "x_best_adv"):
        torch.testing.assert_close(
            getattr(result, name), torch.from_numpy(golden[case + name]).double(), atol=1e-6, rtol=0, msg=name
        )
    assert torch.equal(result.acc, torch.from_numpy(golden[case + "acc"]).bool())


def micro(arch="convnext_micro", seed=0, normalized=False):
    torch.manual_seed(seed)
    model = get_new_model(arch, not_original=True, num_classes=10)
    for p in model.parameters():  # avoid the flat loss landscape of an untrained network
        if p.dim() > 1:
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    return normalize_model(model) if normalized else model


def batch(n=6, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=generator)
    x[0, :, :8] = 0.0  # pixels on the sides of the box
    x[1, :, :8] = 1.0
    return x, torch.randint(0, 10, (n,), generator=generator)


def check_promises(result: APGDResult, model, x, y, norm, eps):
    for x_adv in (result.x_best, result.x_best_adv):
        assert x_adv.dtype == torch.float32
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert THREAT_MODELS[norm].norm(x_adv.double() - x.double()).max() <= eps * (1 + 2e-5)
    assert torch.isfinite(result.loss_best).all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["convnext_micro", "vit_micro"])
@pytest.mark.parametrize("norm", NORMS)
def test_ball_box_and_loss(norm, arch, autocast):
    model, (x, y) = micro(arch), batch(n=3)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        with torch.no_grad():
            clean = F.cross_entropy(model.eval()(x).float(), y, reduction="none")
        result = apgd(model, x, y, norm=norm, eps=EPS[norm], n_iter=5)
    check_promises(result, model, x, y, norm, EPS[norm])
    assert (result.loss_best >= clean).all()
    assert result.loss_best.mean() > clean.mean() + 0.01


@pytest.mark.parametrize("n_iter", [1, 2, 3, 7, 13, 50, 100])
@pytest.mark.parametrize("norm", NORMS)
def test_number_of_passes(norm, n_iter):
    """n_iter + 1 forwards, n_iter backwards, for every n_iter."""
    x, y = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
    weight = torch.randn(4, 108)
    forwards, backwards = [], []

    def model(x):
        forwards.append(1)
        logits = x.flatten(1) @ weight.T
        if logits.requires_grad:
            logits.register_hook(lambda g: backwards.append(1))
        return logits

    result = apgd(model, x, y, norm=norm, eps=0.1, n_iter=n_iter)
    assert (len(forwards), len(backwards)) == (n_iter + 1, n_iter)
    check_promises(result, model, x, y, norm, 0.1)


def test_linear_model_reaches_the_optimum():
    """For a linear two-class model the strongest Linf perturbation is known: eps against the weights' sign."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 48, generator=generator, dtype=torch.float64)
    x = 0.3 + 0.4 * torch.rand(5, 3, 4, 4, generator=generator, dtype=torch.float64)  # the box does not bind
    y = torch.tensor([0, 1, 0, 1, 0])
    result = apgd(lambda x: x.flatten(1) @ w.T, x, y, norm="Linf", eps=0.1, n_iter=2)
    against = torch.where(y[:, None] == 0, 1.0, -1.0) * (w[1] - w[0]).sign()
    torch.testing.assert_close(result.x_best.flatten(1), x.flatten(1) + 0.1 * against, atol=1e-12, rtol=0)


def test_model_is_restored():
    model, (x, y) = micro(), batch()
    model.train()
    model.stages[1].eval()
    model.head.fc.bias.requires_grad_(False)
    model.head.fc.weight.grad = torch.full_like(model.head.fc.weight, 7.0)
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    seen = []
    model.register_forward_pre_hook(
        lambda m, _: seen.append((m.training, any(p.requires_grad for p in m.parameters())))
    )
    apgd(model, x, y, norm="Linf", eps=0.1, n_iter=2)
    assert seen == [(False, False)] * 3
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["head.fc.weight"] and (grads["head.fc.weight"] == 7).all()


def test_model_is_restored_after_an_error():
    model, (x, y) = micro(), batch()
    model.train()
    with pytest.raises((RuntimeError, IndexError)):
        apgd(model, x, y + 100, norm="Linf", eps=0.1, n_iter=2)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_works_without_gradients_around_it():
    model, (x, y) = micro(), batch()
    with torch.no_grad():
        result = apgd(model, x, y, norm="Linf", eps=0.1, n_iter=2)
    assert (result.x_best != x).any() and not result.x_best.requires_grad


def zero_share(model, x, y, dtype):
    """Return the share of coordinates that one Linf step leaves unchanged although the box does not bind."""
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        x_adv = apgd(model, x, y, norm="Linf", eps=0.05, n_iter=1).x_best_adv
    return (x_adv == x).float().mean().item()


@pytest.mark.parametrize("arch", ["convnext_micro", "vit_micro"])
@pytest.mark.parametrize("confidence", [1.0, 25.0])
def test_fp16_keeps_small_gradients(arch, confidence):
    """Pixel gradients of 1e-7 are zero in float16 unless the loss is scaled; confident samples make them smaller still."""
    model, (x, _) = micro(arch), batch(8)
    x = 0.1 + 0.8 * x
    network = nn.Sequential(Scale(0.02), model, Scale(confidence))
    with torch.no_grad():
        logits = network.eval()(x)
    y = logits.argmin(dim=1) if confidence == 1 else logits.argmax(dim=1)
    network_wrong = nn.Sequential(network, Shift(y, 10 if confidence > 1 else 0))
    single, half = (zero_share(network_wrong, x, y, dtype) for dtype in (None, torch.float16))
    assert half <= 1.05 * single + 1e-4


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Shift(nn.Module):
    """Adds to the logits of the class y: a confident network."""

    def __init__(self, y, by):
        super().__init__()
        self.shift = F.one_hot(y, 10) * by

    def forward(self, logits):
        return logits + self.shift.to(logits.dtype)


def test_half_precision_images_become_float32():
    model, (x, y) = micro(), batch()
    assert apgd(model, x.half(), y, norm="Linf", eps=0.1, n_iter=1).x_best.dtype == torch.float32


def test_nan_network_leaves_pixels_finite():
    x, y = batch(2)
    result = apgd(lambda x: x.flatten(1)[:, :10] * float("nan"), x, y, norm="L2", eps=0.5, n_iter=3)
    assert torch.equal(result.x_best, x)


def test_hard_labels_equal_one_hot_soft_labels():
    model, (x, y) = micro(), batch()
    hard = apgd(model, x, y, norm="L2", eps=0.5, n_iter=4)
    soft = apgd(model, x, F.one_hot(y, 10).float(), norm="L2", eps=0.5, n_iter=4)
    torch.testing.assert_close(hard.x_best, soft.x_best, atol=1e-5, rtol=0)
    assert torch.equal(hard.acc, soft.acc)


def test_samples_do_not_depend_on_their_batch():
    model, (x, y) = micro().double(), batch()
    x = x.double()
    whole = apgd(model, x, y, norm="L1", eps=12.0, n_iter=6).x_best
    alone = torch.cat([apgd(model, x[i : i + 1], y[i : i + 1], norm="L1", eps=12.0, n_iter=6).x_best for i in range(3)])
    torch.testing.assert_close(whole[:3], alone, atol=1e-9, rtol=0)


def test_on_step_sees_every_evaluation():
    model, (x, y) = micro(), batch()
    rows = []
    result = apgd(model, x, y, norm="Linf", eps=0.1, n_iter=3, on_step=lambda i, loss, acc: rows.append((i, loss, acc)))
    assert [i for i, _, _ in rows] == [0, 1, 2, 3]
    assert torch.equal(rows[-1][1], result.loss_best) and torch.equal(rows[-1][2], result.acc)


@pytest.mark.parametrize("change", [{"norm": "linf"}, {"eps": 0.0}, {"eps": float("nan")}, {"n_iter": 0}])
def test_rejects(change):
    x, y = batch(2)
    with pytest.raises(ValueError, match="|".join(change)):
        apgd(lambda x: x.flatten(1)[:, :10], x, y, **({"norm": "Linf", "eps": 0.1, "n_iter": 2} | change))


def test_unknown_norm_names_the_nearest():
    x, y = batch(2)
    with pytest.raises(ValueError, match="'Linf'"):
        apgd(lambda x: x.flatten(1)[:, :10], x, y, norm="Linfty", eps=0.1, n_iter=2)


def test_every_norm_has_a_default_radius():
    assert set(DEFAULT_EPS) == set(THREAT_MODELS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("norm", NORMS)
def test_no_synchronisation_on_a_gpu(norm):
    model = micro().cuda()
    x, y = (t.cuda() for t in batch())
    apgd(model, x, y, norm=norm, eps=EPS[norm], n_iter=2)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        apgd(model, x, y, norm=norm, eps=EPS[norm], n_iter=10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Dispatch mode that fails if a value is read back from the device, which would be a synchronisation on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")), (
            name
        )
        assert not (name.startswith("index") and any(getattr(i, "dtype", None) == torch.bool for i in args[1] or [])), (
            name
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_reads_nothing_back(norm):
    model, (x, y) = micro(), batch(3)
    with NoReads():
        apgd(model, x, y, norm=norm, eps=EPS[norm], n_iter=10)


def test_no_reads_notices_a_read():
    with pytest.raises(AssertionError), NoReads():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError), NoReads():
        torch.ones(3)[torch.tensor([True, False, True])]
