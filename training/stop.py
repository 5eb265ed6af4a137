"""Requests to stop a run: a signal, a file in its folder, the end of the job."""

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

STOPPED = 75  # exit status: stopped on request with everything saved (EX_TEMPFAIL of sysexits.h: try again later)
# Signals within this time are one request: on Ctrl-C a process gets one directly and one from its parent.
REPEAT_SECONDS = 1.0
PATIENCE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's seconds from SIGTERM to SIGKILL; not in PyTorch 2.6
STOP_FILE_SECONDS = 1.0  # between two checks of the stop file, which may be on a slow network disk


def leave_on_signals() -> None:
    """Handle `SIGNALS` outside of a run: before it the process exits with `STOPPED`, after it they are ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        if not StopRequest.begun:
            sys.exit(STOPPED)

    for number in SIGNALS:
        signal.signal(number, leave)


def end_of_job(margin_minutes: float) -> float | None:
    """Return the Unix time in seconds at which to stop and save before Slurm ends the job; None outside of Slurm."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - 60 * margin_minutes if end.isdigit() else None


def patience_of_torchrun() -> float:
    """Return the seconds that torchrun gives its processes after SIGTERM."""
    from common.processes import torchrun_can_wait

    return float(os.environ.get(PATIENCE_VARIABLE, 30) if torchrun_can_wait() else 30)


class StopRequest:
    """Tells whether the run was asked to stop. A context manager for the main thread; signals only count inside of it.

    SIGTERM, SIGINT and SIGUSR1 ask for a stop. Under torchrun SIGUSR1 is not handled: torchrun passes only SIGTERM and SIGINT
    on, and SIGUSR1 would end torchrun itself. In a run of one process, a second SIGINT at least a second after the first raises
    KeyboardInterrupt; the parent of several started processes does the same for them.

    Args:
        file: its existence asks for a stop; only the first process checks it, at most once per second.
        end_time: Unix time in seconds from which a stop is requested; only the first process checks it.
    """

    begun: ClassVar[bool] = False  # whether a run of this process handles the signals

    def __init__(self, processes: Processes, *, file: Path | None, end_time: float | None) -> None:
        self._processes = processes
        self._file = file if processes.is_first else None
        self._end_time = end_time if processes.is_first else None
        self._reason: str | None = None
        self._signal: int | None = None
        self._interrupted: float | None = None  # time of the first SIGINT
        self._checked_at = float("-inf")
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
        """Return why this process was asked to stop; None if it was not. Cheap enough for every step."""
        if self._reason is None:
            self._reason = self._find_reason()
        return self._reason

    def anywhere(self) -> str | None:
        """Return why any process of the run was asked to stop; None if none was.

        This costs one exchange with the first process and waits for no other, so processes may get the answer at different calls.
        """
        store, reason = self._processes.store, self.here()
        if reason is not None and not self._posted:
            if store.add("stop/asked", 1) == 1:
                store.set("stop/reason", reason)
            self._posted = True
        return store.get("stop/reason").decode() if store.add("stop/asked", 0) else None

    def clear_file(self) -> None:
        """Remove the stop file after the state is saved, so that the next start does not stop too."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _find_reason(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._end_time is not None and time.time() >= self._end_time:
            return f"the end of the job (stop time {time.strftime('%H:%M:%S', time.localtime(self._end_time))})"
        if self._file is not None and time.monotonic() - self._checked_at >= STOP_FILE_SECONDS:
            self._checked_at = time.monotonic()
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
