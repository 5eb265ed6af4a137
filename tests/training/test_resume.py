"""Runs that stop, are killed, or are started again otherwise, against runs that are left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

import train
import training.trainer
import training.validation
from common.files import take_folder
from common.flags import load_config
from tests.helpers.processes import wait_until
from tests.training.helpers import Outcome, base_flags, largest_difference, read_outcome, run, write_images
from training.checkpoint import LAST, PREVIOUS, read_state
from training.config import LRConfig, TrainConfig
from training.identity import find_folder
from training.schedule import lr_at
from training.status import read_status
from training.stop import STOPPED

PROJECT = Path(training.__file__).resolve().parent.parent
# Everything random is on: order, augmentation, mixup, drop path, the random start of FGSM.
RANDOM = {
    "adv.attack": "fgsm",
    "adv.eps": "8/255",
    "data.augmentations": 1,
    "model.model_ema": 1,
    "model.drop_path": 0.3,
    "training.epochs": 2,
    "training.resume": "auto",
    "validation.adv_n_ex": 8,
    "validation.adv_n_iter": 2,
}
CLEAN = {"adv.attack": "none", "validation.adv_n_ex": 0}  # float16 is slow on a CPU
TIMES = ("seconds", "images_per_second", "tflop_per_second", "data_wait", "validation_seconds")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Ten steps of eight images in two epochs."""
    return write_images(tmp_path_factory.mktemp("many"), train_images=10, val_images=3)


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory) -> Outcome:
    return run(base_flags(many, tmp_path_factory.mktemp("undisturbed")) | RANDOM)


@pytest.fixture
def at_step(monkeypatch):
    """Calls an action in the run before given steps, counted over all starts of this test."""

    def install(actions):
        original, done = training.trainer.train_step, [0]

        def step(state, batches, **kwargs):
            done[0] += 1
            if done[0] in actions:
                actions[done[0]](state, batches)
            return original(state, batches, **kwargs)

        monkeypatch.setattr(training.trainer, "train_step", step)

    return install


def signalled(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def crash(*_):
    raise RuntimeError("a defect")


def folder_of(flags) -> Path:
    argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return find_folder(load_config(TrainConfig, argv))[0]


def stopped(flags) -> Path:
    """Run until it stops on request; returns its folder."""
    with pytest.raises(SystemExit) as end:
        run(flags)
    assert end.value.code == STOPPED
    return folder_of(flags)


def timeless(outcome: Outcome):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in outcome.log]


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """Bit-identical weights and averages, and the same log."""
    assert largest_difference(outcome.weights, expected.weights) == 0
    averages = [torch.load(o.folder / "weights_ema_2.pt", weights_only=True) for o in (outcome, expected)]
    assert largest_difference(*averages) == 0
    assert timeless(outcome) == timeless(expected)


def start(flags, **options) -> subprocess.Popen:
    argv = [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=PROJECT, stderr=subprocess.PIPE, text=True, **options
    )


# --- exact resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [(0, 2, 1), (2, 0, 0)])
def test_signals_in_mid_epoch_change_nothing(many, undisturbed, tmp_path, at_step, workers):
    """In the first epoch, between two epochs, and in the second; with other numbers of loader workers each time."""
    at_step({2: signalled, 8: signalled})
    flags = base_flags(many, tmp_path) | RANDOM
    stopped(flags | {"data.num_workers": workers[0]})
    assert read_status(folder_of(flags))["step"] == 2
    stopped(flags | {"data.num_workers": workers[1]})
    assert read_status(folder_of(flags))["step"] == 8
    outcome = run(flags | {"data.num_workers": workers[2]})
    assert_same(outcome, undisturbed)
    assert [entry["step"] for entry in outcome.params["provenance"]["resumed"]] == [2, 8]
    assert read_status(outcome.folder)["status"] == "finished"


def test_a_crash_costs_the_steps_since_the_last_state(many, undisturbed, tmp_path, at_step):
    at_step({5: crash})
    flags = base_flags(many, tmp_path) | RANDOM | {"logging.ckpt_steps": 3}
    with pytest.raises(RuntimeError, match="a defect"):
        run(flags)
    status = read_status(folder_of(flags))
    assert status["status"] == "failed" and status["step"] == 3 and "a defect" in status["reason"]
    assert_same(run(flags), undisturbed)


