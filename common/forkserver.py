"""The server that processes are forked from, and how they end with the process that started them. Imports no PyTorch.

A process forked from a server that has imported PyTorch, but used nothing of it, starts at once and can open a GPU.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a program to stop
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start_fork_server(*modules: str) -> None:
    """Start the server, which imports `modules` while this process continues; without effect where it runs already.

    Forked processes get the environment as it is now, and `SIGNALS` blocked: see `settle`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["common.ends_with_parent", *modules])
    resource_tracker.ensure_running()  # its start would undo the mask
    before = os.environ.get("PYTHONPATH")
    # Python 3.11's server searches the modules in the current folder only.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # Ctrl-C, and Slurm's signals to every process of a job, must not end the server: its processes would end with it.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def settle() -> None:
    """The first call of a forked process, once its signal handlers are set: it ends with its parent and receives `SIGNALS`."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_children() -> None:
    """Kill what this process has forked, at its own end: loader workers take SIGTERM calmly (see `data.loader`)."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise here
    for child in multiprocessing.active_children():
        child.kill()


def end_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends, however that ends (Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before the kernel knew
        os._exit(1)
