"""The run folder: a log without gap or double after any break, weights that are never lost, a full disk that ends nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common.errors import UserError
from common.flags import load_config
from common.provenance import PROVENANCE_KEY
from tests.training.helpers import base_flags
from training.config import TrainConfig
from training.run_folder import RunFolder
from training.status import read_log, read_status
from zoo.runs import find_weights


def make_config(folder: Path, **flags: Any) -> TrainConfig:
    given = base_flags(folder / "images", folder) | {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(TrainConfig, [f"--{name}={value}" for name, value in given.items()])


class Runs:
    """Starts of one run, and the warnings of all of them."""

    warnings: list[str]

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.config = make_config(folder, **flags)

    def start(self, resume: dict[str, Any] | None = None, **provenance: Any) -> RunFolder:
        if resume is not None:
            resume = json.loads(json.dumps(resume))
        return RunFolder(self.config.run_folder, self.config, provenance, resume=resume)


@pytest.fixture(autouse=True)
def _warnings(monkeypatch):
    monkeypatch.setattr(Runs, "warnings", [], raising=False)
    monkeypatch.setattr("training.run_folder.warn", Runs.warnings.append)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@contextmanager
def full_disk(file_bytes: int) -> Iterator[None]:
    """The kernel writes no file of this process beyond this size, and fails as on a full disk: first short, then with an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def write_steps(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.log_steps([{"epoch": 0, "step": step, "loss": 1 / step}])


def steps_of(folder: RunFolder) -> list[int]:
    """Every line of the log has to be a strict JSON object."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = (folder.path / "log").read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line, parse_constant=refuse)["step"] for line in content.splitlines()]


def events_of(folder: RunFolder, tag: str = "step/loss") -> list[int]:
    accumulator = EventAccumulator(str(folder.path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


def networks(value: float = 0.0) -> dict[str, nn.Module]:
    made = {"raw": nn.Linear(40, 40), "ema": nn.Linear(40, 40)}
    for network in made.values():
        nn.init.constant_(network.weight, value)
    return made


def weight_in(path: Path) -> float:
    return torch.load(path, weights_only=True)["weight"][0, 0].item()


def names(folder: RunFolder) -> set[str]:
    assert not [p for p in folder.path.iterdir() if p.name.endswith(".part")]
    return {p.name for p in folder.path.iterdir() if p.name.startswith("weights")}


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.curves
def test_log_continues_without_gap_or_double(runs):
    folder = runs.start()
    write_steps(folder, 1, 2, 3)
    state = folder.position() | {"step": 3}
    write_steps(folder, 4, 5)  # after the state: these steps will be done again
    for _ in range(2):  # killed twice
        folder = runs.start(state, step=3)
        assert steps_of(folder) == [1, 2, 3] and folder.set_aside is None
        write_steps(folder, 4, 5, 6)
    folder.close()
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6] and (folder.path / "curves.png").exists() and not runs.warnings


def test_fresh_start_sets_the_earlier_run_aside(runs):
    write_steps(runs.start(), 1)
    folder = runs.start()
    assert folder.set_aside.name.endswith(".1") and (folder.set_aside / "log").exists() and steps_of(folder) == []


@pytest.mark.parametrize("torn", [b'{"epoch": 0, "st', b"\0" * 50, b"\xff\xfe"], ids=["half", "zeros", "noise"])
def test_torn_last_line_is_cut_away(runs, torn):
    folder = runs.start()
    write_steps(folder, 1, 2)
    state = folder.position() | {"step": 2}
    log = folder.path / "log"
    log.write_bytes(log.read_bytes() + torn)
    folder = runs.start(state)
    write_steps(folder, 3)
    assert steps_of(folder) == [1, 2, 3] and not runs.warnings


@pytest.mark.parametrize("left, found", [(None, "0 of the"), (0, "0 of the"), (80, "53 of the")])
def test_shortened_log_is_a_warning(runs, left, found):
    folder = runs.start()
    write_steps(folder, 1, 2, 3)
    state = folder.position() | {"step": 3}
    log = folder.path / "log"
    content = log.read_bytes()
    log.unlink()
    if left is not None:
        log.write_bytes(content[:left])
    folder = runs.start(state)
    write_steps(folder, 4)
    assert steps_of(folder) == ([1, 4] if left == 80 else [4])
    (warning,) = runs.warnings
    assert str(log) in warning and found in warning and f"{len(content)} bytes" in warning


def test_params_name_every_start_and_stay_a_config_file(runs):
    folder = runs.start(host="a", classes=["x"])
    state = folder.position() | {"step": 0}
    runs.start(state, host="b", step=0)
    folder = runs.start(state, host="c", step=0)
    params = folder.path / "params.json"
    facts = json.loads(params.read_text())[PROVENANCE_KEY]
    assert facts == {
        "host": "a",
        "classes": ["x"],
        "resumed": [{"host": "b", "step": 0}, {"host": "c", "step": 0}],
    }
    assert load_config(TrainConfig, ["--config-file", str(params)]) == runs.config


@pytest.mark.parametrize("content", [None, "", "[1]", '{"provenance": 3}'])
def test_lost_params_are_written_again(runs, content):
    folder = runs.start(host="a")
    state = folder.position() | {"step": 0}
    params = folder.path / "params.json"
    params.unlink()
    if content is not None:
        params.write_text(content)
    runs.start(state, host="b")
    assert "params.json: cannot be read" in runs.warnings[0] and len(runs.warnings) == 1
    assert json.loads(params.read_text())[PROVENANCE_KEY]["resumed"] == [{"host": "b"}]


def test_unfinished_files_of_a_killed_process_go(runs):
    folder = runs.start()
    state = folder.position() | {"step": 0}
    (folder.path / ".weights_3.pt.abc.part").write_bytes(b"half")
    names(runs.start(state))


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_events_have_no_step_twice(runs):
    folder = runs.start()
    write_steps(folder, 1, 2, 3)
    state = folder.position() | {"step": 3}
    folder.log_epoch({"epoch": 1, "step": 3, "top1": 0.5})  # after the state, at its own step
    write_steps(folder, 4, 5)
    for _ in range(2):
        time.sleep(1.0)  # TensorBoard reads the files of a folder by their names, which begin with the second
        folder = runs.start(state)
        folder.log_epoch({"epoch": 1, "step": 3, "top1": 0.5})
        write_steps(folder, 4, 5)
    write_steps(folder, 6)
    folder.close()
    assert events_of(folder) == [1, 2, 3, 4, 5, 6] and events_of(folder, "epoch/top1") == [3]


def test_values_and_notes_are_in_the_events(tmp_path):
    folder = Runs(tmp_path, misc__notes="why").start()
    folder.log_epoch({"epoch": 1, "step": 7, "top1": 0.25, "loss": float("nan"), "shape": [1, 2]})
    folder.close()
    accumulator = EventAccumulator(str(folder.path)).Reload()
    (event,) = accumulator.Scalars("epoch/top1")
    assert (event.step, event.value) == (7, 0.25)
    assert set(accumulator.Tags()["scalars"]) == {"epoch/top1", "epoch/loss"}
    assert accumulator.Tensors("notes/text_summary")[0].tensor_proto.string_val == [b"why"]


# --- full disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_lines_but_leaves_no_half_one(runs):
    folder = runs.start()
    write_steps(folder, 1, 2)
    with full_disk((folder.path / "log").stat().st_size + 10):
        write_steps(folder, 3, 4)
        assert steps_of(folder) == [1, 2]
        state = folder.position() | {"step": 4}
    write_steps(folder, 5)
    folder.close()
    assert steps_of(folder) == [1, 2, 5]
    assert len([w for w in runs.warnings if "log: cannot be written" in w]) == 1
    assert steps_of(runs.start(state)) == [1, 2]


def test_resume_on_a_full_disk(runs):
    folder = runs.start(host="a")
    write_steps(folder, 1)
    state = folder.position() | {"step": 1}
    with full_disk(0):
        folder = runs.start(state, host="b")
        write_steps(folder, 2)
        assert steps_of(folder) == [1]
    write_steps(folder, 3)
    folder.close()
    assert steps_of(folder) == [1, 3]
    assert json.loads((folder.path / "params.json").read_text())[PROVENANCE_KEY] == {"host": "a"}
    assert any("params.json: cannot be written" in warning for warning in runs.warnings)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that writes events
def test_really_full_file_system(tmp_path):
    """A file system of 128 KiB that fills up and gets room again."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root's rights")
    try:
        runs = Runs(tmp_path)
        folder = runs.start()
        write_steps(folder, 1)
        folder.save_weights(networks(), 1)
        ballast = os.open(tmp_path / "ballast", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space"):
            while os.write(ballast, b"x" * 4096):
                pass
        steps = range(2, 300)
        write_steps(folder, *steps)
        folder.save_weights(networks(), 2)
        folder.set_status("running", step=299, epoch=2)
        found = steps_of(folder)  # whole lines; later ones may have found room again
        assert found == sorted(set(found)) and len(found) < 299
        assert names(folder) == {"weights_1.pt", "weights_ema_1.pt"} and weight_in(folder.path / "weights_1.pt") == 0
        assert len([w for w in runs.warnings if "No space left on device" in w]) >= 3
        os.ftruncate(ballast, 0)
        os.close(ballast)
        write_steps(folder, 300)
        folder.close()
        assert steps_of(folder)[-1] == 300
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.curves
def test_close_survives_broken_curves(runs):
    folder = runs.start()
    (folder.path / "log").write_text('edited by hand\n{"kind": "epoch", "top1": 0.5}\n')
    folder.close()
    assert "curves.png: cannot be written" in runs.warnings[0] and not (folder.path / "curves.png").exists()


def test_non_finite_numbers_are_strings(runs):
    folder = runs.start()
    attack = [{"loss": float("-inf"), "acc": 0.5}]
    folder.log_steps([{"step": 1, "loss": float("nan"), "attack": attack, "shape": (1, 2)}])
    assert steps_of(folder) == [1]
    record = json.loads((folder.path / "log").read_text())
    assert record["loss"] == "nan" and record["attack"] == [{"loss": "-inf", "acc": 0.5}] and record["shape"] == [1, 2]


def test_log_of_an_earlier_version_goes_on(runs):
    """Its records have no kind, and lines that the disk did not take are in the training state."""
    folder = runs.start()
    folder.close()
    lines = ['{"step": 1, "lr": 1.0}', '{"epoch": 1, "step": 2, "top1": 0.5}', '{"step": 3, "lr": 0.5}']
    size = (folder.path / "log").write_bytes("".join(f"{line}\n" for line in lines[:2]).encode())
    folder = runs.start({"step": 3, "log_bytes": size, "log_lines": lines[2:], "saved": {}})
    folder.close()
    log = folder.path / "log"
    assert log.read_text().splitlines() == lines
    assert [r["step"] for r in read_log(log, "step")] == [1, 3] and [r["step"] for r in read_log(log, "epoch")] == [2]
    assert not runs.warnings


def test_a_folder_that_cannot_be_made_is_an_error_at_the_start(runs, tmp_path):
    (tmp_path / runs.config.run_name).mkdir()
    (tmp_path / runs.config.run_name / "log").mkdir()
    with pytest.raises(UserError, match="logging.folder: cannot write"):
        runs.start({"step": 1, "log_bytes": 0, "saved": {}})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="logging.folder: cannot write"):
        Runs(tmp_path / "file").start()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_keep_works_after_a_resume(tmp_path):
    runs = Runs(tmp_path, logging__keep=2)
    folder = runs.start()
    for epoch in (1, 2, 3):
        folder.save_weights(networks(epoch), epoch)
    state = folder.position() | {"step": 3}
    folder.save_weights(networks(4), 4)  # after the state, and will be written again
    (folder.path / "weights_0.pt").write_bytes(b"the user's own")
    folder = runs.start(state)
    folder.save_weights(networks(4), 4)
    assert names(folder) == {f"weights{ema}_{e}.pt" for ema in ("", "_ema") for e in (3, 4)} | {"weights_0.pt"}
    folder.save_weights(networks(5), 5)
    folder.save_weights(networks(5.5), 5)
    assert names(folder) == {f"weights{ema}_{e}.pt" for ema in ("", "_ema") for e in (4, 5)} | {"weights_0.pt"}
    assert weight_in(folder.path / "weights_ema_5.pt") == 5.5 and not runs.warnings