def test_stop_while_validating(many, undisturbed, tmp_path, monkeypatch):
    original, calls = training.validation.apgd, []

    def measure(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signalled()
        return original(*args, **kwargs)

    monkeypatch.setattr(training.validation, "apgd", measure)
    flags = base_flags(many, tmp_path) | RANDOM
    folder = stopped(flags)
    assert len(calls) <= 4  # two attacks on each of two networks: the first batch was the last one
    assert read_status(folder) | {"step": 5, "epoch": 0} == read_status(folder)
    assert_same(run(flags), undisturbed)


@pytest.mark.parametrize(
    "change",
    [
        {"training.precision": "fp16"},
        {"training.optimizer": "sgd", "training.grad_accum": 2},
        {"lr.body_factor": 0.1},
        {"lr.body_factor": 0, "training.optimizer": "sgd"},
    ],
)
def test_other_ways_of_training_resume_exactly(many, tmp_path, at_step, change):
    flags = base_flags(many, tmp_path / "a") | RANDOM | {"training.batch_size": 4} | change
    expected = run(flags)
    at_step({4: signalled})
    flags |= {"logging.folder": tmp_path / "b"}
    stopped(flags)
    assert_same(run(flags), expected)


def test_deterministic(many, tmp_path):
    flags = base_flags(many, tmp_path) | RANDOM
    seen, before = [], training.trainer.train_step

    def settings():
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark

    own = settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training.trainer,
            "train_step",
            lambda *a, **k: (seen.append(settings()), before(*a, **k))[1],
        )
        run(flags | {"training.deterministic": 1})
        run(flags | {"training.resume": "none"})
    assert seen == [(True, False)] * 10 + [(False, True)] * 10 and settings() == own


# --- what resume means --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_touched(many, undisturbed, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in undisturbed.folder.iterdir()}
    flags = base_flags(many, undisturbed.folder.parent) | RANDOM
    assert run(flags).status == 0
    assert "is finished; --training.resume=none" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in undisturbed.folder.iterdir()} == before


def test_none_starts_from_scratch_and_loses_nothing(many, undisturbed, tmp_path, at_step):
    at_step({7: signalled})
    flags = base_flags(many, tmp_path) | RANDOM
    folder = stopped(flags)
    assert_same(run(flags | {"training.resume": "none"}), undisturbed)
    assert (folder.with_name(f"{folder.name}.1") / LAST).exists()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_from_another_run(many, undisturbed, tmp_path, at_step, capsys, what):
    at_step({7: signalled})
    flags = base_flags(many, tmp_path / "a") | RANDOM
    folder = stopped(flags)
    source = folder if what == "folder" else folder / LAST
    other = flags | {"logging.folder": tmp_path / "b", "training.resume": source, "logging.addendum": "again"}
    outcome = run(other)
    assert largest_difference(outcome.weights, undisturbed.weights) == 0
    assert [record["step"] for record in outcome.steps] == [8, 9, 10]
    assert outcome.params["provenance"]["from"] == str(folder / LAST) and not outcome.epochs[1:]
    assert f"resumes after step 7 from {folder / LAST}" in capsys.readouterr().out


def test_changed_flags_are_reported_and_refused_unless_forced(many, tmp_path, at_step, capsys):
    at_step({7: signalled})
    flags = base_flags(many, tmp_path) | RANDOM
    folder = stopped(flags)
    changed = flags | {"training.resume": folder, "adv.eps": "4/255", "training.grad_clip": 1, "data.num_workers": 1}
    assert run(changed).status == 2
    errors = capsys.readouterr().err
    assert "adv.eps: 0.0313" in errors and "training.grad_clip: 0.0 → 1.0" in errors
    refused = errors[errors.index("error: ") :]
    assert "num_workers" not in refused and "training.resume:" not in refused[len("error: training.resume:") :]
    forced = run(changed | {"training.resume_force": 1})
    assert forced.status == 0 and [record["step"] for record in forced.steps] == [8, 9, 10]


