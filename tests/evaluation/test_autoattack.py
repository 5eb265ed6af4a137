"""Our loop around AutoAttack's attacks against the package's own evaluation."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from torch import nn

import evaluation.autoattack
from common.errors import UserError
from common.precision import float32_matmul
from evaluation.autoattack import (
    ATTACKS,
    Among,
    Verdicts,
    attack_chunk,
    check_adversarial,
    package_name,
    rounding,
    standard_autoattack,
)
from tests.evaluation.helpers import short_autoattack, shorten

CPU = torch.device("cpu")
EPS = {"Linf": 0.01, "L2": 0.1, "L1": 0.4}


class Net(nn.Module):
    """A small network that is neither robust nor hopeless at the radii above."""

    def __init__(self, num_classes=10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Parameter(torch.randn(12, 3, 3, 3, generator=generator) * 0.3)
        self.head = nn.Parameter(torch.randn(num_classes, 12 * 16, generator=generator) * 0.3)

    def forward(self, x):
        return torch.tanh(torch.nn.functional.conv2d(x, self.conv, stride=2, padding=1)).flatten(1) @ self.head.T


def case(n=12, num_classes=10):
    model = Net(num_classes).eval()
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % num_classes  # one misclassified image
    return model, x, y


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(evaluation.autoattack, "standard_autoattack", short_autoattack)


def test_the_network_itself_is_never_asked_in_tf32(short):
    """On a GPU PyTorch's default rounds the inputs of float32 convolutions."""
    model, x, y = case()
    seen = set()
    model.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    with float32_matmul(tf32=True):
        attack_chunk(model, x, y, norm="Linf", eps=0.01, seed=3, attacks=ATTACKS[:1], device=CPU)
        assert torch.backends.cudnn.allow_tf32
    assert seen == {False}


def test_engine_is_the_standard_version():
    model, x, y = case(2)
    engine = standard_autoattack(model, norm="Linf", eps=0.01, seed=0, device=CPU, num_classes=10)
    assert engine.attacks_to_run == list(ATTACKS) and engine.apgd.n_iter == engine.fab.n_iter == 100
    assert engine.apgd_targeted.n_target_classes == 9 and engine.square.n_queries == 5000
    assert engine.apgd.n_restarts == engine.apgd_targeted.n_restarts == engine.fab.n_restarts == 1


@pytest.mark.parametrize(
    ("norm", "attacks"), [("Linf", ATTACKS[:2]), ("Linf", ATTACKS), ("L2", ATTACKS), ("L1", ATTACKS)]
)
def test_equals_the_package_image_by_image(norm, attacks, short):
    model, x, y = case()
    verdicts = attack_chunk(model, x, y, norm=norm, eps=EPS[norm], seed=3, attacks=attacks, device=CPU)
    package = importlib.import_module(package_name())
    reference = shorten(package.AutoAttack(model, norm=norm, eps=EPS[norm], seed=3, device="cpu", version="standard"))
    reference.attacks_to_run = list(attacks)
    x_adv, y_adv = reference.run_standard_evaluation(x, y, batch_size=len(x))
    assert torch.equal(verdicts.x_adv, x_adv)
    robust = torch.tensor([broken == "" for broken in verdicts.broken_by])
    assert torch.equal(robust, y_adv == y)
    assert verdicts.broken_by[0] == "clean" and verdicts.clean_pred[1:].equal(y[1:])
    with torch.no_grad():
        assert torch.equal(verdicts.adv_pred, model(x_adv).argmax(1)) and torch.equal(verdicts.adv_pred == y, robust)
    assert 0 < robust.sum() < len(x) - 1  # neither all nor none: the comparison means something


def test_order_of_attacks_and_their_time(short):
    model, x, y = case()
    begun = []
    verdicts = attack_chunk(model, x, y, norm="Linf", eps=0.01, seed=0, device=CPU, progress=begun.append)
    assert begun == list(ATTACKS) == list(verdicts.attack_seconds)
    assert min(verdicts.attack_seconds.values()) > 0
    everything = attack_chunk(model, x, y, norm="Linf", eps=0.5, seed=0, device=CPU, progress=begun.append)
    assert "" not in everything.broken_by and begun[4:] == ["apgd-ce"]  # the others had nothing left to attack
    assert everything.attack_seconds["square"] == 0


class Negated(nn.Module):
    def forward(self, logits):
        return -logits


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_only_the_fast_copy_takes_for_broken_is_attacked_in_full(norm, short):
    """Every image fools a copy that is always wrong; the network itself then decides, exactly as without a copy."""
    model, x, y = case()
    settings = {"norm": norm, "eps": EPS[norm], "seed": 3, "device": CPU}
    exact = attack_chunk(model, x, y, **settings)
    fast = attack_chunk(model, x, y, fast=nn.Sequential(model, Negated()), **settings)
    assert fast.rejoined > 0
    robust = [[broken == "" for broken in verdicts.broken_by] for verdicts in (exact, fast)]
    assert all(ours <= theirs for theirs, ours in zip(*robust))  # never more robust than without the copy
    with torch.no_grad():
        wrong = model(fast.x_adv).argmax(1) != y
    assert wrong.tolist() == [bool(broken) for broken in fast.broken_by]


