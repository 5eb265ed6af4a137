"""Processes that training starts itself: what they share, and how they begin and end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from common import processes as processes_module
from common.errors import UserError
from common.processes import LostProcess, Processes, check_rendezvous, is_of_the_engine, joined, local_rank
from tests.helpers.processes import alive, free_port, wait_until
from training import launch as launch_module
from training.launch import launch
from training.stop import STOPPED, StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short(monkeypatch):
    """Little patience with processes that do not end."""
    monkeypatch.setattr(launch_module, "GRACE_SECONDS", 1.0)


def nested() -> dict:
    """What a training state may hold, and more: every kind of value, shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool)
    return {
        "model": {"weight": torch.randn(3, 4, 5, generator=generator), "nan": torch.tensor([float("nan"), -0.0])},
        "dtypes": [torch.arange(4).to(dtype) for dtype in dtypes],
        "complex": torch.randn(2, 2, dtype=torch.complex64, generator=generator),
        "shapes": (torch.tensor(1.5), torch.empty(0, 3), torch.randn(4, 6, generator=generator).T[::2]),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "plain": {"step": 7, 3: None, "text": "größer", "pair": (1, [2.5, True])},
        "empty": [{}, [], ()],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(*raw)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def listening() -> list[str]:
    """Addresses that this process listens on."""
    return [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def act(config: tuple[str, str], processes: Processes) -> None:
    """What each started process does; `config` is (what, where to)."""
    what, folder = config
    own = Path(folder, f"rank{processes.rank}")
    last = processes.rank == processes.world_size - 1
    if what == "share":
        value = processes.broadcast(nested() if processes.is_first else None)
        total = processes.sum(torch.tensor([processes.rank + 1.0])).item()
        found = {"same": same(value, nested()), "listening": listening(), "sum": total}
        found["once"] = processes.once_here("made", lambda: f"by {processes.rank}")
        found["gathered"] = processes.gather(processes.rank)
        found["start method"] = multiprocessing.get_start_method()
        found["threads"] = torch.get_num_threads()
        found["python threads"] = [thread.name for thread in threading.enumerate()]
        own.write_text(json.dumps(found))
    elif what == "killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raises" and last:
        raise ValueError("an accident")
    elif what == "diverges" and last:
        raise SystemExit(3)
    elif what in ("killed", "raises", "diverges"):
        processes.wait()
    elif what == "hangs" and last:
        time.sleep(60)
    elif what == "hangs":
        processes.wait()
    elif what == "paused" and last:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "paused":
        raise SystemExit(1)
    elif what == "one stops":
        raise SystemExit(STOPPED if last else 0)
    elif what == "one never stops" and last:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    elif what == "one never stops":
        raise SystemExit(STOPPED)
    elif what == "waits":
        with StopRequest(processes, file=None, end_time=None) as asked:
            own.write_text(str(os.getpid()))
            while asked.here() is None:
                time.sleep(0.02)
            if not Path(folder, "deaf").exists():
                own.with_suffix(".reason").write_text(asked.here())
                raise SystemExit(STOPPED)
            time.sleep(60)
    elif what == "bad input" or (what == "bad input in one" and last):
        raise UserError("data.train_dataset: there is none.")
    elif what == "bad input in one":
        processes.wait()


def started(what: str, folder: Path, *, timeout: float = 60.0) -> int:
    """Status of the launch of two processes."""
    config = (what, str(folder))
    return launch(act, config, world_size=2, address="localhost", port=0, timeout=timedelta(seconds=timeout))


def test_started_processes_share_and_listen_on_loopback_only(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert started("share", tmp_path) == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        assert found["same"] and found["sum"] == 3 and found["gathered"] == [0, 1] and found["once"] == "by 0"
        # What they start, loader workers, starts as it would without them: spawned ones take seconds.
        assert found["start method"] == multiprocessing.get_start_method()
        assert found["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)  # cores are shared, not fought over
        assert found["listening"] and set(found["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert found["python threads"] == ["MainThread"]


@pytest.mark.parametrize(
    "what,status,line",
    [
        (
            "killed",
            1,
            "error: process 1 of 2 was killed by SIGKILL (the system does that when memory runs out); the others",
        ),
        ("raises", 1, "error: process 1 of 2"),
        ("diverges", 3, None),
        (
            "hangs",
            1,
            "error: process 1 of 2 does not answer: it died, hangs or is cut off (",
        ),
        ("bad input", 2, "error: data.train_dataset: there is none."),
        ("bad input in one", 2, "error: data.train_dataset: there is none."),
        ("paused", 1, "error: process 0 of 2 exited with status 1; the others were ended."),
        ("one stops", STOPPED, None),
        ("one never stops", 1, "error: process 1 of 2 did not stop with the others and was ended."),
    ],
)
def test_started_processes_end_with_status_and_reason(tmp_path, short, monkeypatch, capfd, what, status, line):
    begin = time.monotonic()
    assert started(what, tmp_path, timeout=12 if what == "hangs" else 60) == status
    assert time.monotonic() - begin < 60
    errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == (line is not None) and (line is None or errors[0].startswith(line)), errors
    assert what != "raises" or "failed: ValueError: an accident" in errors[0]


@pytest.mark.parametrize(
    ("ends", "backend", "left"),
    [
        (None, "nccl", "destroyed"),
        (SystemExit(STOPPED), "nccl", "destroyed"),
        (UserError("bad input"), "nccl", "aborted"),
        (ValueError("an accident"), "nccl", "aborted"),
        (KeyboardInterrupt(), "nccl", "aborted"),
        (ValueError("an accident"), "gloo", "destroyed"),
    ],
)
def test_failed_process_does_not_wait_for_the_others(monkeypatch, ends, backend, left):
    """NCCL destroys its communicators when all processes ask for it: the others do not, after the failure of one."""
    done, dist = [], processes_module.dist
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    with pytest.raises(type(ends)) if ends else nullcontext():
        with joined(device=device, store=dist.HashStore(), rank=0, world_size=2):
            if ends:
                raise ends
    assert done == [left]


def test_restarted_processes_do_not_see_what_an_earlier_attempt_left(monkeypatch):
    """Such as the addresses of processes that have ended: torchrun may keep one store for all its restarts."""
    dist, store = processes_module.dist, processes_module.dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 1)]))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with joined(device=torch.device("cpu")) as processes:
            assert not processes.store.check(["address"])
            processes.store.set("address", "here")


def test_failure_is_not_replaced_by_one_of_leaving(monkeypatch):
    def fail():
        raise RuntimeError("NCCL error")

    dist = processes_module.dist
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
    with pytest.raises(UserError, match="bad input"):
        with joined(device=torch.device("cuda"), store=dist.HashStore(), rank=0, world_size=2):
            raise UserError("bad input")


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (
            {1: (True, "process 1 of 3 on node1 failed: ValueError: a")},
            "process 1 of 3 on node1 failed: ValueError",
        ),
        ({1: (False, "RuntimeError: gloo")}, "process 2 of 3 does not answer: it died, hangs"),
        ({}, "process 1, 2 of 3 does not answer"),
        ({1: (False, "gloo"), 2: (False, "gloo")}, "the connection between the 3 processes broke"),
    ],
)
def test_lost_process_is_found_by_the_answers_of_the_others(monkeypatch, answers, sentence):
    store = processes_module.dist.HashStore()
    first = Processes(rank=0, world_size=3, device=torch.device("cpu"), store=store)
    for rank, answer in answers.items():
        store.set(f"lost/0/failed/{rank}", json.dumps(answer))
    monkeypatch.setattr(processes_module, "ANSWER_SECONDS", 0.3)
    lost = first.lost(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert isinstance(lost, LostProcess) and str(lost).startswith(sentence)
    assert lost.failed or "Connection closed" in str(lost)
    assert first.lost(ValueError("a defect")) is None
    assert Processes.alone("cpu").lost(RuntimeError("gloo")) is None


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 12000ms for recv",
        "Application timeout caused pair closure",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_failed_collective_is_distinguished_from_a_defect(message):
    assert is_of_the_engine(RuntimeError(message))
    assert not is_of_the_engine(ValueError(message)) and not is_of_the_engine(RuntimeError("shape mismatch"))


def test_launcher_that_tells_less_than_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_rank() == 1 and Processes(1, 2, torch.device("cpu")).on_this_machine == 2


def started_and_signalled(folder: Path, *numbers: signal.Signals) -> int:
    """Status of two processes that wait for a request to stop, which this process gets, as their parent."""

    def ask() -> None:
        files = [folder / f"rank{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(1.2)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}  # late ones must not end the tests
    asking = threading.Thread(target=ask)
    try:
        asking.start()
        return started("waits", folder)
    finally:
        asking.join()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_request_to_the_parent_reaches_all(tmp_path, number):
    assert started_and_signalled(tmp_path, number) == STOPPED
    assert [(tmp_path / f"rank{rank}.reason").read_text() for rank in range(2)] == [number.name] * 2
    assert not any(alive(int((tmp_path / f"rank{rank}").read_text())) for rank in range(2))


def test_second_ctrl_c_ends_all_at_once(tmp_path):
    (tmp_path / "deaf").touch()
    assert started_and_signalled(tmp_path, signal.SIGINT, signal.SIGINT) == 130
    assert not any(alive(int((tmp_path / f"rank{rank}").read_text())) for rank in range(2))


def test_request_before_the_processes_are_ready(tmp_path, monkeypatch):
    """It waits for them, who may take seconds to start; there is nothing to save."""
    start = launch_module.mp.start_processes

    def signalled_start(*arguments, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return start(*arguments, **options)

    monkeypatch.setattr(launch_module.mp, "start_processes", signalled_start)
    assert started("waits", tmp_path) == STOPPED


def test_single_process_interrupted_has_the_status_of_shells():
    def main(config, processes):
        raise KeyboardInterrupt

    assert launch(main, None, world_size=1, address="localhost", port=1) == 130


def test_rendezvous_is_refused_where_nothing_can_listen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address, port in (("127.0.0.1", taken.getsockname()[1]), ("192.0.2.1", free_port())):
            with pytest.raises(UserError, match=f"cannot listen on .*{address}"):
                check_rendezvous(address, port)
    check_rendezvous("localhost", free_port())


def test_broadcast_alone_gives_the_value_itself():
    value = nested()
    assert Processes.alone("cpu").broadcast(value) is value