def test_other_images_are_refused(many, tmp_path, at_step, capsys):
    images = write_images(tmp_path / "images", train_images=10)
    at_step({3: signalled})
    flags = base_flags(images, tmp_path / "runs") | RANDOM
    stopped(flags)
    elsewhere = shutil.copytree(images, tmp_path / "elsewhere")
    for path in elsewhere.glob("train/*/*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert run(flags | {"data.train_dataset": elsewhere}).status == 2
    assert "data.train_dataset has other images" in capsys.readouterr().err
    (images / "train" / "red" / "0.png").unlink()
    assert run(flags).status == 2
    assert "data.train_dataset had 40 images and now has 39" in capsys.readouterr().err


def test_forced_flags_hold(many, tmp_path, at_step, capsys):
    """Also those that the optimiser keeps; what does not fit together is refused."""
    at_step({4: signalled})
    flags = base_flags(many, tmp_path) | RANDOM | {"training.resume_force": 1}
    folder = stopped(flags)
    flags |= {"training.resume": folder}
    outcome = run(flags | {"training.weight_decay": 0.5})
    groups = read_state(outcome.folder / LAST)["train"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0]
    for change, message in (
        ({"training.optimizer": "sgd"}, "the optimiser differs"),
        ({"model.arch": "vit_micro"}, "does not fit the model"),
        ({"model.model_ema": 0}, "has an EMA"),
    ):
        assert run(flags | change).status == 2
        assert message in capsys.readouterr().err
    assert run(flags | {"training.resume": outcome.folder, "training.epochs": 1}).status == 2
    assert "has already done 2 epochs" in capsys.readouterr().err


def test_a_run_from_another_state_resumes_from_its_own(many, undisturbed, tmp_path, at_step, capsys):
    """And says where it began, also to a command that does not."""
    at_step({3: signalled, 6: signalled})
    flags = base_flags(many, tmp_path / "a") | RANDOM
    first = stopped(flags)
    flags |= {"training.resume": first, "logging.folder": tmp_path / "b"}
    folder = stopped(flags)
    assert read_status(folder)["step"] == 6 and "started from" not in capsys.readouterr().out
    outcome = run(flags | {"training.resume": "auto"})
    assert f"resumes after step 6 from {folder / LAST}; started from {first}\n" in capsys.readouterr().out
    for asked in ("auto", first, folder):
        run(flags | {"training.resume": asked})
        assert f"{folder}, which started from {first}, is finished; --training.resume=none" in capsys.readouterr().out
    assert largest_difference(outcome.weights, undisturbed.weights) == 0
    assert [record["step"] for record in outcome.steps] == [4, 5, 6, 7, 8, 9, 10]


def test_two_starts_of_a_new_run(many, tmp_path, monkeypatch, capsys):
    """Neither finds a folder; the one that comes second to making it is refused, and changes nothing there."""
    flags = base_flags(many, tmp_path) | RANDOM
    folder, original, locks = folder_of(flags), training.trainer.build_parts, []

    def build(*args, **kwargs):
        folder.mkdir()
        (folder / "log").write_text("of the first")
        locks.append(take_folder(folder))
        return original(*args, **kwargs)

    monkeypatch.setattr(training.trainer, "build_parts", build)
    assert run(flags).status == 2
    assert "another run is working" in capsys.readouterr().err and [*tmp_path.iterdir()] == [folder]
    assert (folder / "log").read_text() == "of the first"
    locks[0].close()


@pytest.mark.parametrize("left", ["finished", "stopped"])
def test_more_epochs_name_the_run_that_they_extend(many, tmp_path, at_step, capsys, left):
    """In the first lines, with the command, and what the learning rate does then."""
    flags = base_flags(many, tmp_path) | RANDOM | CLEAN | {"lr.lr": 1e-3, "training.epochs": 4}
    at_step({7: signalled} if left == "stopped" else {})
    folder, done = (stopped(flags), 1) if left == "stopped" else (run(flags).folder, 4)
    more = flags | {"training.epochs": 8}
    fresh = run(more)
    errors = capsys.readouterr().err
    rates = [lr_at(done, lr=LRConfig(lr=1e-3, lr_peak_epoch=0), epochs=epochs) for epochs in (8, 4)]
    assert (
        f"{folder} contains this run with training.epochs=4, {done} of them done, but this run starts at epoch 0; to resume from "
        f"there give --training.resume={folder}: the learning rate resumes at {rates[0]:.3g}, the value in the schedule of 8 "
        f"epochs; in the schedule of 4 epochs it was {rates[1]:.3g}"
    ) in errors
    assert fresh.steps[0]["step"] == 1
    extended = run(more | {"training.resume": folder, "logging.addendum": "longer"})
    errors = capsys.readouterr().err
    assert "training.epochs: 4 → 8" in errors and "starts at epoch 0" not in errors
    assert run(more | {"training.resume": folder}).status == 0
    assert f"; the earlier run of this name is now {fresh.folder}.1" in capsys.readouterr().out
    first = extended.steps[0]
    assert first["step"] == (8 if left == "stopped" else 21)
    assert first["lr"] == fresh.steps[first["step"] - 1]["lr"] and extended.steps[-1]["step"] == 40
    # Fewer are refused, and another flag beside it too.
    assert run(flags | {"training.resume": folder, "training.epochs": 3}).status == 2
    assert run(more | {"training.resume": folder, "training.grad_clip": 1}).status == 2


def test_more_epochs_by_force_go_on_at_the_same_epoch(many, tmp_path, at_step):
    at_step({7: signalled})
    flags = base_flags(many, tmp_path) | RANDOM
    folder = stopped(flags)
    more = flags | {
        "training.resume": folder,
        "training.resume_force": 1,
        "training.epochs": 3,
        "training.batch_size": 4,
    }
    outcome = run(more)  # ten steps an epoch instead of five
    assert [record["step"] for record in outcome.steps] == [*range(15, 31)]
    assert [record["epoch"] for record in outcome.epochs] == [2, 3]


@pytest.mark.parametrize(
    "content,message",
    [(None, "expected auto, none, a run folder"), (b"no state", "damaged"), ({"model": {}}, "not a training state")],
)
def test_what_is_no_state(many, tmp_path, capsys, content, message):
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert run(base_flags(many, tmp_path / "runs") | {"training.resume": path}).status == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_resume_flags_that_make_no_sense(many, tmp_path, capsys):
    assert run(base_flags(many, tmp_path) | {"training.resume": ""}).status == 2
    assert run(base_flags(many, tmp_path) | {"training.resume": tmp_path, "training.eval_only": 1}).status == 2
    assert run(base_flags(many, tmp_path) | {"training.resume": tmp_path}).status == 2
    errors = capsys.readouterr().err
    assert (
        errors.count("error: training.resume") == 3 and "got an empty value" in errors and "model.ckpt_path" in errors
    )


def test_two_runs_in_one_folder_are_refused(many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.resume.PATIENCE", 0)
    flags = base_flags(many, tmp_path) | RANDOM
    folder_of(flags).mkdir()
    with take_folder(folder_of(flags)):
        assert run(flags).status == 2
    assert "another run is working" in capsys.readouterr().err


def test_damaged_states(many, undisturbed, tmp_path, at_step, capsys):
    at_step({7: signalled})
    flags = base_flags(many, tmp_path) | RANDOM | {"logging.ckpt_steps": 2}
    folder = stopped(flags)
    content = bytearray((folder / LAST).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(
        byte ^ 1 for byte in content[middle : middle + 256]
    )  # more than what pads a record, which nothing reads
    (folder / LAST).write_bytes(content)
    assert_same(run(flags), undisturbed)  # from the one before
    errors = capsys.readouterr().err
    assert f"{LAST} is damaged" in errors and f"{PREVIOUS} of step 6, is used" in errors


def test_without_any_whole_state_nothing_is_started(many, tmp_path, at_step, capsys):
    at_step({4: signalled})
    flags = base_flags(many, tmp_path) | RANDOM
    folder = stopped(flags)
    (folder / LAST).write_bytes(b"")
    assert run(flags).status == 2
    assert (
        "--training.resume=none starts from scratch" in capsys.readouterr().err
        and read_status(folder)["status"] == "failed"
    )


# --- asked to stop --------------------------------------------------------------------------------------------------------


def test_the_stop_file(many, undisturbed, tmp_path, at_step, monkeypatch, capsys):
    monkeypatch.setattr("training.stop.STOP_FILE_SECONDS", 0)
    flags = base_flags(many, tmp_path) | RANDOM
    at_step({4: lambda *_: (folder_of(flags) / "stop").touch()})
    training_log = stopped(flags)
    assert f"the file {training_log / 'stop'}: saving the state of step " in capsys.readouterr().out
    status = read_status(training_log)
    assert status["status"] == "stopped" and 4 <= status["step"] < 10 and not (training_log / "stop").exists()
    assert_same(run(flags), undisturbed)


def test_a_stop_file_left_from_before_is_removed(many, tmp_path, at_step):
    flags = base_flags(many, tmp_path) | RANDOM
    at_step({4: signalled})
    (stopped(flags) / "stop").touch()
    assert run(flags).status == 0


def test_the_end_of_a_slurm_job(many, tmp_path, monkeypatch):
    flags = base_flags(many, tmp_path) | RANDOM
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert run(flags | {"dist.end_margin_minutes": 59}).status == 0
    folder = stopped(flags | {"dist.end_margin_minutes": 61, "data.seed": 1})
    assert "the end of the job" in read_status(folder)["reason"]


def test_where_prints_the_folder_and_needs_no_pytorch(many, tmp_path, capsys):
    flags = base_flags(many, tmp_path)
    argv = [f"--{name}={value}" for name, value in flags.items()]
    code = "import sys, train; s = train.main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else s)"
    command = [sys.executable, "-c", code, "--where", *argv]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{folder_of(flags)}\n"
    assert train.main(["--where", "--data.seed=x", *argv]) == 2


def test_finished_run_on_other_images(many, tmp_path, capsys):
    """The same images elsewhere are the same run; others are not, and it is not said to be finished on them."""
    flags = base_flags(many, tmp_path / "runs") | {"training.resume": "auto"}
    folder = run(flags).folder
    moved = shutil.copytree(many, tmp_path / "moved")
    assert run(flags | {"data.train_dataset": moved}).folder == folder
    assert "is finished" in capsys.readouterr().out
    next(moved.glob("train/red/*.png")).unlink()
    assert run(flags | {"data.train_dataset": moved}).status == 2
    assert "finished, but data.train_dataset had" in (text := capsys.readouterr()).err and "is finished" not in text.out
    assert read_status(folder)["status"] == "finished"


# --- several processes ----------------------------------------------------------------------------------------------------


def two(flags):
    return flags | {"training.distributed": 1, "dist.world_size": 2}


def test_two_processes_become_one_and_the_other_way_round(many, tmp_path, at_step, capfd):
    """The same blocks of samples, mixed and dropped alike, in the same steps; only sums are rounded otherwise."""
    fp64 = {"training.precision": "fp64", "validation.precision": "fp64", "training.batch_size": 4}
    flags = base_flags(many, tmp_path / "a") | RANDOM | fp64
    expected = run(flags | {"training.grad_accum": 2})
    # Two processes are asked to stop after a few steps; with a state for each, they exchange requests after each.
    flags |= {"logging.folder": tmp_path / "b"}
    folder = folder_of(two(flags))

    def ask() -> None:
        wait_until(lambda: (folder / "log").exists() and '"step": 2' in (folder / "log").read_text())
        signalled()

    asking = threading.Thread(target=ask)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes too late must not end the tests
    try:
        asking.start()
        assert run(two(flags | {"logging.ckpt_steps": 1})).status == STOPPED
        asking.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    step = read_status(folder)["step"]
    assert train.main(["--check", *(f"--{n}={v}" for n, v in (flags | {"training.global_batch": 4}).items())]) == 0
    assert "keeps 8 images per step" in (text := capfd.readouterr().err) and "this run uses 8; give" in text
    assert 0 < step < 10 and read_state(folder / LAST)["run"]["world_size"] == 2
    at_step({2: signalled})
    stopped(flags)  # one process, two micro-batches
    assert read_status(folder)["step"] == step + 2
    assert run(two(flags)).status == 0
    outcome = read_outcome(folder)
    assert largest_difference(outcome.weights, expected.weights) < 1e-9
    assert [r["step"] for r in outcome.steps] == [*range(1, 11)]
    # Both commands mean this run, though its name is that of two processes; so it is finished for both.
    assert folder_of(flags) == folder_of(two(flags)) == folder
    assert run(flags).steps == outcome.steps and len(list(folder.parent.iterdir())) == 1


def test_a_number_of_processes_that_does_not_divide(many, tmp_path, at_step, capfd):
    at_step({2: signalled})
    flags = base_flags(many, tmp_path) | RANDOM | {"training.batch_size": 8}
    folder = stopped(flags)
    other = run(two(flags)).folder
    assert other != folder and "8 images per step, which 2 processes cannot share" in (other / "log").read_text()
    assert read_status(folder)["step"] == 2 and read_status(other)["status"] == "finished"
    assert run(two(flags) | {"training.resume": folder, "logging.folder": tmp_path / "b"}).status == 2
    assert "a step of this run takes 8 images" in (errors := capfd.readouterr().err) and errors.count("error: ") == 1


@pytest.mark.slow
def test_elastic_restart(many, tmp_path):
    """torchrun restarts all processes when one is killed, and they resume from the last state; but not when asked to stop."""
    flags = base_flags(many, tmp_path) | RANDOM | {"training.batch_size": 4, "logging.ckpt_steps": 1}
    flags |= {"training.epochs": 500, "validation.freq": 500}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    folder, deadline = folder_of(two(flags)), time.monotonic() + 300
    process = subprocess.Popen([*launcher, "train.py", *argv], cwd=PROJECT, stderr=subprocess.PIPE, text=True)

    def wait_until(condition):
        while not condition():
            assert process.poll() is None, process.stderr.read()[-5000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        wait_until(lambda: (read_status(folder) or {"step": 0})["step"] >= 2)
        workers = [p for p in psutil.Process(process.pid).children() if "train.py" in p.cmdline()]
        workers[1].kill()
        wait_until(lambda: "resumed" in json.loads((folder / "params.json").read_text())["provenance"])
        (folder / "stop").touch()
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0, errors[-3000:]
    status, outcome = read_status(folder), read_outcome(folder)
    assert status["status"] == "stopped" and "the file" in status["reason"]
    assert [r["step"] for r in outcome.steps] == [*range(1, status["step"] + 1)]
    provenance = outcome.params["provenance"]
    assert len(provenance["resumed"]) == 1 and provenance["processes"] == 2


# --- losses that are not finite -------------------------------------------------------------------------------------------


def poison(state, batches):
    x = batches[0].x.float() / 255
    x[0, 0, 0, 0] = torch.nan
    batches[0] = batches[0]._replace(x=x, draws=None)


@pytest.mark.parametrize(
    "change", [{}, {"training.precision": "fp16"}, {"training.optimizer": "sgd"}, {"training.grad_clip": 1}]
)
def test_a_step_with_a_loss_that_is_not_finite_is_skipped(many, tmp_path, at_step, capsys, change):
    at_step({5: poison})  # float16 begins with steps skipped for its scale
    flags = base_flags(many, tmp_path) | RANDOM | {"adv.attack": "none", "training.epochs": 1} | change
    outcome = run(flags)
    assert outcome.steps[-1]["skipped"] and outcome.steps[-1]["loss"] == "nan"
    skipped = sum("skipped" in record for record in outcome.steps)
    assert outcome.epochs[0]["skipped_steps"] == skipped and (skipped == 1 or "training.precision" in change)
    assert torch.tensor(outcome.epochs[0]["train_loss"]).isfinite()
    assert all(value.isfinite().all() for value in outcome.weights.values())
    assert "the loss is nan at step 5; the step is skipped" in capsys.readouterr().err


def test_a_skipped_step_leaves_weights_optimizer_and_batch_norm_as_they_are(many, tmp_path, at_step):
    seen = []

    def look(state, _):
        state_dict = state.state_dict()
        moments = [v for entry in state_dict["optimizer"]["state"].values() for v in entry.values() if v is not None]
        model = [value for key, value in state_dict["model"].items() if "num_batches_tracked" not in key]
        seen.append([tensor.clone() for tensor in model + moments])

    at_step({1: poison, 2: look, 3: lambda *a: (look(*a), poison(*a)), 4: look})
    flags = base_flags(many, tmp_path) | {
        "model.arch": "timm_resnet10t",
        "training.optimizer": "sgd",
        "training.epochs": 1,
        "model.model_ema": 1,
    }
    average = torch.load(run(flags).folder / "weights_ema_1.pt", weights_only=True)
    assert all(value.isfinite().all() for value in average.values())
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_that_stays_bad_ends_with_status_3(many, tmp_path, at_step, capsys, precision):
    at_step(dict.fromkeys(range(6, 100), poison))
    flags = base_flags(many, tmp_path) | RANDOM | CLEAN | {"training.precision": precision, "logging.ckpt_steps": 1}
    with pytest.raises(SystemExit) as end:
        run(flags | {"training.max_bad_steps": 4})
    errors = capsys.readouterr().err
    assert end.value.code == 3 and "nan at step 6, nan at step 7, nan at step 8, nan at step 9" in errors
    status = read_status(folder_of(flags))
    assert status["status"] == "diverged" and status["step"] == 5 and errors.count("4 steps in a row") == 1


# --- what cannot be written -----------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_state_and_ends_nothing(many, undisturbed, tmp_path, at_step, monkeypatch, capsys):
    original, full, failed = torch.save, [], []
    flags = base_flags(many, tmp_path) | RANDOM | {"logging.ckpt_steps": 2}

    def save(value, file, *args, **kwargs):
        if full and isinstance(value, dict) and "train" in value:
            failed.append(value["step"])
            raise OSError(28, "No space left on device")
        return original(value, file, *args, **kwargs)

    # States are written in the background, so each change waits for what was begun before it.
    def fill(*_):
        wait_until((folder_of(flags) / LAST).exists)
        full.append(1)

    def empty(*_):
        wait_until(lambda: failed == [4, 6])
        full.clear()
        signalled()

    monkeypatch.setattr(torch, "save", save)
    at_step({4: fill, 8: empty})
    folder = stopped(flags)
    errors = capsys.readouterr().err
    assert "training state of step 4 cannot be written (No space left on device)" in errors
    assert "training state of step 6 cannot be written" in errors and "the state of step 2 is kept" in errors
    assert read_state(folder / PREVIOUS)["step"] == 2 and read_state(folder / LAST)["step"] == 8
    assert_same(run(flags), undisturbed)


def test_a_run_whose_end_cannot_be_saved_is_not_finished(many, undisturbed, tmp_path, monkeypatch, capsys):
    original, full = torch.save, [True]

    def save(value, file, *args, **kwargs):
        if full:
            raise OSError(28, "No space left on device")
        return original(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    flags = base_flags(many, tmp_path) | RANDOM
    assert run(flags).status == 2
    assert "last weights or state could not be written" in capsys.readouterr().err
    assert read_status(folder_of(flags))["status"] == "failed"
    full.clear()
    assert_same(run(flags), undisturbed)


@pytest.mark.slow
def test_log_is_json_after_a_kill(many, tmp_path):
    flags = base_flags(many, tmp_path) | RANDOM | {"training.epochs": 500}
    with start(flags) as process:
        log = folder_of(flags) / "log"
        wait_until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size >= 500))
        assert process.poll() is None
        process.kill()
    lines = (folder_of(flags) / "log").read_text().splitlines()
    assert len(lines) > 2 and {json.loads(line)["kind"] for line in lines} >= {"start", "step"}


# --- the watch over overfitting -------------------------------------------------------------------------------------------


def test_overfitting_is_noticed(many, tmp_path, monkeypatch, capsys):
    """Measured accuracies are replaced: robust ones fall in the third epoch, those under the training attack rise."""
    strong, weak = iter([0.5, 0.6, 0.02, 0.01, 0.02, 0.01]), iter([0.6, 0.7, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(training.validation, "spread_indices", lambda length, count: [*range(length)] * 40)
    monkeypatch.setattr(
        training.validation.Validator,
        "run",
        lambda *_: {"top1": 0.5, "adv_top1": next(strong), "train_attack_top1": next(weak)},
    )
    flags = base_flags(many, tmp_path) | RANDOM | {"training.epochs": 6, "model.model_ema": 0, "logging.save_freq": 1}
    with pytest.raises(SystemExit) as end:
        run(flags | {"validation.stop_on_overfitting": 1})
    assert end.value.code == 3
    outcome = read_outcome(folder_of(flags))
    assert ["overfitting" in record for record in outcome.epochs] == [False, False, True]
    errors = capsys.readouterr().err
    assert "Catastrophic overfitting at epoch 3" in errors and "weights_best.pt" in errors
    assert read_status(outcome.folder)["status"] == "diverged"
    best, second = (torch.load(outcome.folder / f"weights_{name}.pt", weights_only=True) for name in ("best", 2))
    assert largest_difference(best, second) == 0
