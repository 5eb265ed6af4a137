"""Processes and ports, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.forkserver import end_children


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended, but that nobody has waited for, does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    """Return when it holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)


def in_a_child(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises, in a forked process: for what leaves traces, such as DataLoader's signal handler."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def run() -> None:
        try:
            theirs.send((True, action()))
        except Exception as error:
            theirs.send((False, error))
        finally:
            end_children()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    try:
        done, result = ours.recv()
    finally:
        process.join()
    if not done:
        raise result
    return result