def test_weights_that_the_user_took_away_do_not_count(tmp_path):
    runs = Runs(tmp_path, logging__keep=2)
    folder = runs.start()
    for epoch in (1, 2):
        folder.save_weights({"raw": networks()["raw"]}, epoch)
    state = folder.position() | {"step": 2}
    (folder.path / "weights_2.pt").unlink()
    folder = runs.start(state)
    folder.save_weights({"raw": networks()["raw"]}, 3)
    assert names(folder) == {"weights_1.pt", "weights_3.pt"}


def test_weights_that_cannot_be_written_cost_no_others(tmp_path):
    runs = Runs(tmp_path, logging__keep=1)
    folder = runs.start()
    folder.save_weights(networks(1), 1)
    with full_disk(1000):
        folder.save_weights(networks(2), 2)
        folder.save_best(networks(2))
    assert names(folder) == {"weights_1.pt", "weights_ema_1.pt"} and weight_in(folder.path / "weights_1.pt") == 1
    assert len(runs.warnings) == 4  # raw and EMA, twice
    for warning, name in zip(runs.warnings, ("weights_2", "weights_ema_2", "weights_best", "weights_ema_best")):
        assert f"{name}.pt: cannot be written (File too large)" in warning
    folder.save_weights(networks(3), 3)
    assert names(folder) == {"weights_3.pt", "weights_ema_3.pt"}


