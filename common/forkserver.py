"""The fork server, and functions that end processes together with their parent. Imports no PyTorch.

A process forked from a server that has imported PyTorch without using it starts at once and can open a GPU.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # signals that ask a program to stop
PARENT = "FORK_SERVER_PARENT"  # environment variable of the server: pid of the process that started it
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start_fork_server(*modules: str) -> None:
    """Start the server, which imports `modules` while this process continues. Has no effect if it is already running.

    Forked processes get the current environment and have `SIGNALS` blocked; see `settle`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["common.ends_with_parent", *modules])
    resource_tracker.ensure_running()  # a later start would undo the signal mask
    # Python 3.11's server searches for the modules in the current folder only.
    changed = {"PYTHONPATH": os.pathsep.join(sys.path), PARENT: str(os.getpid())}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with signals_blocked():  # a signal that ends the server would end its processes
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` in processes started in this context: Ctrl-C, torchrun and Slurm send them to every process of a job."""
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def settle() -> None:
    """Make a forked process end with its parent and receive `SIGNALS`. Call this first, once its signal handlers are set."""
    end_with_parent(os.getppid())
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with_parent(parent: int) -> None:
    """Let the kernel send SIGKILL to this process when its parent, process `parent`, ends for any reason (Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)


def end_children() -> None:
    """Kill the child processes when this process ends: loader workers never receive SIGTERM (see `data.loader`)."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise here
    for child in multiprocessing.active_children():
        child.kill()
