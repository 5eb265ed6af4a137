"""A process that hangs or dies ends the others, with a sentence that names it: real processes, joined over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.distributed import Processes
from common.liveness import Liveness

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 2.0
EVENTS = {"hangs": 2, "stops": 2, "first stops": 2, "dies": 2, "raises": 2, "three": 3, "paused": 2, "alone": 1}

# Runs of a few processes, all at the same time; each process beats, then meets the others, and at step 8 something happens to
# the last one. They are forked, so that PyTorch is imported once.
SCRIPT = """
import contextlib, json, os, signal, socket, sys, time
from pathlib import Path
import torch
from common.distributed import Processes, _joined, _listener, _store, TIMEOUT
from common.liveness import Liveness

def train(event, processes, timeout):
    def on_dead(reason):
        Path(f"dead{processes.rank}").write_text(reason)
    with Liveness(processes, timeout=timeout, on_dead=on_dead) as liveness:
        for step in range(10 if event != "paused" else 40):
            liveness.beat("training", step)
            if step == 8 and event == "first stops" and processes.is_first:
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == 8 and processes.rank == processes.world_size - 1:
                happen(event)
            time.sleep(0.1)
            try:
                processes.sum(torch.ones(2))
            except RuntimeError:
                print("explained:", liveness.explain(), flush=True)
                raise SystemExit(5)

def happen(event):
    if event in ("hangs", "three", "alone"):
        time.sleep(60)  # here
    elif event == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif event == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event == "raises":
        raise ValueError("an accident")

def start(event, rank, world_size, listener, timeout):
    if pid := os.fork():
        return pid
    os.makedirs(event, exist_ok=True)
    os.chdir(event)
    for number in (1, 2):
        os.dup2(os.open(f"{'out' if number == 1 else 'err'}{rank}", os.O_CREAT | os.O_WRONLY), number)
    status = 1
    try:
        if world_size == 1:
            train(event, Processes.alone("cpu"), timeout)
        else:
            store = _store(listener.getsockname(), world_size, listener if rank == 0 else None, TIMEOUT)
            with _joined(rank, world_size, store, device=torch.device("cpu")) as processes:
                train(event, processes, timeout)
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
events, timeout = json.loads(sys.argv[1]), float(sys.argv[2])
pids = {}
for event, world_size in events.items():
    with _listener("127.0.0.1", 0) as listener:
        for rank in range(world_size):
            pids[start(event, rank, world_size, listener, timeout)] = (event, rank)
begin = time.monotonic()
time.sleep(2)
for number in (signal.SIGSTOP, signal.SIGCONT):  # longer than the limit, in the middle of that run
    for pid, (event, rank) in pids.items():
        if event == "paused":
            os.kill(pid, number)
    time.sleep(timeout + 0.5 if number == signal.SIGSTOP else 0)
found = {event: {"status": [None] * world_size, "seconds": [None] * world_size} for event, world_size in events.items()}
stopped = {("stops", 1), ("first stops", 0)}
while set(pids.values()) - stopped and time.monotonic() < begin + 30:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        event, rank = pids.pop(pid)
        found[event]["status"][rank] = os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
for pid in pids:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(found))
"""


@dataclass
class Run:
    """What the processes of one run left, by rank: None for one that never ended."""

    status: list[int | None]
    out: list[str]
    err: list[str]
    dead: list[str | None]

    @property
    def paragraph(self) -> str:
        """The one that was printed by one of the processes."""
        (found,) = [line for err in self.err for line in err.splitlines() if line.startswith("error: ")]
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", json.dumps(EVENTS), str(TIMEOUT)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for event, each in json.loads(done.stdout).items():

        def texts(name, event=event):
            paths = [folder / event / f"{name}{rank}" for rank in range(EVENTS[event])]
            return [path.read_text() if path.exists() else None for path in paths]

        found[event] = Run(each["status"], texts("out"), texts("err"), texts("dead"))
    return found


LIMIT = f"The run has not moved on for {TIMEOUT:g} s (dist.timeout_minutes): "


def place(text: str) -> str:
    """How a message names the line of the script that holds `text`."""
    (number,) = [n for n, line in enumerate(SCRIPT.splitlines(), start=1) if line.rstrip().endswith(text)]
    return f"script.py, line {number}"


@pytest.mark.parametrize("event,world_size", [("hangs", 2), ("three", 3)])
def test_a_process_that_hangs_is_named_by_all(runs, event, world_size):
    run = runs[event]
    assert run.status == [1] * world_size
    last = world_size - 1
    assert run.paragraph.startswith(f"error: {LIMIT}process {last} of {world_size} (on ")
    assert "has been at step 8, training, in " in run.paragraph and place("# here") in run.paragraph
    assert run.paragraph.count("process ") == 1  # the others wait, and are not blamed
    assert {f"error: {reason}" for reason in run.dead} == {run.paragraph}


def test_a_process_that_is_stopped_is_named(runs):
    run = runs["stops"]
    assert run.status == [1, None]
    assert run.paragraph.startswith(f"error: {LIMIT}process 1 of 2 (on ")
    assert "has not reported for 2 s; then it was at step " in run.paragraph


def test_the_first_process_that_is_stopped_is_named(runs):
    run = runs["first stops"]
    assert run.status == [None, 1]
    assert run.paragraph.startswith(
        f"error: {LIMIT}the first process, or its machine, cannot be reached; process 0 of 2 (on "
    )
    assert "then it was at step " in run.paragraph


def test_a_failed_collective_is_explained(runs):
    dies, raises = runs["dies"], runs["raises"]
    assert dies.status == [5, -9] and raises.status == [5, 1]
    assert dies.out[0].startswith("explained: Process 1 of 2 (on ") and "has not reported for 1 s" in dies.out[0]
    assert "has ended with ValueError: an accident; it was at step 8, training." in raises.out[0]


def test_a_hang_of_the_only_process(runs):
    run = runs["alone"]
    assert run.status == [1]
    assert run.paragraph.startswith(f"error: {LIMIT}it has been at step 8, training, in ")
    assert place("# here") in run.paragraph


def test_a_pause_of_all_is_no_hang(runs):
    run = runs["paused"]
    assert (run.status, run.err) == ([0, 0], ["", ""])


def test_beats_keep_a_process_alive():
    with Liveness(Processes.alone("cpu"), timeout=0.4, on_dead=lambda reason: os._exit(9)) as liveness:
        for step in range(10):
            time.sleep(0.1)
            liveness.beat("training", step)
        begin = time.perf_counter()
        for step in range(10_000):
            liveness.beat("training", step)
        assert time.perf_counter() - begin < 1.0  # 100 µs each would be far too much already
        assert liveness.explain() is None