def test_a_faithful_copy_changes_nothing(short):
    model, x, y = case()
    settings = {"norm": "Linf", "eps": 0.01, "seed": 0, "device": CPU}
    exact = attack_chunk(model, x, y, **settings)
    for copy in (Net().eval(), model):  # the network itself in TensorFloat-32
        fast = attack_chunk(model, x, y, fast=copy, tf32=True, **settings)
        assert fast.rejoined == 0 and fast.broken_by == exact.broken_by and torch.equal(fast.x_adv, exact.x_adv)


def test_arithmetic_is_put_back():
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with float32_matmul(tf32=False):
        assert settings() == (False, False)
        with float32_matmul(tf32=True):
            assert settings() == (True, True)
        assert settings() == (False, False)
    assert settings() == before


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_check_accepts_what_the_attacks_find(norm, short):
    model, x, y = case()
    verdicts = attack_chunk(model, x, y, norm=norm, eps=EPS[norm], seed=0, device=CPU)
    check = check_adversarial(model, x, verdicts, y, norm=norm, eps=EPS[norm], device=CPU)
    assert check["outside_ball"] == check["outside_box"] == check["not_misclassified"] == check["not_finite"] == []
    assert 0.9 * EPS[norm] < check["max_perturbation"] <= EPS[norm] + rounding(norm, EPS[norm], x[0].numel())
    assert check["pixel_range"] == (verdicts.x_adv.min().item(), verdicts.x_adv.max().item())


def test_check_names_what_is_wrong():
    model, x, y = case(6)
    x_adv = x.clone()
    x_adv[1, 0, 0, 0] += 0.02 * (1 if x[1, 0, 0, 0] < 0.5 else -1)  # outside the ball
    x_adv[2, 0, 0, 0], x[2, 0, 0, 0] = -0.005, 0.0  # outside the box
    x_adv[4, 0, 0, 0] = float("nan")
    verdicts = Verdicts(clean_pred=y, broken_by=["clean", "", "", "square", "", ""], adv_pred=y, x_adv=x_adv)
    check = check_adversarial(model, x, verdicts, y, norm="Linf", eps=0.01, device=CPU)
    assert check["outside_ball"] == [1, 4] and check["outside_box"] == [2, 4]
    assert check["not_misclassified"] == [3] and check["not_finite"] == [4]
    assert check["max_perturbation"] != check["max_perturbation"] or check["max_perturbation"] >= 0.0199


def test_some_of_the_classes_are_a_network_with_a_smaller_head(short):
    classes = [1, 2, 4, 5, 7, 9]
    model, x, _ = case()
    smaller = Net().eval()
    smaller.head.data = smaller.head.data[classes]
    with torch.no_grad():
        y = smaller(x).argmax(1)
    settings = {"norm": "Linf", "eps": 0.01, "seed": 0, "device": CPU}
    expected, found = (attack_chunk(each, x, y, **settings) for each in (smaller, Among(model, classes)))
    assert found.broken_by == expected.broken_by and len(set(found.broken_by)) > 1
    assert torch.equal(found.adv_pred, expected.adv_pred) and torch.allclose(found.x_adv, expected.x_adv)


def test_few_classes(short):
    model, x, y = case(4, num_classes=5)
    assert len(attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, attacks=ATTACKS[:2], device=CPU).broken_by) == 4
    model, x, y = case(4, num_classes=3)
    with pytest.raises(
        UserError, match="apgd-t needs at least 4 classes.*3; give --eval.attacks=apgd-ce,fab-t,square."
    ):
        attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, attacks=ATTACKS[:2], device=CPU)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_two_and_three_classes_by_the_other_attacks(short, num_classes, norm):
    model, x, y = case(6, num_classes=num_classes)
    attacks = ("apgd-ce", "fab-t", "square")
    verdicts = attack_chunk(model, x, y, norm=norm, eps=EPS[norm], seed=0, attacks=attacks, device=CPU)
    check = check_adversarial(model, x, verdicts, y, norm=norm, eps=EPS[norm], device=CPU)
    assert (
        set(verdicts.broken_by) <= {"", "clean", *attacks} and check["outside_ball"] == check["not_misclassified"] == []
    )


def test_nan_logits_are_refused():
    _, x, y = case(2)
    with pytest.raises(UserError, match="not finite"):
        attack_chunk(nn.Sequential(Net(), Nan()), x, y, norm="Linf", eps=0.02, seed=0, attacks=ATTACKS[:2], device=CPU)


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_the_repositorys_package_serves_too(monkeypatch, short):
    """`autoattack` has the same attacks; its constructor takes `verbose` and prints by default."""
    real = importlib.import_module("pyautoattack").AutoAttack
    quiet = []

    class AutoAttack(real):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, device="cuda", version="standard"):
            quiet.append(not verbose)
            super().__init__(model, norm=norm, eps=eps, seed=seed, device=device, version=version)

    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack, __spec__=object()))
    model, x, y = case(4)
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.autoattack.package_name", lambda: "autoattack")
        ours = attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, attacks=ATTACKS[:2], device=CPU)
    same = attack_chunk(model, x, y, norm="Linf", eps=0.02, seed=0, attacks=ATTACKS[:2], device=CPU)
    assert quiet == [True] and torch.equal(ours.x_adv, same.x_adv)


def test_no_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyautoattack"):
        package_name()
