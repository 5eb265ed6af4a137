"""What the processes of an evaluation share, alone and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.processes import Processes, joined, local_rank, under_torchrun
from evaluation.board import Board

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alone(monkeypatch):
    """The only process of a run, whatever started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined(device=torch.device("cpu")) as processes:
        yield processes


# --- Alone ---


def test_joined_alone(alone):
    assert (alone.rank, alone.world_size, alone.device) == (0, 1, torch.device("cpu"))
    assert alone.is_first and not under_torchrun() and local_rank() == 0
    assert not torch.distributed.is_initialized()
    assert alone.gather("value") == ["value"]


def test_board_numbers_are_handed_out_once(alone):
    board, same = Board(alone, "board"), Board(alone, "board")
    assert [board.take(), board.take(), same.take(), board.take()] == [0, 1, 2, 3]


def test_board_messages_arrive_once_in_order(alone):
    board = Board(alone, "board")
    assert board.messages() == []
    board.post(b"one")
    board.post(b"")
    Board(alone, "board").post(b"\x00\xff three")
    assert board.messages() == [b"one", b"", b"\x00\xff three"]
    assert board.messages() == []
    board.post(b"four")
    assert board.messages() == [b"four"]


def test_board_large_messages(alone):
    board, message = Board(alone, "board"), os.urandom(2**22)
    board.post(message)
    assert board.messages() == [message]


@pytest.mark.parametrize("reason", ["", "eval.out: zu groß …"])
def test_board_close(alone, reason):
    board = Board(alone, "board")
    assert board.closed() is None
    assert board.closed() is None
    board.close(reason)
    assert board.closed() == Board(alone, "board").closed() == reason


def test_board_keeps_the_first_reason(alone):
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
import torch
import torch.distributed as dist
from common.errors import UserError
from common.processes import joined, local_rank, under_torchrun
from evaluation.board import Board

COUNT = 100

def refuse():
    raise UserError(f"refused by {os.environ['RANK']}")

def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)

assert under_torchrun() and not dist.is_initialized()
with joined(device=torch.device('cpu')) as processes:
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


@pytest.mark.slow
def test_joined_under_torchrun(two):
    for rank in range(2):
        assert two[rank]["rank"] == two[rank]["local_rank"] == rank
        assert two[rank]["world_size"] == two[rank]["on_this_machine"] == 2
        assert (two[rank]["device"], two[rank]["backend"]) == ("cpu", "gloo")
        assert two[rank]["gathered"] == [0, 1]
        assert (two[rank]["once"], two[rank]["refused"]) == ("by 0", "refused by 0")
        assert two[rank]["left"]


@pytest.mark.slow
def test_board_numbers_are_handed_out_once_in_total(two):
    first, second = two[0]["taken"], two[1]["taken"]
    assert sorted(first + second) == list(range(100))
    assert first == sorted(first) and second == sorted(second)
    assert first and second


@pytest.mark.slow
def test_board_messages_of_the_second_process_arrive_once_at_the_first(two):
    assert two[0]["messages"] == [str(number) for number in two[1]["taken"]] + ["end"]
    assert two[0]["late"] == []
    assert two[0]["large"] == [2**22]


@pytest.mark.slow
def test_board_reason_reaches_both(two):
    assert [found["open"] for found in two] == [None, None]
    assert [found["closed"] for found in two] == ["all done", "all done"]
    assert [found["other"] for found in two] == [None, None]
