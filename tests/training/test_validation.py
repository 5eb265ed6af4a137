"""The quick validation where the numbers would mislead: networks whose logits are huge, and those that do not learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.apgd import apgd
from attacks.losses import UnitGap
from tests.training.helpers import base_flags, run
from training.guard import Guard
from training.progress import Progress


@pytest.fixture(scope="module")
def learned(images, tmp_path_factory):
    """A small trained network's run."""
    return run(base_flags(images, tmp_path_factory.mktemp("learned")) | {"training.epochs": 15, "lr.lr": 3e-3})


def test_huge_logits_do_not_hide_from_the_quick_attack(learned, images, tmp_path: Path, capsys) -> None:
    """The head times 1e5 decides as before: robust accuracy must not rise, though its cross-entropy has no gradient."""
    found = {}
    for scale in (1.0, 1e5):
        weights = {
            name: value * (scale if name.startswith("head.fc") else 1) for name, value in learned.weights.items()
        }
        torch.save(weights, tmp_path / f"{scale:g}.pt")
        flags = base_flags(images, tmp_path / f"runs{scale:g}") | {"training.eval_only": 1, "adv.eps": 0.4}
        flags |= {"model.ckpt_path": tmp_path / f"{scale:g}.pt", "validation.adv_n_ex": 8, "validation.adv_n_iter": 10}
        found[scale] = run(flags).log[-1]
    plain, huge = found[1.0], found[1e5]
    assert plain["top1"] == huge["top1"] >= 0.75 and plain["zero_gradients"] == 0
    assert huge["adv_top1"] <= plain["adv_top1"] < plain["top1"]
    assert huge["zero_gradients"] == huge["top1"]  # those that are right, whose loss is exactly zero


def test_unit_gap_keeps_predictions_and_forgets_the_scale() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).double()
    x, y = torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.randint(5, (6,))
    losses = []
    for scale in (1.0, 1e6):
        with torch.no_grad():
            network[1].weight *= scale
            network[1].bias *= scale
        logits = UnitGap(network)(x)
        assert torch.equal(logits.argmax(1), network(x).argmax(1))
        best = logits.topk(3).values
        assert torch.allclose(best[:, 0] - best[:, 2], torch.ones(6, dtype=torch.float64))
        losses.append(apgd(UnitGap(network), x, y, norm="Linf", eps=0.1, n_iter=3).loss_best)
    assert torch.allclose(*losses)
    two = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    assert UnitGap(two)(x).isfinite().all()


def suspicions(images: int = 50_000, classes: int = 1000, **metrics: float) -> list[str]:
    class Config:
        class model:
            num_classes = classes

    metrics = {"epoch": 3, "top1": 0.5} | metrics
    return list(Guard(Config, None, Progress()).suspicions(metrics, images=images))


def test_network_that_does_not_learn_is_reported() -> None:
    (text,) = suspicions(top1=0.0011)
    assert "0.11% after 3 epochs, no better than chance (0.10%)" in text and "lr.lr" in text
    assert suspicions(top1=0.0011, epoch=2) == suspicions(top1=0.005) == []
    assert suspicions(top1=0.25, classes=4, images=8) == []  # too few images to tell


def test_gradients_of_zero_are_reported() -> None:
    assert suspicions(zero_gradients=0.1) == []
    for name in ("zero_gradients", "ema_zero_gradients"):
        (text,) = suspicions(**{name: 0.6})
        assert "zero for 60% of the images" in text
