"""What the processes of a run share, alone and under torchrun; how started processes begin and end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from common import distributed
from common.distributed import Board, Processes, check_rendezvous, joined, launch, local_rank, under_torchrun
from common.errors import UserError
from common.stop import STOPPED, StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alone(monkeypatch):
    """The only process of a run, whatever started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as processes:
        yield processes


# --- Alone ---


def test_joined_alone(alone):
    assert (alone.rank, alone.world_size, alone.device) == (0, 1, torch.device("cpu"))
    assert alone.is_first and not under_torchrun() and local_rank() == 0
    assert not torch.distributed.is_initialized()
    assert alone.gather("value") == ["value"]


def test_numbers_are_handed_out_once(alone):
    board, same = Board(alone, "board"), Board(alone, "board")
    assert [board.take(), board.take(), same.take(), board.take()] == [0, 1, 2, 3]


def test_messages_arrive_once_in_order(alone):
    board = Board(alone, "board")
    assert board.messages() == []
    board.post(b"one")
    board.post(b"")
    Board(alone, "board").post(b"\x00\xff three")
    assert board.messages() == [b"one", b"", b"\x00\xff three"]
    assert board.messages() == []
    board.post(b"four")
    assert board.messages() == [b"four"]


def test_large_messages(alone):
    board, message = Board(alone, "board"), os.urandom(2**22)
    board.post(message)
    assert board.messages() == [message]


@pytest.mark.parametrize("reason", ["", "eval.out: zu groß …"])
def test_close(alone, reason):
    board = Board(alone, "board")
    assert board.closed() is None
    assert board.closed() is None
    board.close(reason)
    assert board.closed() == Board(alone, "board").closed() == reason


def test_the_first_reason_stays(alone):
    board = Board(alone, "board")
    board.close("the first")
    board.close("the second")
    board.close()
    assert board.closed() == "the first"


def test_boards_of_other_names_and_runs_are_apart(alone):
    board = Board(alone, "board")
    board.take()
    board.post(b"message")
    board.close("over")
    for other in (Board(alone, "other"), Board(Processes.alone("cpu"), "board")):
        assert (other.take(), other.messages(), other.closed()) == (0, [], None)


# --- Two processes ---


SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch.distributed as dist
from common.errors import UserError
from common.distributed import Board, joined, local_rank, under_torchrun

COUNT = 100

def refuse():
    raise UserError(f"refused by {os.environ['RANK']}")

def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)

assert under_torchrun() and not dist.is_initialized()
with joined() as processes:
    found = {"rank": processes.rank, "world_size": processes.world_size, "device": str(processes.device)}
    found |= {"local_rank": local_rank(), "backend": dist.get_backend(), "gathered": processes.gather(processes.rank)}
    found["on_this_machine"] = processes.on_this_machine
    found["once"] = processes.once_here("made", lambda: f"by {processes.rank}")
    try:
        processes.once_here("refused", refuse)
    except UserError as error:
        found["refused"] = str(error)
    board, other = Board(processes, "work"), Board(processes, "other")
    found["open"] = board.closed()
    processes.wait()

    # Both take at the same time; the second process posts what it took.
    taken, messages = [], []
    while (number := board.take()) < COUNT:
        taken.append(number)
        if processes.rank == 1:
            board.post(f"{number}".encode())
        else:
            messages += board.messages()
        time.sleep(0.001)
    found["taken"] = taken
    if processes.rank == 1:
        Board(processes, "large").post(bytes(2**22))
        board.post(b"end")
        wait_until(lambda: board.closed() is not None)
        board.close("another reason")
    else:
        def end_has_come():
            messages.extend(board.messages())
            return messages[-1:] == [b"end"]
        wait_until(end_has_come)
        board.close("all done")
        found["messages"] = [message.decode() for message in messages]
    processes.wait()
    found |= {"closed": board.closed(), "other": other.closed()}
    if processes.rank == 0:
        found["late"] = [message.decode() for message in board.messages()]
        found["large"] = [len(message) for message in Board(processes, "large").messages()]
