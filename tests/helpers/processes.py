"""Test helpers for processes and ports."""

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
    """Return whether the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    """Return when the condition is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"condition not true within {seconds:g} s"
        time.sleep(0.02)


def in_a_child(action: Callable[[], Any]) -> Any:
    """Run `action` in a forked process and return or raise its outcome; for global side effects such as signal handlers."""
    receiver, sender = multiprocessing.get_context("fork").Pipe()

    def run() -> None:
        try:
            sender.send((True, action()))
        except Exception as error:
            sender.send((False, error))
        finally:
            end_children()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sender.close()
    try:
        done, result = receiver.recv()
    finally:
        process.join()
    if not done:
        raise result
    return result
