"""Programs that tests kill and restart. All their processes are found, and none may outlive the program. Linux only."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.provenance import PROJECT
from tests.helpers.processes import wait_until

MARK = "KILLED_PROGRAM"  # environment variable that identifies every process of a program
LIMIT = 1800.0  # seconds for a program that is not killed
MAIN_SECONDS, OTHER_SECONDS = (
    5.0,
    40.0,
)  # until all have ended after a kill: of the main process, of one that others wait for


class Program:
    """One start of a Python program in the project's root; leaving the `with` block kills its remaining processes."""

    def __init__(self, *arguments: str) -> None:
        self._mark, self._errors = uuid.uuid4().hex, tempfile.TemporaryFile()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000", MARK: self._mark}
        self.started = time.time()
        self._main = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        while left := self.processes():
            for pid in left:
                _kill(pid)
            time.sleep(0.02)
        self._main.wait()
        self._errors.close()

    def processes(self) -> dict[int, int]:
        """Return all running processes with their parents. Zombies have no environment, so they are excluded."""
        wanted, found = f"{MARK}={self._mark}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # process of another user, or already gone
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return found

    def age(self) -> float:
        """Return the seconds since the start."""
        return time.time() - self.started

    def ended(self) -> bool:
        return self._main.poll() is not None

    def wait(self) -> None:
        """Wait for the program and check that it succeeds."""
        assert self._main.wait(LIMIT) == 0, self._said()

    def kill(self, turn: int = 0) -> None:
        """Send SIGKILL to the main process (turn 0), or to a rank of a training run, if there are any.

        Ranks are grandchildren of the main process. The fork server between them is not killed: before the ranks start, a new
        one would replace it.

        Fails if the program has already ended, or if one of its processes remains.
        """
        assert not self.ended(), f"ended before it was killed: {self._said()}"
        running, main = self.processes(), self._main.pid
        victims = [main, *sorted(pid for pid, parent in running.items() if running.get(parent) == main)]
        victim = victims[turn % len(victims)]
        _kill(victim)
        seconds = MAIN_SECONDS if victim == main else OTHER_SECONDS
        end = time.monotonic() + seconds
        while (left := self.processes()) or not self.ended():
            assert time.monotonic() < end, (
                f"{seconds:g} s after killing {victim} (main: {main}), these still run: {[_name(pid) for pid in left]}"
            )
            time.sleep(0.02)
        assert self._main.returncode != 0

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]


@dataclass(frozen=True)
class Moment:
    """Time of a kill: `seconds` after the program reaches `progress`; if that is None, at most `seconds` after the start."""

    progress: int | None
    seconds: float


def random_moments(kills: int, *, start_seconds: float, progress: int, seconds: float, seed: int) -> list[Moment]:
    """Return a quarter of the moments within `start_seconds`, the others spread up to `progress`, each up to `seconds` later."""
    chance = random.Random(seed)
    starts = chance.sample(range(kills), kills // 4)
    count = kills - len(starts)
    reached = iter([int(progress * (n + chance.random()) / count) for n in range(count)])
    return [
        Moment(None, chance.uniform(0, start_seconds))
        if n in starts
        else Moment(next(reached), chance.uniform(0, seconds))
        for n in range(kills)
    ]


def kill_and_go_on(
    start: Callable[[], Program],
    moments: Sequence[Moment],
    *,
    progress: Callable[[Program], int],
    check: Callable[[], None],
    in_turn: bool = False,
) -> None:
    """Start and kill the program at each moment, then let it finish.

    Args:
        start: starts the same command at every call.
        moments: one per kill.
        progress: progress of the work on disk; -1 until this start has added to it.
        check: checks the state on disk after each kill.
        in_turn: whether the victims rotate, as in `Program.kill`; else always the main process.
    """
    done = 0
    for turn, moment in enumerate(moments):
        with start() as program:
            if moment.progress is None:
                # At the latest when it has made progress: the duration of a start depends on the load of the machine.
                wait_until(lambda: program.age() >= moment.seconds or progress(program) > done, seconds=LIMIT)  # noqa: B023
            else:
                wait_until(lambda: program.ended() or progress(program) >= moment.progress, seconds=LIMIT)  # noqa: B023
                end, came = time.monotonic() + moment.seconds, progress(program)
                # No later than the next step of progress: with a different load it may have finished by then.
                wait_until(lambda: time.monotonic() >= end or progress(program) > came, seconds=LIMIT)  # noqa: B023
            program.kill(turn if in_turn else 0)
            done = max(done, progress(program))
        check()
    with start() as program:
        program.wait()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _name(pid: int) -> str:
    """Return the command of a process, empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