found["left"] = not dist.is_initialized()
Path(sys.argv[1], f"rank{found['rank']}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes of torchrun found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, folder / "script.py", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_joined_under_torchrun(two):
    for rank in range(2):
        assert two[rank]["rank"] == two[rank]["local_rank"] == rank
        assert two[rank]["world_size"] == two[rank]["on_this_machine"] == 2
        assert (two[rank]["device"], two[rank]["backend"]) == ("cpu", "gloo")
        assert two[rank]["gathered"] == [0, 1]
        assert (two[rank]["once"], two[rank]["refused"]) == ("by 0", "refused by 0")
        assert two[rank]["left"]


def test_numbers_are_handed_out_once_in_total(two):
    first, second = two[0]["taken"], two[1]["taken"]
    assert sorted(first + second) == list(range(100))
    assert first == sorted(first) and second == sorted(second)
    assert first and second


def test_messages_of_the_second_process_arrive_once_at_the_first(two):
    assert two[0]["messages"] == [str(number) for number in two[1]["taken"]] + ["end"]
    assert two[0]["late"] == []
    assert two[0]["large"] == [2**22]


def test_the_reason_reaches_both(two):
    assert [found["open"] for found in two] == [None, None]
    assert [found["closed"] for found in two] == ["all done", "all done"]
    assert [found["other"] for found in two] == [None, None]


# --- Processes started here ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    """Addresses, as the system shows them, that this process listens on."""
    inodes = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(handle))
        except FileNotFoundError:  # the one that lists this folder
            continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def act(config: tuple[str, str], processes: Processes) -> None:
    """What each started process does; `config` is (what, where to)."""
    what, folder = config
    own = Path(folder, f"rank{processes.rank}")
    last = processes.rank == processes.world_size - 1
    if what == "share":
        value = processes.broadcast(nested() if processes.is_first else None)
        processes.sum(torch.ones(1))
        # A thread's own connection goes on while another call waits in the shared one.
        connection = processes.connect("test", timeout=timedelta(seconds=5))
        connection.set(f"{processes.rank}", "here")
        processes.wait()
        found = {"same": same(value, nested()), "listening": listening(), "others": connection.get("0").decode()}
        found["start method"] = multiprocessing.get_start_method()
        found["threads"] = torch.get_num_threads()
        own.write_text(json.dumps(found))
        processes.wait()  # the first process keeps what the others read
    elif what == "killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raises" and last:
        raise ValueError("an accident")
    elif what == "diverges" and last:
        raise SystemExit(3)
    elif what in ("killed", "raises", "diverges"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that hangs in a collective
        time.sleep(60)
    elif what == "paused" and last:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "paused":
        time.sleep(1)
        raise SystemExit(1)
    elif what == "one stops":
        raise SystemExit(STOPPED if last else 0)
    elif what == "one never stops" and last:
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
    elif what == "bad input":
        raise UserError("data.train_dataset: there is none.")


def started(what: str, folder: Path) -> int:
    """Status of the launch of two processes."""
    return launch(act, (what, str(folder)), world_size=2, address="localhost", port=free_port())


def fork(name: str) -> Any:
    """Instead of `get_context`, to save each process the import of PyTorch."""
    return multiprocessing.get_context("fork")


@pytest.fixture
def short(monkeypatch):
    """Little patience with processes that do not end, and no launcher."""
    monkeypatch.setattr(distributed, "FAILED_SECONDS", 0.5)
    monkeypatch.setattr(distributed, "STOPPED_SECONDS", 0.5)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_started_processes_share_and_listen_on_this_machine_only(tmp_path, short, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert started("share", tmp_path) == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        assert found["same"] and found["others"] == "here"
        # What they start, loader workers, starts as it would without them: spawned ones take seconds.
        assert found["start method"] == multiprocessing.get_start_method()
        assert found["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)  # cores are shared, not fought over
        assert found["listening"], "the first process at least keeps a store"
        loopback = ("0100007F:", "00000000000000000000000001000000:")
        assert all(address.startswith(loopback) for address in found["listening"])


@pytest.mark.parametrize(
    "what,status,line",
    [
        (
            "killed",
            1,
            "error: process 1 of 2 was killed by SIGKILL (the system does that when memory runs out); the others",
        ),
        ("raises", 1, "error: process 1 of 2 ended with status 1; the others are ended."),
        ("diverges", 3, None),
        ("bad input", 2, "error: data.train_dataset: there is none."),
        ("paused", 1, "error: process 0 of 2 ended with status 1; the others are ended."),
        ("one stops", STOPPED, None),
        ("one never stops", 1, "error: process 1 of 2 did not stop within 0.5 s of the others and is ended."),
    ],
)
def test_how_processes_end(tmp_path, short, monkeypatch, capfd, what, status, line):
    monkeypatch.setattr(distributed.mp, "get_context", fork)
    begin = time.monotonic()
    assert started(what, tmp_path) == status
    assert time.monotonic() - begin < 30
    errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == (line is not None) and (line is None or errors[0].startswith(line))


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
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, ends, backend, left):
    """NCCL destroys its communicators when all processes ask for it: the others do not, after the failure of one."""
    done = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    with pytest.raises(type(ends)) if ends else nullcontext():
        with distributed._joined(0, 2, distributed.dist.HashStore(), device=device):
            if ends:
                raise ends
    assert done == [left]


def test_a_failure_is_not_replaced_by_one_of_leaving(monkeypatch):
    def fail():
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_abort_process_group", fail)
    with pytest.raises(UserError, match="bad input"):
        with distributed._joined(0, 2, distributed.dist.HashStore(), device=torch.device("cuda")):
            raise UserError("bad input")


def test_a_launcher_that_tells_less_than_torchrun(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_rank() == 1 and Processes(1, 2, torch.device("cpu")).on_this_machine == 2


def start_waiting(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A parent of two processes that wait for a request to stop, and their numbers."""
    code = f"""if __name__ == "__main__":
        import sys
        from tests.common.test_distributed import Path, distributed, fork, started
        distributed.mp.get_context = fork
        sys.exit(started("waits", Path({str(folder)!r})))"""
    (folder / "script.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, folder / "script.py"], cwd=ROOT, env=env, start_new_session=True)
    files, end = [folder / f"rank{rank}" for rank in range(2)], time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return parent, [int(file.read_text()) for file in files]


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number,group", [(signal.SIGUSR1, False), (signal.SIGINT, True)])
def test_a_request_to_the_parent_reaches_all(tmp_path, number, group):
    """To the parent alone, or to all of the group as a Ctrl-C at the terminal."""
    parent, children = start_waiting(tmp_path)
    (os.killpg if group else os.kill)(parent.pid, number)
    assert parent.wait(timeout=20) == STOPPED
    assert [(tmp_path / f"rank{rank}.reason").read_text() for rank in range(2)] == [number.name] * 2
    assert all(map(ended, children))


def test_a_second_ctrl_c_ends_all_at_once(tmp_path):
    (tmp_path / "deaf").touch()
    parent, children = start_waiting(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(1.2)
    assert parent.poll() is None
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=5) == 130
    assert all(map(ended, children))


def test_a_request_before_the_processes_are_ready(tmp_path, short, monkeypatch):
    """It waits for them: they take seconds to start, the signal comes at once, and there is nothing to save."""
    monkeypatch.setattr(distributed, "STOPPED_SECONDS", 60.0)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    assert started("waits", tmp_path) == STOPPED
    timer.join()


def test_children_of_a_killed_parent_end(tmp_path):
    parent, children = start_waiting(tmp_path)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while not all(map(ended, children)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_single_process_interrupted_has_the_status_of_shells(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def main(config, processes):
        raise KeyboardInterrupt

    assert launch(main, None, world_size=1, address="localhost", port=1) == 130


def test_check_rendezvous():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address, port in (("127.0.0.1", taken.getsockname()[1]), ("192.0.2.1", free_port())):
            with pytest.raises(UserError, match=f"dist.address, dist.port: .*{address}"):
                check_rendezvous(address, port)
    check_rendezvous("localhost", free_port())


def test_broadcast_alone(alone):
    value = nested()
    assert alone.broadcast(value) is value
