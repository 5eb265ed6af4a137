"""Schedules as numbers."""

from __future__ import annotations

import math

import pytest

from training.config import LRConfig, ResolutionConfig
from training.schedule import eps_at, lr_at, lr_at_epoch, resolution_at_epoch


def test_cosine_knots():
    lr = LRConfig(lr=1e-3, lr_peak_epoch=20)
    values = [lr_at_epoch(e, lr=lr, epochs=300) for e in (0, 10, 20, 160, 300)]
    half = 5e-6 + 0.5 * (1e-3 - 5e-6)
    assert values == pytest.approx([1e-7, (1e-7 + 1e-3) / 2, 1e-3, half, 5e-6], rel=1e-12)
    quarter = 5e-6 + 0.5 * (1e-3 - 5e-6) * (1 + math.cos(math.pi / 4))
    assert lr_at_epoch(90, lr=lr, epochs=300) == pytest.approx(quarter, rel=1e-12)


def test_cyclic_knots():
    lr = LRConfig(lr=0.2, lr_schedule_type="cyclic", lr_peak_epoch=5)
    values = [lr_at_epoch(e, lr=lr, epochs=15) for e in (0, 5, 10, 15)]
    assert values == pytest.approx([2e-5, 0.2, 0.1, 0.0], abs=1e-12)


def test_step_knots():
    lr = LRConfig(lr=1.0, lr_schedule_type="step", step_ratio=0.1, step_length=3)
    values = [lr_at_epoch(e, lr=lr, epochs=9) for e in (0, 2, 3, 5, 6)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("kind", ["cosine", "cyclic", "step"])
def test_linear_between_epochs_and_exact_at_them(kind):
    lr = LRConfig(lr=1e-3, lr_schedule_type=kind, lr_peak_epoch=4, step_length=3)
    for epoch in range(10):
        at, following = (lr_at_epoch(e, lr=lr, epochs=10) for e in (epoch, epoch + 1))
        assert lr_at(epoch, lr=lr, epochs=10) == pytest.approx(at)
        assert lr_at(epoch + 0.25, lr=lr, epochs=10) == pytest.approx(0.75 * at + 0.25 * following)
    assert lr_at(10, lr=lr, epochs=10) == pytest.approx(lr_at_epoch(10, lr=lr, epochs=10))


def test_no_warmup_and_unfinished_warmup():
    assert lr_at(0, lr=LRConfig(lr=1.0, lr_peak_epoch=0), epochs=5) == pytest.approx(1.0)
    assert lr_at_epoch(5, lr=LRConfig(lr=1.0, lr_peak_epoch=10), epochs=5) == pytest.approx(0.5, abs=1e-4)


def test_resolution():
    resolution = ResolutionConfig(min_res=160, max_res=224, start_ramp=2, end_ramp=10)
    sizes = [resolution_at_epoch(e, resolution=resolution) for e in range(12)]
    assert sizes == [160, 160, 160, 160, 192, 192, 192, 192, 192, 224, 224, 224]  # 176 and 208 are halfway: even


def test_eps_warmup():
    assert [eps_at(p, eps=8.0, warmup_epochs=4) for p in (0, 1, 3.5, 4, 100)] == [0, 2, 7, 8, 8]
    assert eps_at(0.0, eps=8.0, warmup_epochs=0) == 8.0


def test_same_sizes_need_no_ramp():
    sizes = ResolutionConfig(min_res=200, max_res=200, start_ramp=0, end_ramp=20)
    assert {resolution_at_epoch(epoch, resolution=sizes) for epoch in range(30)} == {200}
