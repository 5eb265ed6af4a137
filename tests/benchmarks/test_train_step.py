"""Benchmark of the training step: the baseline does the same work, and the figures are correct."""

from __future__ import annotations

import argparse

import pytest
import torch

from attacks.apgd import apgd
from benchmarks.harness import run_program
from benchmarks.published_step import PublishedTraining, published_apgd
from benchmarks.train_step import Measured, Sample, config_for, rows
from common.errors import UserError
from tests.attacks.test_apgd import batch, micro


@pytest.mark.parametrize("n_iter", [1, 2, 8])
def test_published_attack_equals_this_implementation(n_iter):
    model, (x, y) = micro().double(), batch()
    x = x.double()
    expected = apgd(model, x, y, norm="Linf", eps=8 / 255, n_iter=n_iter).x_best
    model.train()
    found = published_apgd(model, x, y, eps=8 / 255, n_iter=n_iter)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.training


def test_published_step_trains():
    model, (x, y) = micro(), batch()
    published = PublishedTraining(model, arch="convnext_micro", eps=4 / 255, n_iter=2)
    for group in published.optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: value.clone() for name, value in published.model.state_dict().items()}
    published.step(x, y)
    changed = [name for name, value in published.model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2
    for name in changed:
        expected = 0.9999 * before[name] + 0.0001 * published.model.state_dict()[name]
        torch.testing.assert_close(published.average[name], expected)


@pytest.mark.parametrize("other,ratio", [("own_forward", 0.75), ("reused_forward", 4 / 3)])
def test_rows(other, ratio):
    arguments = argparse.Namespace(arch="convnext_tiny", compile="1", quick=False)
    config = config_for(arguments, attack="apgd", batch_size=8, size=224, precision="fp32")
    taken = {
        "published": [4.0, 5.0, 6.0],
        "ours": [3.0, 4.0, 3.0],
        "clean": [1.0, 1.0, 1.5],
        other: [4.0, 4.0, 4.0],
    }
    measured = Measured({arm: [Sample(s, 2 * s) for s in seconds] for arm, seconds in taken.items()}, {})
    part_ms = {"attack": [1.0], "optimizer": [90.0], "ema": [60.0]}
    found = {
        r["name"]: r
        for r in rows(arguments, config, measured, part_ms, 0.6, passes=7, again=0, suffix="", prepared=1.0)
    }
    assert found["time_ratio_convnext_tiny"]["figure"] == 0.75
    assert found["speedup_convnext_tiny"]["figure"] == pytest.approx(4 / 3)
    assert found["adv_over_clean_convnext_tiny"]["figure"] == 3.0
    assert found["matmul_share_convnext_tiny"]["figure"] == pytest.approx(0.2)
    assert found["reuse_ratio_convnext_tiny"]["figure"] == pytest.approx(ratio)
    assert found["ema_optimizer_share_convnext_tiny"]["figure"] == pytest.approx(0.05)
    assert found["images_per_second_ours_convnext_tiny"]["figure"] == pytest.approx(8 / 3)
    if not torch.cuda.is_available():
        assert found["time_ratio_convnext_tiny"]["ok"] is True
        assert found["memory_ratio_convnext_tiny"]["figure"] is None


def test_a_program_that_falls_back_to_uncompiled_training_is_rejected():
    warning = "warning: training.compile: training runs uncompiled: no C++ compiler"
    assert run_program(["-c", "print(1)"]) > 0
    with pytest.raises(UserError, match=r"uncompiled: no C\+\+ compiler"):
        run_program(["-c", f"import sys; print({warning!r}, file=sys.stderr)"])
