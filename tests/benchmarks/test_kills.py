"""An evaluation killed again and again ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.kills import MARK, Outcome, evaluation_rows, kill_evaluation, marked
from tests.training.helpers import base_flags, run


def flags(images, folder):
    """A network fitted in a moment, and a radius that breaks some of the four images; four chunks."""
    network = run(base_flags(images, folder) | {"training.epochs": 8}).folder
    return [
        f"--eval.model_in={network}",
        f"--data.val_dataset={images}",
        "--data.num_workers=0",
        "--eval.norms=Linf",
        "--eval.eps=0.1",
        "--eval.fullaa=0",
        "--eval.batch_size=1",
        "--eval.n_ex=4",
        "--eval.img_size=32",
        "--eval.crop_pct=1",
        "--eval.workers=2",
        "--eval.gpus=none",
    ]


def test_killed_evaluation_ends_in_the_same_verdicts(images, tmp_path):
    outcome = kill_evaluation(flags(images, tmp_path), tmp_path, kills=3, seed=5)
    assert outcome.kills == 3 and outcome.evaluations >= 1 and outcome.chunks == 4
    assert outcome.verdicts == 4 and 0 < outcome.broken < 4
    assert outcome.different == outcome.damaged == outcome.lost == outcome.left_behind == 0
    assert all(row["ok"] in (True, None) for row in evaluation_rows(outcome, 3))


def test_faults_show_in_the_rows():
    outcome = Outcome(kills=2, evaluations=1, different=1, damaged=1, lost=1, left_behind=1, kept=[0, 1])
    outcome.vanish_seconds = [0.1, 0.2]
    missed = {row["name"] for row in evaluation_rows(outcome, 3) if row["ok"] is False}
    assert missed == {"kills", "verdicts_different", "records_damaged", "records_lost", "processes_left"}


def test_processes_are_found_by_their_mark():
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        env={**os.environ, MARK: "test"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        sleeper.stdout.readline()
        assert marked("test") == [sleeper.pid] and marked("other") == []
    finally:
        sleeper.communicate(b"\n")
    assert marked("test") == []
