"""Work queue: each worker process takes the next open task; a task whose worker dies is given to another worker.

Workers are forked from a server process that has only imported the modules they need. So they start fast and can open a GPU.
They end with this process, however it ends. Under torchrun, every process runs this loop with its own worker, and all processes
take tasks from one `Board`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from common.errors import UserError
from common.forkserver import settle, start_fork_server

MOST_FAILURES = 3
WORKER_POLL_SECONDS = 1.0

# In the worker: (task, note) → result; `note(text)` reports progress.
Handler = Callable[[Any, Callable[[str], None]], Any]


class TaskFailed(Exception):
    """A task failed three times, or no worker can start; the message contains the last cause."""


def prepare_workers(*modules: str) -> None:
    """Start the server that workers are forked from; it imports `modules` in the background.

    Workers get the current environment variables.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
    start_fork_server(*modules)


def run_tasks(
    take: Callable[[], Any], *, slots: Sequence[Any], setup: Callable[..., Handler], arguments: tuple[Any, ...]
) -> Iterator[tuple[str, Any, Any]]:
    """Process tasks until none is left, and yield events. Closing the generator stops the work and all workers at once.

    Args:
        take: returns the next open task, None if there is none.
        slots: one worker is started for each.
        setup: module-level function, called in each worker as `setup(slot, *arguments)`; returns the handler of tasks. All its
            arguments must be picklable.
        arguments: see `setup`.

    Yields:
        ("result", task, its result); ("note", task, progress text of its worker); ("failed", task that is given back, or None
        if a worker could not start, reason); ("tick", None, None) at least every second.

    Raises:
        UserError: raised by a worker.
        TaskFailed: a task failed `MOST_FAILURES` times, or every slot failed that many times in a row.
    """
    start_fork_server()  # unless `prepare_workers` has started it
    queue, start = _Queue(take), partial(_start, setup, arguments)
    workers: list[_Worker] = []
    try:
        for place in enumerate(slots):  # numbered, because slots may be equal
            workers.append(start(place))
        while workers:
            yield "tick", None, None
            ready = multiprocessing.connection.wait([w.connection for w in workers], timeout=WORKER_POLL_SECONDS)
            for worker in [w for w in workers if w.connection in ready]:
                kind, content = worker.receive()
                if kind == "note":
                    yield kind, worker.task, content
                elif kind == "bad input":
                    raise UserError(content)
                elif kind == "failed":
                    worker.stop()
                    workers.remove(worker)
                    if worker.task is not None:
                        queue.give_back(worker.task, worker.slot, content)
                    yield kind, worker.task, content
                    if worker.failures < MOST_FAILURES - 1:
                        workers.append(start(worker.slot, worker.failures + 1))
                    elif not workers and queue.next(worker.slot, alone=True) is not None:
                        what = "workers could not start" if worker.task is None else "workers failed"
                        raise TaskFailed(f"{what} {MOST_FAILURES} times; the last time: {content}")
                else:  # "ready" or "result": the worker waits for a task
                    if kind == "result":
                        yield kind, worker.task, content
                        worker.failures = 0
                    worker.give(queue.next(worker.slot, alone=len(workers) == 1))
                    if worker.task is None:
                        workers.remove(worker)
                        worker.stop()
    finally:
        for worker in workers:
            worker.stop()


class _Queue:
    """Open tasks; tasks that failed in another slot come first, because they may succeed in this one."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take
        self._given_back: list[tuple[Any, Any]] = []
        self._failures: Counter[Any] = Counter()

    def next(self, slot: Any, *, alone: bool) -> Any:
        """Return a task for this slot; a task that failed in this slot only if no other worker is left (`alone`)."""
        for entry in self._given_back:
            if alone or entry[1] != slot:
                self._given_back.remove(entry)
                return entry[0]
        return self._take()

    def give_back(self, task: Any, slot: Any, reason: str) -> None:
        self._failures[task] += 1
        if self._failures[task] == MOST_FAILURES:
            raise TaskFailed(f"{task} failed {MOST_FAILURES} times; the last time: {reason}")
        self._given_back.append((task, slot))


@dataclass
class _Worker:
    """A worker process and its current task; `failures`: failures of its slot since the last result."""

    slot: Any
    failures: int
    process: BaseProcess
    connection: Connection
    task: Any = None

    def receive(self) -> tuple[str, Any]:
        """Return its next message; for a dead worker, the cause."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # OSError: it died while sending
            self.process.join()
            return "failed", _cause_of_death(self.process.exitcode)

    def give(self, task: Any) -> None:
        self.task = task
        if task is not None:
            with suppress(ConnectionError):  # a dead worker is handled by receive()
                self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _start(setup: Callable[..., Handler], arguments: tuple[Any, ...], slot: Any, failures: int = 0) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    # Not daemonic, because a worker may start decoding processes.
    process = context.Process(target=_work, args=(there, setup, slot[1], arguments), daemon=False)
    process.start()
    there.close()
    return _Worker(slot, failures, process, here)


def _work(connection: Connection, setup: Callable[..., Handler], slot: Any, arguments: tuple[Any, ...]) -> None:
    """Run a worker process: set up, then handle tasks until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops the workers
    settle()
    try:
        handle = setup(slot, *arguments)
        connection.send(("ready", None))
        while True:
            task = connection.recv()
            connection.send(("result", handle(task, lambda text: connection.send(("note", text)))))
    except UserError as error:
        connection.send(("bad input", str(error)))
    except EOFError:
        pass  # the parent has ended
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    signal.pause()  # wait until the parent has read the message and kills this process


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"its worker exited with status {exitcode}"
    name = signal.Signals(-exitcode).name
    memory = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"its worker was killed by {name}{memory}"
