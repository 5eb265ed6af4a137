"""Starts the processes of a training run, and determines their exit status.

Under torchrun the processes exist already. Processes started here with torch.multiprocessing are all on this machine: they use its
loopback interface, and `dist.address` for their store.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.multiprocessing as mp

from common.errors import UserError, blame, describe
from common.forkserver import SIGNALS, end_children, settle, start_fork_server
from common.processes import (
    TIMEOUT,
    LostProcess,
    Processes,
    check_processes,
    connect_store,
    is_of_the_engine,
    joined,
    open_store,
    under_torchrun,
)
from data.loader import dead_worker
from training.stop import REPEAT_SECONDS, STOPPED, StopRequest, leave_on_signals

INTERRUPTED = 130  # exit status: ended at once by Ctrl-C, the value that shells report
_VERDICT = "verdict"  # key in the store: exit status and reason of the process that failed first
GRACE_SECONDS = 10.0  # time for the other processes to end by themselves, before SIGTERM and before SIGKILL

Main = Callable[[Any, Processes], None]


def launch(main: Main, config: Any, *, world_size: int, address: str, port: int, timeout: timedelta = TIMEOUT) -> int:
    """Run `main(config, processes)` in the requested number of processes, and wait for all.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the started processes, whose `main` can treat them as a request to stop. A
    second SIGINT kills them.

    Args:
        main: a module-level function; the started processes import it by name.
        config: picklable.
        world_size: number of processes; ignored under torchrun, which has started them.
        address, port: address of the store of started processes; port 0 takes a free one.
        timeout: longest wait for the other processes, at the start and in each collective.

    Returns:
        Exit status: 0; `STOPPED` if the processes exited with it; `INTERRUPTED`; else that of the first process that failed (the
        others are then ended). It is 1 for a process killed by a signal.

    Raises:
        UserError: too many processes, or an unusable address; in a run of one process also errors from `main`.
    """
    with blame("dist.world_size"):
        check_processes(world_size)
    try:
        if under_torchrun():
            with joined(timeout=timeout) as processes:
                main(config, processes)
        elif world_size == 1:
            main(config, Processes.alone())
        else:
            with blame("dist.address, dist.port"):
                store = open_store(address, port, timeout)
            return _start(main, config, world_size, store, timeout)
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if (reason := dead_worker(error)) is None:
            raise
        print(f"error: {reason}; the same command resumes.", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _start(main: Main, config: Any, world_size: int, store: Any, timeout: timedelta) -> int:
    start_fork_server("training.trainer")
    children: list[Any] = []
    asked: list[tuple[int, float]] = []  # signals, and the times when they came

    def pass_on(number: int) -> None:
        interrupts = [at for sent, at in asked if sent == signal.SIGINT]
        again = len(interrupts) > 1 and interrupts[-1] - interrupts[0] >= REPEAT_SECONDS
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL if again else number)

    def note(number: int, frame: FrameType | None) -> None:
        asked.append((number, time.monotonic()))
        pass_on(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    StopRequest.begun = True  # from here on the started processes handle signals
    try:
        method = multiprocessing.get_start_method(allow_none=True)
        arguments = (main, config, world_size, (store.host, store.port), timeout, method, dict(os.environ))
        context = mp.start_processes(_run, arguments, world_size, join=False, start_method="forkserver")
        children += context.processes
        for number, _ in list(asked):  # signals that came before there were children
            pass_on(number)
        try:
            while not context.join(grace_period=GRACE_SECONDS):
                pass
            return 0
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            return _verdict(error, [child.exitcode for child in children], asked, store)
    finally:
        for child in children:
            child.kill()
            child.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _verdict(
    error: mp.ProcessExitedException | mp.ProcessRaisedException,
    exitcodes: list[int],
    asked: list[tuple[int, float]],
    store: Any,
) -> int:
    """Return the exit status of a run with a failed process; print the reason if that process could not."""
    first, count = error.error_index, len(exitcodes)
    code, signals = exitcodes[first], {number for number, _ in asked}
    interrupts = [at for number, at in asked if number == signal.SIGINT]
    if interrupts and interrupts[-1] - interrupts[0] >= REPEAT_SECONDS:
        return INTERRUPTED
    status, text = 1, ""
    if code == STOPPED or -code in signals:  # a signal ends a process that has nothing to save yet
        killed = [str(rank) for rank, other in enumerate(exitcodes) if other < 0 and -other not in signals]
        if not killed:
            return STOPPED
        text = f"process {', '.join(killed)} of {count} did not stop with the others and was ended."
    elif code < 0:
        memory = " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
        text = f"process {first} of {count} was killed by {signal.Signals(-code).name}{memory}; the others were ended."
    elif store.check([_VERDICT]):
        status, text = json.loads(store.get(_VERDICT))
    elif isinstance(error, mp.ProcessRaisedException):
        text = error.msg.strip()
    else:
        text = f"process {first} of {count} exited with status {code}; the others were ended."
    if text:
        print(f"error: {text}", file=sys.stderr, flush=True)
    return status


def _run(
    rank: int,
    main: Main,
    config: Any,
    world_size: int,
    rendezvous: tuple[str, int],
    timeout: timedelta,
    start_method: str | None,
    environment: dict[str, str],
) -> None:
    """Run `main` in a started process, and exit."""
    for number in SIGNALS:  # there is nothing to save while the processes join
        signal.signal(number, signal.SIG_DFL)
    settle()
    # Else it would be the start method of this process: loader workers would import everything again, for seconds each.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # all processes are on this machine
        os.environ.setdefault(name, "lo")
    if "OMP_NUM_THREADS" not in os.environ:
        # By default each process uses all cores. Several threads per core slow each other down tenfold and more.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    store = connect_store(*rendezvous, timeout)

    def report(status: int, reason: str) -> None:
        store.compare_set(_VERDICT, "", json.dumps([status, reason]))  # only the first report counts

    status: int | str | None = 1
    try:
        with joined(timeout=timeout, store=store, rank=rank, world_size=world_size) as processes:
            leave_on_signals()
            # Report before the others can notice that this process leaves.
            try:
                main(config, processes)
            except UserError as error:
                report(2, str(error))
                raise
            except SystemExit as error:
                if error.code == 3:  # diverged: the message is already printed
                    report(3, "")
                raise
            except Exception as error:
                if not isinstance(error, LostProcess) and not is_of_the_engine(error):
                    if (what := dead_worker(error)) is None:
                        traceback.print_exc()
                        what = describe(error)
                    report(1, f"process {rank} of {world_size} failed: {what}; the others were ended.")
                raise
        status = 0
    except LostProcess as error:
        report(1, str(error))
    except UserError:
        status = 2
    except SystemExit as error:
        status = error.code
    except Exception as error:
        report(1, f"process {rank} of {world_size} failed: {describe(error)}; the others were ended.")
    for number in SIGNALS:  # the exit status is fixed now
        signal.signal(number, signal.SIG_IGN)
    end_children()
    sys.exit(status)