def test_old_weights_that_cannot_be_deleted_are_tried_again(tmp_path, monkeypatch):
    runs = Runs(tmp_path, logging__keep=1)
    folder = runs.start()
    folder.save_weights(networks(), 1)

    def refusing(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refusing)
        folder.save_weights(networks(), 2)
    assert "weights_1.pt: cannot be deleted (Read-only file system)" in runs.warnings[0] and len(names(folder)) == 4
    folder.save_weights(networks(), 3)
    assert names(folder) == {"weights_3.pt", "weights_ema_3.pt"}


def test_best_weights_replace_the_best_and_are_no_epoch(tmp_path):
    runs = Runs(tmp_path, logging__keep=1)
    folder = runs.start()
    for value in (1, 2):
        folder.save_best(networks(value))
    folder.save_weights(networks(3), 1)
    folder.save_weights(networks(4), 2)
    best = {"weights_best.pt", "weights_ema_best.pt"}
    assert names(folder) == {"weights_2.pt", "weights_ema_2.pt"} | best
    assert {weight_in(folder.path / name) for name in best} == {2}
    assert find_weights(folder.path).name == "weights_ema_2.pt"
    folder.save_best({"raw": networks(5)["raw"]})
    assert weight_in(folder.path / "weights_best.pt") == 5 and weight_in(folder.path / "weights_ema_best.pt") == 2


# --- status -----------------------------------------------------------------------------------------------------------


def test_status(runs):
    folder = runs.start()
    assert read_status(folder.path) is None and read_status(folder.path / "nowhere") is None
    folder.set_status("running", step=12, epoch=1)
    status = read_status(folder.path)
    assert status.pop("time").endswith("+00:00")
    assert status == {"status": "running", "step": 12, "epoch": 1, "reason": ""}
    with full_disk(3):
        folder.set_status("stopped", step=20, epoch=2, reason="asked to")
    assert read_status(folder.path)["status"] == "running" and 'the status is "stopped"' in runs.warnings[0]
    folder.close()
    folder.set_status("stopped", step=20, epoch=2, reason="asked to")
    assert read_status(folder.path)["reason"] == "asked to"


@pytest.mark.parametrize("content", [b"", b'{"status": "run', b"\xff\xfe", b"[]"])
def test_broken_status_is_none(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) is None
