"""What asks a run to stop: signals, a file, the end of the job; in one process and in several."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from common.processes import Processes
from training import stop
from training.stop import STOPPED, StopRequest


def alone() -> Processes:
    return Processes.alone("cpu")


def two() -> tuple[Processes, Processes]:
    """Two processes of one run, as far as a request to stop goes."""
    first = Processes(rank=0, world_size=2, device=torch.device("cpu"))
    return first, Processes(rank=1, world_size=2, device=torch.device("cpu"), store=first.store)


def request(processes: Processes, **options) -> StopRequest:
    return StopRequest(processes, **{"file": None, "end_time": None} | options)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_the_status_is_the_one_of_sysexits():
    assert STOPPED == os.EX_TEMPFAIL


def test_nothing_asks(tmp_path):
    with request(alone(), file=tmp_path / "stop", end_time=time.time() + 60) as asked:
        assert asked.here() is None and asked.anywhere() is None
        asked.clear_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    with request(alone()) as asked:
        os.kill(os.getpid(), number)
        assert asked.here() == asked.anywhere() == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.here() == number.name  # the first reason stays
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before


def test_under_torchrun_sigusr1_is_left_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGUSR1)
    with request(two()[0]):
        assert signal.getsignal(signal.SIGUSR1) == before
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_patience_of_a_torchrun_that_cannot_be_asked_for_more(monkeypatch):
    monkeypatch.setenv(stop.PATIENCE_VARIABLE, "300")
    for known, seconds in (({"shutdown_timeout": int}, 300), ({}, 30)):
        monkeypatch.setattr(LaunchConfig, "__annotations__", known)
        assert stop.patience_of_torchrun() == seconds


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    with request(alone()) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # within a second: the same request
        assert asked.here() == "SIGINT"
        monkeypatch.setattr(stop, "REPEAT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_one_of_several_processes_leaves_the_second_ctrl_c_to_its_parent(monkeypatch):
    monkeypatch.setattr(stop, "REPEAT_SECONDS", 0.0)
    with request(two()[1]) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.here() == "SIGINT"


def test_the_file_asks_until_it_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "STOP_FILE_SECONDS", 0.0)
    file = tmp_path / "stop"
    with request(alone(), file=file) as asked:
        assert asked.here() is None
        file.touch()
        assert asked.here() == asked.anywhere() == f"the file {file}"
        asked.clear_file()
        assert not file.exists()
        asked.clear_file()
        assert asked.here() == f"the file {file}"  # a request cannot be taken back


def test_stop_file_is_not_checked_in_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "STOP_FILE_SECONDS", 3600.0)
    file = tmp_path / "stop"
    with request(alone(), file=file) as asked:
        assert asked.here() is None
        file.touch()
        assert asked.here() is None
        monkeypatch.setattr(stop, "STOP_FILE_SECONDS", 0.0)
        assert asked.here() == f"the file {file}"


def test_the_end_of_the_job_asks():
    end = time.time() + 0.1
    with request(alone(), end_time=end) as asked:
        assert asked.here() is None
        time.sleep(0.15)
        assert (
            asked.here().startswith("the end of the job")
            and time.strftime("%H:%M", time.localtime(end)) in asked.here()
        )


def test_file_and_end_of_the_job_are_the_first_process_s(tmp_path):
    first, second = two()
    (tmp_path / "stop").touch()
    with request(second, file=tmp_path / "stop", end_time=0.0) as asked:
        assert asked.here() is None
        asked.clear_file()
    assert (tmp_path / "stop").exists()
    with request(first, file=tmp_path / "stop") as asked:
        assert asked.here() == f"the file {tmp_path / 'stop'}"


def test_a_request_to_one_process_is_seen_by_all(tmp_path):
    first, second = two()
    with request(first, file=tmp_path / "stop") as ours, request(second) as theirs:  # the inner one has the handlers
        assert (ours.anywhere(), theirs.anywhere()) == (None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (ours.here(), theirs.here()) == (None, "SIGTERM")
        assert ours.anywhere() is None  # not yet posted
        assert theirs.anywhere() == ours.anywhere() == "SIGTERM"
        assert ours.here() is None  # this process itself was not asked
