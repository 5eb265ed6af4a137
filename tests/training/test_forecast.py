"""The forecast of a run's end."""

from __future__ import annotations

from datetime import datetime

import pytest

from common.flags import load_config
from tests.training.helpers import base_flags, run
from training import forecast
from training.config import TrainConfig
from training.forecast import WARMUP_LOOKS, Forecast


def make(images, **flags):
    flags = base_flags(images, "") | {"training.epochs": 10, "resolution.min_res": 32, "resolution.max_res": 32} | flags
    config = load_config(TrainConfig, [f"--{name}={value}" for name, value in flags.items()])
    return Forecast(config, steps_per_epoch=100, images_per_step=80, devices=(8, "GPU"))


def warm_up(made, seconds=1000.0):
    for step in range(1, WARMUP_LOOKS + 1):
        assert made.add(step=step, steps=1, seconds=seconds) is None


def test_is_said_once_and_without_the_warm_up(images, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1, 12, 0)

    monkeypatch.setattr(forecast, "datetime", Noon)
    made = make(images)
    warm_up(made)
    assert made.add(step=20, steps=16, seconds=16.0) is None
    text = made.add(step=40, steps=20, seconds=20.0)  # 1 s a step, 960 steps left
    assert text == (
        "forecast: 80 images/s, 1.7 min for the last epoch; 16.0 min left (2.13 GPU-hours), until 2026-01-01 12:16, "
        "validation not counted"
    )
    assert made.add(step=60, steps=20, seconds=20.0) is None


def test_larger_images_of_later_epochs_count(images):
    made = make(images, **{"resolution.max_res": 64, "resolution.start_ramp": 4, "resolution.end_ramp": 5})
    warm_up(made)
    made.add(step=50, steps=50, seconds=50.0)
    # Half an epoch and four whole ones at 32 px, five at 64 px, which have four times as many pixels.
    assert made.seconds_left(50) == pytest.approx(50 + 4 * 100 + 5 * 400)
    assert made.seconds_left(1000) == 0


def test_a_run_says_it(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(forecast, "WARMUP_LOOKS", 0)
    assert run(base_flags(images, tmp_path)).status == 0
    assert capsys.readouterr().out.count("process-hours") == 1
