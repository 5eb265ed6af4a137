"""What a saved state costs, and restarts: that they are measured, not how fast they are."""

from __future__ import annotations

import pytest
import torch

from benchmarks.state import SMALL, Saving, Savings, state_rows, time_restarts, time_saving
from common.errors import UserError
from tests.training.helpers import base_flags
from training.checkpoint import LAST

MINUTES = 10.0


def savings(extra):
    return Savings([Saving(extra, 0.1, 1.0)], parameters=90_000_000, size=10**9, steps=8, step_seconds=0.5)


def test_saved_states_are_timed_and_whole(tmp_path):
    found = time_saving(SMALL, tmp_path, repeats=2)
    assert len(found.each) == 2
    assert all(saving.foreground > 0 and saving.background > 0 for saving in found.each)
    state = torch.load(tmp_path / LAST, weights_only=True)
    # Two warm-up steps, two to time them, then the steps without and with a state; this one lies in the middle of the last.
    assert state["step"] == 4 + 3 * found.steps + found.steps // 2
    assert found.size == (tmp_path / LAST).stat().st_size > 4 * 4 * found.parameters  # weights, average, two moments


def test_a_state_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.torch.save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(UserError, match="no space"):
        time_saving(SMALL, tmp_path, repeats=1)


def test_restart_ends_with_a_state_after_the_first_one(images, tmp_path):
    long = {"training.epochs": 1000, "validation.freq": 1000, "logging.save_freq": 1000}
    flags = base_flags(images, tmp_path) | long | {"training.resume": "auto", "logging.ckpt_steps": 1}
    (seconds,) = time_restarts(tmp_path, repeats=1, flags=[f"--{name}={value}" for name, value in flags.items()])
    assert 0 < seconds < 60
    (last,) = tmp_path.rglob(LAST)
    assert torch.load(last, weights_only=True)["step"] >= 2


def test_run_that_ends_before_its_first_state_is_an_error(tmp_path):
    flags = base_flags(tmp_path / "missing", tmp_path)
    with pytest.raises(UserError, match="(?s)train.py ended with status 2.*missing"):
        time_restarts(tmp_path, repeats=1, flags=[f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.parametrize(
    ("extra", "restart", "missed"), [(5.9, 29, set()), (6.1, 31, {"state_share", "restart_seconds"})]
)
def test_rows_hold_figures_against_their_targets(extra, restart, missed):
    rows = state_rows(savings(extra), [restart], minutes=MINUTES, counts=True)
    assert {row["name"] for row in rows if row["ok"] is False} == missed
    (share,) = [row for row in rows if row["name"] == "state_share"]
    assert share["figure"] == pytest.approx(extra / 600)
