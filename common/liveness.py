"""A process of a run that dies or hangs ends the others, with the reason, instead of leaving them waiting."""

from __future__ import annotations

import json
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from traceback import walk_stack
from types import FrameType, TracebackType

from common import distributed
from common.distributed import Processes

MOST_SECONDS = 2.0  # between two reports of a process
LAST_SECONDS = 10.0  # for the last words of a process that ends: its files or its terminal may be what hangs
PROJECT = Path(__file__).resolve().parents[1]
WAITING = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/")  # where a call waits for other processes


@dataclass(frozen=True)
class _Report:
    """What one process tells the others."""

    number: int  # of reports so far: each differs from the one before
    host: str
    doing: str
    step: int
    beats: int
    age: float  # seconds since the last beat
    place: str  # in the source, of the main thread
    waits: bool  # there for other processes
    left: str | None  # how the process has left, if it has


class Liveness:
    """Watches that this process and all others move on. A context, to be entered in the main thread of every process.

    When the main thread has not called `beat` for `timeout` seconds, the process prints which one holds up the run and ends
    with status 1, which ends the others too. Seconds in which this process itself was paused do not count.

    Args:
        processes: this process among all of the run.
        timeout: seconds; longer than anything between two beats, and shorter than the time-out of a collective.
        on_dead: called with the reason in every process about to end, in another thread than the main one, for at most
            10 s.

    Raises:
        RuntimeError: the first process cannot be reached.
    """

    def __init__(
        self, processes: Processes, *, timeout: float, on_dead: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._processes, self._timeout, self._on_dead = processes, timeout, on_dead
        self._interval = min(timeout / 10, MOST_SECONDS)
        self._host = socket.gethostname()
        self._now = 0.0  # seconds by the ticks of our own thread, which stand still while the process is paused
        self._answered = 0.0  # when the store last did
        self._last = ("starting", 0, 0, 0.0)  # doing, step, number and time of the last beat
        self._seen: dict[int, tuple[_Report, float]] = {}  # the newest report of each process, and when it came
        self._reports = 0
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Liveness:
        self._main = threading.get_ident()
        self._store = self._processes.connect("liveness", timeout=timedelta(seconds=LAST_SECONDS))
        self._exchange()
        for work in (self._tick, self._keep_exchanging):
            self._threads.append(threading.Thread(target=work, daemon=True, name="liveness"))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        # Each may hang in a call of a first process that no longer answers.
        for thread in self._threads:
            thread.join(timeout=self._interval)
        if any(thread.is_alive() for thread in self._threads):
            return
        try:
            self._post(left=f" with {kind.__name__}: {error}" if kind is not None else "")
        except RuntimeError:
            pass  # the first process has left before: nobody is there to read it

    def beat(self, doing: str, step: int) -> None:
        """The main thread begins something: `doing` ("loading images"), in optimiser step `step`. Costs microseconds."""
        self._last = (doing, step, self._last[2] + 1, self._now)

    def explain(self) -> str | None:
        """After a failed collective: which processes are missing, in a sentence; None if all report. Takes up to 6 s."""
        if self._processes.world_size > 1:
            time.sleep(3 * self._interval)
        absent = self._absent(2.5 * self._interval)
        return _capitalised(f"{self._describe(absent)}.") if absent else None

    # --- The two threads. Only the exchange may block, so the clock does not share its thread.

    def _tick(self) -> None:
        tick = min(self._interval / 2, 0.5)
        while not self._over.wait(tick):
            self._now += tick
            if self._now - self._last[3] >= self._timeout:
                self._end(None)

    def _keep_exchanging(self) -> None:
        while not self._over.wait(self._interval):
            try:
                reason = self._exchange()
            except RuntimeError:
                return  # the connection is lost for good; `_absent` notices
            if reason is not None:
                self._end(reason)

    def _exchange(self) -> str | None:
        """Post and read reports; returns why the run is over, if another process has said that it is."""
        self._post(left=None)
        ranks = [
            rank for rank in range(self._processes.world_size) if rank in self._seen or self._store.check([f"{rank}"])
        ]
        for rank, raw in zip(ranks, self._store.multi_get([f"{rank}" for rank in ranks])):
            report = _Report(**json.loads(raw))
            if rank not in self._seen or self._seen[rank][0].number != report.number:
                self._seen[rank] = (report, self._now)
        self._answered = self._now
        return self._store.get("reason").decode() if self._store.check(["reason"]) else None

    def _post(self, *, left: str | None) -> None:
        self._reports += 1
        doing, step, beats, at = self._last
        place, waits = _where(sys._current_frames().get(self._main))
        report = _Report(self._reports, self._host, doing, step, beats, self._now - at, place, waits, left)
        self._store.set(f"{self._processes.rank}", json.dumps(asdict(report)))

    # --- The end

    def _end(self, reason: str | None) -> None:
        """End the process, for a reason found here or (given) by another process."""
        if not self._ending.acquire(blocking=False):
            return
        last_words = threading.Thread(target=self._say, args=(reason,), daemon=True)
        last_words.start()
        last_words.join(LAST_SECONDS)
        os._exit(1)

    def _say(self, reason: str | None) -> None:
        first_here = True
        own = self._diagnosis() if reason is None else reason
        if self._reachable(self._timeout / 2):  # else a call might never return
            if reason is None and self._store.add("ended", 1) == 1:
                self._store.set("reason", own)
            own = self._store.get("reason").decode()
            first_here = self._store.add(f"said on {self._host}", 1) == 1
        if first_here:  # once on every machine
            print(f"error: {own}", file=sys.stderr, flush=True)
        self._on_dead(own)
        if self._processes.is_first and self._processes.world_size > 1:
            time.sleep(3 * self._interval)  # the others read the reason here

    # --- Who holds up the run

    def _diagnosis(self) -> str:
        ranks = self._absent(self._timeout / 2) or self._behind()
        return f"The run has not moved on for {self._timeout:g} s (dist.timeout_minutes): {self._describe(ranks)}."

    def _reachable(self, silence: float) -> bool:
        return self._processes.is_first or self._now - self._answered <= silence

    def _absent(self, silence: float) -> list[int]:
        """The processes that have left, or not reported for `silence` seconds; the first one if it does not answer."""
        if not self._reachable(silence):
            return [0]
        others = [rank for rank in range(self._processes.world_size) if rank != self._processes.rank]
        left = [rank for rank in others if rank in self._seen and self._seen[rank][0].left is not None]
        silent = [rank for rank in others if rank not in left and self._silent_for(rank) > silence]
        return silent or left  # those that have left may have done so because of the silent ones

    def _behind(self) -> list[int]:
        """Among processes that all report, those that the others wait for: at the lowest step, not waiting, fewest beats."""
        order = {
            rank: (report.step, report.waits, report.beats)
            for rank, (report, _) in self._seen.items()
            if self._age(rank) > self._timeout / 2
        }
        return [rank for rank in sorted(order) if order[rank] == min(order.values())]

    def _silent_for(self, rank: int) -> float:
        return self._now - (self._seen[rank][1] if rank in self._seen else 0.0)

    def _age(self, rank: int) -> float:
        """Seconds since the last beat of a process."""
        return self._seen[rank][0].age + self._silent_for(rank)

    def _describe(self, ranks: list[int]) -> str:
        alone = self._processes.world_size == 1
        if ranks == [0] and not self._reachable(2 * self._interval):
            return f"the first process, or its machine, cannot be reached; {self._describe_one(0, alone)}"
        return "; ".join(self._describe_one(rank, alone) for rank in ranks)

    def _describe_one(self, rank: int, alone: bool) -> str:
        name = "it" if alone else f"process {rank} of {self._processes.world_size}"
        if rank not in self._seen:
            return f"{name} has never reported"
        report, _ = self._seen[rank]
        name += "" if alone else f" (on {report.host})"
        last = f"at step {report.step}, {report.doing}, in {report.place}"
        if report.left is not None:
            return f"{name} has ended{report.left}; it was at step {report.step}, {report.doing}"
        if (silent := self._silent_for(rank)) > 2.5 * self._interval:
            return f"{name} has not reported for {silent:.0f} s; then it was {last}, for {report.age:.0f} s"
        return f"{name} has been {last}, for {self._age(rank):.0f} s"


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """Where in the source a thread is, and whether it waits there for other processes."""
    if frame is None:
        return "no known place", False
    here, waits = frame, False
    for caller, _ in walk_stack(frame):  # from the innermost outwards
        file = caller.f_code.co_filename
        waits = waits or any(part in file for part in WAITING)
        if "site-packages" not in file and not file.startswith(("<", sysconfig.get_path("stdlib"))):
            here = caller
            if file != distributed.__file__:
                break
            waits = True
    file = Path(here.f_code.co_filename)
    shown = file.relative_to(PROJECT) if PROJECT in file.parents else file
    return f"{shown}, line {here.f_lineno}", waits


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
