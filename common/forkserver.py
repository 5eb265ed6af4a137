"""The server that processes are forked from, and how they end with the process that started them. Imports no PyTorch.

A process forked from a server that has imported PyTorch, but used nothing of it, starts at once and can open a GPU.
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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a program to stop
PARENT = "FORK_SERVER_PARENT"  # in the server's environment: the process that started it
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start_fork_server(*modules: str) -> None:
    """Start the server, which imports `modules` while this process continues; without effect where it runs already.

    Forked processes get the environment as it is now, and `SIGNALS` blocked: see `settle`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["common.ends_with_parent", *modules])
    resource_tracker.ensure_running()  # its start would undo the mask
    # Python 3.11's server searches the modules in the current folder only.
    changed = {"PYTHONPATH": os.pathsep.join(sys.path), PARENT: str(os.getpid())}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with signals_blocked():  # its processes would end with it
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started meanwhile have `SIGNALS` blocked: Ctrl-C, torchrun and Slurm send them to every process of a job."""
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def settle() -> None:
    """The first call of a forked process, once its signal handlers are set: it ends with its parent and receives `SIGNALS`."""
    end_with_parent(os.getppid())
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGKILL to this process when its parent, process `parent`, ends, however that ends (Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(1)


def end_children() -> None:
    """Kill what this process has forked, at its own end: loader workers never receive SIGTERM (see `data.loader`)."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise here
    for child in multiprocessing.active_children():
        child.kill()
