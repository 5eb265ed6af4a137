"""An evaluation, or a training, killed again and again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from benchmarks.killing import MARK, Run, marked
from benchmarks.kills import Outcome, evaluation_rows, kill_evaluation, process_counts
from benchmarks.kills_training import Outcome as TrainingOutcome
from benchmarks.kills_training import compare_runs, kill_training, look_at_states, training_rows
from common.errors import UserError
from tests.training.helpers import base_flags, run


def flags(images, folder):
    """A network fitted in a moment, and a radius that breaks some of the four images; four chunks."""
    network = run(base_flags(images, folder) | {"training.epochs": 8}).folder
    return [
        f"--eval.model_in={network}",
        f"--data.val_dataset={images}",
        "--data.num_workers=0",
        "--eval.norms=Linf",
        "--eval.eps=0.2",
        "--eval.fullaa=0",
        "--eval.batch_size=1",
        "--eval.n_ex=4",
        "--eval.img_size=32",
        "--eval.crop_pct=1",
        "--eval.workers=2",
        "--eval.gpus=none",
    ]


def test_killed_evaluation_ends_in_the_same_verdicts(images, tmp_path):
    # Of this seed's moments none lies behind the evaluation's end: else it would have to be done again.
    outcome = kill_evaluation(flags(images, tmp_path), tmp_path, kills=2, seed=169)
    assert outcome.kills == 2 and outcome.evaluations >= 1 and outcome.chunks == 4
    assert outcome.verdicts == 4 and 0 < outcome.broken < 4
    assert outcome.different == outcome.damaged == outcome.lost == outcome.left_behind == 0
    assert all(row["ok"] in (True, None) for row in evaluation_rows(outcome, 2))


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


def test_child_is_found_and_killed_and_what_is_left_is_ended(monkeypatch):
    """The main process does not notice that its child is gone: it is left, and ended."""
    monkeypatch.setattr("benchmarks.killing.PATIENCE", 0.3)
    sleep = "import time; time.sleep(60)"
    with Run(["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}']); {sleep}"]) as run:
        while not (children := run.children()):
            assert not run.ends_before(0.01)
        death = run.kill(children[0])
    assert death.left == 1 and death.seconds >= 0.3
    assert not os.path.exists(f"/proc/{run.main}")


@pytest.mark.parametrize(("main", "error"), [("pass", None), ("sys.exit('a fault')", "status 1: a fault")])
def test_run_that_has_ended_by_itself_was_not_killed(main, error):
    with Run(["-c", f"import sys; {main}"]) as run:
        assert run.ends_before(20) and run.kill() is None
    with pytest.raises(UserError, match=error) if error else nullcontext():
        run.check()


def training_flags(images, processes):
    """Six epochs of three steps, with all that is random, and a state about every second step."""
    flags = base_flags(images, "") | {
        "model.not_original": 1,
        "model.drop_path": 0.1,
        "model.model_ema": 1,
        "data.augmentations": 1,
        "training.batch_size": 8 // processes,
        "training.epochs": 6,
        "training.resume": "auto",
        "adv.attack": "apgd",
        "adv.eps": 0.05,
        "validation.freq": 3,
        "logging.save_freq": 3,
        "logging.ckpt_minutes": 0.002,
    }
    return [f"--{name}={value}" for name, value in flags.items() if name not in ("logging.folder", "data.num_workers")]


@pytest.mark.parametrize(("processes", "kills", "seed"), [(1, 1, 0), (2, 1, 0)])
def test_killed_training_ends_in_the_same_weights_and_log(images, tmp_path, processes, kills, seed):
    flags = training_flags(images, processes)
    outcome = kill_training(flags, tmp_path, processes=processes, kills=kills, seed=seed, in_starts=0)
    rows = training_rows(outcome, kills, suffix="")
    assert all(row["ok"] in (True, None) for row in rows), [(r["name"], r["figure"]) for r in rows if r["ok"] is False]
    assert outcome.kills == kills and outcome.runs >= 1
    assert outcome.steps == 18 and outcome.records == 20 and outcome.tensors > 0 and max(outcome.kept) > 0
    assert outcome.kills_of_one == (processes > 1)  # the first of several


@pytest.fixture
def runs(tmp_path):
    """Two equal run folders of two steps and an epoch."""
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "top1": 1.0, "seconds": 3.0}]
    folders = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
        (folder / "log").write_text("".join(json.dumps(record) + "\n" for record in records))
        for name in ("weights_2.pt", "weights_ema_2.pt"):
            torch.save({"a": torch.zeros(2), "b": torch.tensor(float("nan"))}, folder / name)
    return folders


def differences(runs):
    """The counts that are not 0."""
    compare_runs(*runs, outcome := TrainingOutcome())
    return {name: value for name, value in vars(outcome).items() if value and name != "tensors"}


def test_equal_runs_differ_in_nothing_but_their_timings(runs):
    log = runs[1] / "log"
    log.write_text(log.read_text().replace("3.0", "4.0"))
    assert differences(runs) == {}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda lines: lines[1:], {"log_missing": 1}),
        (lambda lines: lines[:2], {"log_missing": 1}),
        (lambda lines: [*lines, lines[0]], {"log_doubled": 1}),
        (lambda lines: [*lines, '{"step": 3}'], {"log_doubled": 1}),
        (lambda lines: [lines[0].replace("0.5", "0.6"), *lines[1:]], {"log_different": 1}),
        (lambda lines: [lines[0], lines[1][:5], *lines[1:]], {"log_invalid": 1}),
        (lambda lines: [*lines, "3"], {"log_invalid": 1}),
    ],
)
def test_differences_of_logs_are_counted(runs, edit, expected):
    log = runs[1] / "log"
    log.write_text("\n".join(edit(log.read_text().splitlines())) + "\n")
    assert differences(runs) == expected


def test_differences_of_weights_are_counted_to_the_last_bit(runs):
    torch.save({"a": torch.tensor([0.0, -0.0]), "b": torch.tensor(float("nan"))}, runs[1] / "weights_2.pt")
    assert differences(runs) == {"weights_different": 1}
    (runs[1] / "weights_ema_2.pt").unlink()
    assert differences(runs) == {"weights_different": 3}


def test_states_that_are_damaged_lost_or_old_are_counted(tmp_path):
    torch.save({"step": 7, "a": torch.zeros(1000)}, last := tmp_path / "last.pt")
    torch.save({"step": 5}, tmp_path / "last.previous.pt")
    outcome = TrainingOutcome()
    assert look_at_states(tmp_path, 6, outcome) == 7
    assert (outcome.states, outcome.states_damaged, outcome.kept) == (2, 0, [7])
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # among the zeros
    last.write_bytes(content)
    assert look_at_states(tmp_path, 5, outcome) == 5 and outcome.states_damaged == 1
    last.unlink()
    assert look_at_states(tmp_path, 7, outcome) == 7 and outcome.states_damaged == 2


def test_faults_of_training_show_in_the_rows():
    faults = ("weights_different", "log_missing", "log_doubled", "log_different", "log_invalid", "states_damaged")
    outcome = TrainingOutcome(kills=2, runs=1, left_behind=1, **dict.fromkeys(faults, 1))
    missed = {row["name"] for row in training_rows(outcome, 3, suffix="_2p") if row["ok"] is False}
    names = {*faults, "kills", "processes_left", "log_invalid_lines"} - {"log_invalid"}
    assert missed == {f"{name}_2p" for name in names}


def test_processes_have_to_share_the_global_batch():
    assert process_counts("1,2") == [1, 2]
    for text in ("0", "3", "32", "two"):
        with pytest.raises(ValueError):
            process_counts(text)
