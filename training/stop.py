"""Asking a run to stop: a signal, a file in its folder, the end of the job."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from common.forkserver import SIGNALS

if TYPE_CHECKING:
    from common.processes import Processes

STOPPED = 75  # exit status: ended on request with everything saved (EX_TEMPFAIL of sysexits.h: try again later)
# Signals closer together are one request: a Ctrl-C reaches a process and comes from its parent too.
REPEAT_SECONDS = 1.0
PATIENCE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's seconds from SIGTERM to SIGKILL; not in PyTorch 2.6
STOP_FILE_SECONDS = 1.0  # between two looks at the stop file, which may lie on a slow network disk


def leave_on_signals() -> None:
    """Handle `SIGNALS` outside of a run: before it the process exits with `STOPPED`, after it they change nothing any more."""

    def leave(number: int, frame: FrameType | None) -> None:
        if not StopRequest.begun:
            sys.exit(STOPPED)

    for number in SIGNALS:
        signal.signal(number, leave)


def end_of_job(margin_minutes: float) -> float | None:
    """When to stop so that everything is saved before Slurm ends the job, in Unix seconds; None outside of Slurm."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - 60 * margin_minutes if end.isdigit() else None


def patience_of_torchrun() -> float:
    """Seconds that torchrun gives its processes after SIGTERM."""
    from common.processes import torchrun_can_wait

    return float(os.environ.get(PATIENCE_VARIABLE, 30) if torchrun_can_wait() else 30)


class StopRequest:
    """Whether the run was asked to stop. A context, to be entered in the main thread: signals only ask while it lasts.

    SIGTERM, SIGINT and SIGUSR1 ask for a stop. Under torchrun SIGUSR1 is left alone: it would end torchrun itself, which
    passes only SIGTERM and SIGINT on. In a run of one process a second SIGINT, at least a second after the first, raises
    KeyboardInterrupt; the parent of several started processes does the same for them.

    Args:
        file: its existence asks for a stop; only the first process looks, at most once a second.
        end_time: unix time in seconds from which on a stop is asked for; only the first process looks.
    """

    begun: ClassVar[bool] = False  # whether a run of this process has taken signals over

    def __init__(self, processes: Processes, *, file: Path | None, end_time: float | None) -> None:
        self._processes = processes
        self._file = file if processes.is_first else None
        self._end_time = end_time if processes.is_first else None
        self._reason: str | None = None
        self._signal: int | None = None
        self._interrupted: float | None = None  # when the first SIGINT came
        self._looked = float("-inf")
        self._posted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        StopRequest.begun = True
        for number in SIGNALS:
            if number != signal.SIGUSR1 or not self._processes.from_launcher:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def here(self) -> str | None:
        """Why this process was asked to stop; None if it was not. Cheap enough for every step."""
        if self._reason is None:
            self._reason = self._look()
        return self._reason

    def anywhere(self) -> str | None:
        """Why any process of the run was asked to stop; None if none was.

        Costs one exchange with the first process and waits for no other, so processes may learn of it at different calls.
        """
        store, reason = self._processes.store, self.here()
        if reason is not None and not self._posted:
            if store.add("stop/asked", 1) == 1:
                store.set("stop/reason", reason)
            self._posted = True
        return store.get("stop/reason").decode() if store.add("stop/asked", 0) else None

    def clear_file(self) -> None:
        """Remove the stop file, once the state is saved: the next start must not meet it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _look(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._end_time is not None and time.time() >= self._end_time:
            return f"the end of the job, before which it stops at {time.strftime('%H:%M:%S', time.localtime(self._end_time))}"
        if self._file is not None and time.monotonic() - self._looked >= STOP_FILE_SECONDS:
            self._looked = time.monotonic()
            if self._file.exists():
                return f"the file {self._file}"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted >= REPEAT_SECONDS and self._processes.world_size == 1:
                raise KeyboardInterrupt
        self._signal = self._signal or number
