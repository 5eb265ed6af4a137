"""Programs that are killed: all their processes can be found, and none may outlive the one that was killed.

Linux only (processes are found in /proc).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import TAIL, environment
from common.errors import UserError
from common.provenance import PROJECT

MARK = "KILLS_BENCHMARK_MARK"  # in the environment of every process of a run, so that none is overlooked
PATIENCE = 40.0  # seconds that processes have to notice that another one is gone
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Death:
    """What followed a kill.

    Attributes:
        seconds: until the last process of the run had ended.
        left: processes that still ran after `PATIENCE` seconds and were ended then.
    """

    seconds: float
    left: int


class Run:
    """One start of a Python program in the project's root; leaving the `with` block ends it.

    Args:
        arguments: the program and its flags.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._program, self._mark = arguments[0], uuid.uuid4().hex
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=environment(**{MARK: self._mark}),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """End it where the benchmark itself is interrupted."""
        if self._process.poll() is None:
            self.kill()

    @property
    def main(self) -> int:
        """The number of the main process."""
        return self._process.pid

    def ends_before(self, seconds: float | None) -> bool:
        """Wait so long, or without end; returns whether the main process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def check(self) -> None:
        """Raise UserError if it failed."""
        if self._process.returncode != 0:
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")[-TAIL:]
            raise UserError(f"{self._program} ended with status {self._process.returncode}: {text}")

    def children(self) -> list[int]:
        """The processes that the main one has started, without multiprocessing's own."""
        found = []
        for number in marked(self._mark):
            with contextlib.suppress(OSError):  # gone meanwhile
                parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
                own = b"resource_tracker" in Path(f"/proc/{number}/cmdline").read_bytes()
                if parent == self.main and not own:
                    found.append(number)
        return found

    def kill(self, victim: int | None = None) -> Death | None:
        """Kill one process and see that all others end, or end them; None where the run had just come to its end by itself.

        Args:
            victim: by default the main process.
        """
        begin = time.perf_counter()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.main if victim is None else victim, signal.SIGKILL)
        self.ends_before(PATIENCE)
        status = self._process.returncode
        if status == 0 or (victim in (None, self.main) and status != -signal.SIGKILL):
            return None
        while (left := marked(self._mark)) and time.perf_counter() - begin < PATIENCE:
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - begin
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        return Death(seconds, len(left))


def marked(mark: str) -> list[int]:
    """The running processes whose environment holds the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile
            if wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found
