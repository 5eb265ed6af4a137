"""Processes of one training run: how they start, what they know of each other, how they add up. The only user of torch.distributed.

Two ways lead to several processes: `training.distributed=1 dist.world_size=N` starts them here, and under `torchrun` they
exist already. NCCL joins GPUs, gloo CPUs. Processes started here are all on this machine and listen on no other address than
the one asked for.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.gpus import usable_gpus
from common.stop import REPEAT_SECONDS, SIGNALS, STOPPED

TIMEOUT = timedelta(minutes=30)
INTERRUPTED = 130  # exit status: ended at once by Ctrl-C, as shells report it
FAILED_SECONDS = 10.0  # what is left to the others when a process fails: some can still say what they miss
STOPPED_SECONDS = 120.0  # what is left to the others when a process has stopped on request: the first may be saving
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)
    start: str = ""  # name of this start of all processes, where a launcher may start them again

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> Processes:
        """The only process, on `device` or else the first GPU, or the CPU where there is none."""
        return cls(rank=0, world_size=1, device=_device(0) if device is None else torch.device(device))

    @property
    def on_this_machine(self) -> int:
        """Number of the run's processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)) if under_torchrun() else self.world_size

    @property
    def from_launcher(self) -> bool:
        """Whether a launcher such as torchrun started this run's processes."""
        return under_torchrun()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes; every process receives it."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's `value`, on every process.

        Args:
            value: dicts, lists and tuples, nested, of CPU tensors and picklable values; of the first process alone, the
                others may pass anything.

        Returns:
            On the first process `value` itself, elsewhere an equal one; tensors keep dtype, shape and every bit.
        """
        if self.world_size == 1:
            return value
        tensors: list[Tensor] = []
        plan = [_take_out(value, tensors)] if self.is_first else [None]
        dist.broadcast_object_list(plan, src=0)
        if self.is_first:
            for tensor in tensors:
                self._broadcast(tensor.contiguous().reshape(-1).view(torch.uint8))
            return value
        return _fill_in(plan[0], self._broadcast)

    def _broadcast(self, raw: Tensor) -> Tensor:
        """Bytes, as no backend knows every dtype; one tensor at a time, so that the device holds no second copy of them all."""
        staged = raw.to(self.device)
        if raw.numel():
            dist.broadcast(staged, src=0)
        return staged.cpu()

    def once_here(self, name: str, action: Callable[[], str]) -> str:
        """`action` on the first process of this machine; its result on all processes of it, which wait as long as it takes.

        Raises:
            UserError: that process met one; on all of them.
        """
        if self.on_this_machine == 1:
            return action()
        place = local_rank() if under_torchrun() else self.rank
        key = f"once/{name}/{self.rank - place}"
        if place:
            while not self.store.check([key]):
                time.sleep(POLL_SECONDS)
            done, text = json.loads(self.store.get(key))
            if not done:
                raise UserError(text)
            return text
        try:
            result = action()
        except UserError as error:
            self.store.set(key, json.dumps([False, str(error)]))
            raise
        self.store.set(key, json.dumps([True, result]))
        return result

    def connect(self, name: str, *, timeout: timedelta) -> dist.Store:
        """A connection of its own to what all processes share, under `name`: for a thread, as a call on `store` may block all
        others. `timeout` bounds the wait for a missing entry, not for a first process that is stopped."""
        shared = self.store
        while isinstance(shared, dist.PrefixStore):
            shared = shared.underlying_store
        if isinstance(shared, dist.TCPStore):
            shared = dist.TCPStore(shared.host, shared.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return dist.PrefixStore(f"{self.start}/{name}", shared)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes; the model itself where there is only one."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # newer versions of PyTorch call the argument by another name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=devices,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are the same everywhere: constants, and statistics that training averages
            )


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs in a nested value."""

    shape: torch.Size
    dtype: torch.dtype


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """A copy of `value` with a place for every tensor; the tensors are appended to `tensors` in the order of `_fill_in`."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return _Place(value.shape, value.dtype)
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_take_out(item, tensors) for item in value])
    return value


def _fill_in(plan: Any, receive: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(plan, _Place):
        empty = torch.empty(plan.shape.numel() * plan.dtype.itemsize, dtype=torch.uint8)
        return receive(empty).view(plan.dtype).reshape(plan.shape)
    if isinstance(plan, dict):
        return {key: _fill_in(item, receive) for key, item in plan.items()}
    if isinstance(plan, (list, tuple)):
        return type(plan)([_fill_in(item, receive) for item in plan])
    return plan


class Board:
    """Numbers handed out once, and messages to the first process: what a work queue needs, without any process waiting for another.

    The processes may be far apart in time, on several machines; only the first one must live as long as the others.
    """

    def __init__(self, processes: Processes, name: str) -> None:
        """The board called `name`, the same for every process that asks for it."""
        self._store = dist.PrefixStore(name, processes.store)
        self._read = 0

    def take(self) -> int:
        """The next of the numbers 0, 1, 2, …; no other process gets the same."""
        return self._store.add("taken", 1) - 1

    def post(self, message: bytes) -> None:
        """Leave a message (at most a few MB) for the first process."""
        self._store.set(f"message/{self._store.add('posted', 1)}", message)

    def messages(self) -> list[bytes]:
        """What has been posted since the last call; for the first process only."""
        found = []
        while self._read < self._store.add("posted", 0):
            self._read += 1
            found.append(self._store.get(f"message/{self._read}"))  # waits the moment between counting and writing
            self._store.delete_key(f"message/{self._read}")
        return found

    def close(self, reason: str = "") -> None:
        """Tell every process that the work is over, and why if it failed. The first reason stays."""
        if self._store.add("closed", 1) == 1:
            self._store.set("reason", reason)

    def closed(self) -> str | None:
        """None while the work goes on, then the reason it ended."""
        return self._store.get("reason").decode() if self._store.add("closed", 0) else None


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted_after_failure() -> bool:
    """Whether torchrun starts processes again that end with another status than 0 (its --max-restarts)."""
    return under_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def check_processes(world_size: int) -> int:
    """Number of processes of the run; refuses more than GPUs on a machine with GPUs, and a number other than torchrun's."""
    total = world_size
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if world_size not in (1, started):
            raise UserError(
                f"dist.world_size: {world_size} was asked for, but the launcher started {started} processes; leave it out."
            )
        total, world_size = started, int(os.environ.get("LOCAL_WORLD_SIZE", started))
    gpus = usable_gpus()
    if gpus and world_size > gpus:
        raise UserError(f"dist.world_size: {world_size} processes need as many GPUs on this machine, {gpus} visible.")
    return total


def launch(
    main: Callable[[Any, Processes], None],
    config: Any,
    *,
    world_size: int,
    address: str,
    port: int,
    timeout: timedelta = TIMEOUT,
) -> int:
    """Run `main(config, processes)` in as many processes as asked for, and wait for all.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the started processes, whose `main` may take them as a request to stop; a
    second SIGINT ends them at once.

    Args:
        main: a module-level function; the started processes import it by name.
        config: picklable.
        world_size: number of processes, ignored under torchrun, which has started them.
        address, port: where the first process listens.
        timeout: longest wait for the other processes, at the start and in each collective.

    Returns:
        Exit status: 0; `STOPPED` if a process ended with it and the others with it or 0; `INTERRUPTED`; else that of the
        first process that failed (the others are then ended), where 1 stands for one killed by a signal.
    """
    check_processes(world_size)
    if under_torchrun():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with _joined(rank, world_size, timeout=timeout) as processes:
            main(config, processes)
        return 0
    if world_size == 1:
        try:
            main(config, Processes.alone())
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0
    with _listener(address, port) as listener:
        return _spawn(main, config, world_size, listener, timeout)


def check_rendezvous(address: str, port: int) -> None:
    """Refuse an address the first process cannot listen on, which would otherwise show as a time-out of all."""
    _listener(address, port).close()


def _listener(address: str, port: int) -> socket.socket:
    """A socket bound to this address alone."""
    try:
        family, _, _, _, numeric = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(numeric)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(
            f"dist.address, dist.port: the first process cannot listen on {address}:{port} ({error.strerror or error}); "
            "expected an address of this machine and a free port."
        ) from error
    return listener


def _spawn(main: Callable, config: Any, world_size: int, listener: socket.socket, timeout: timedelta) -> int:
    context = mp.get_context("spawn")
    reported = context.Value("b", False)
    rendezvous = listener.getsockname()[:2]
    children = []
    with _noted_signals() as noted:
        try:
            with _blocked_signals():
                for rank in range(world_size):
                    own = listener if rank == 0 else None
                    method = multiprocessing.get_start_method(allow_none=True)
                    arguments = (main, config, rank, world_size, rendezvous, own, timeout, reported, method)
                    children.append(context.Process(target=_spawned, args=arguments))
                    children[-1].start()
            listener.close()  # the first process has it now
            return _supervise(children, noted)
        finally:
            for child in children:
                if child.pid is not None:
                    child.kill()  # also ends a paused one, which SIGTERM would not
                    child.join()


def _supervise(children: list[Any], noted: list[tuple[int, float]]) -> int:
    """Wait for the children and pass signals on; returns the run's exit status. Leaves children running that must be killed."""
    passed_on, deadline, failed = 0, None, None
    while running := [child for child in children if child.is_alive()]:
        multiprocessing.connection.wait([child.sentinel for child in running], timeout=POLL_SECONDS)
        interrupts = [at for number, at in noted if number == signal.SIGINT]
        if interrupts and interrupts[-1] - interrupts[0] >= REPEAT_SECONDS:
            return INTERRUPTED
        for number, _ in noted[passed_on:]:
            _signal_all(running, number)
            passed_on += 1
        ended = [child.exitcode for child in children]
        if failed is None:
            failed = next((rank for rank, code in enumerate(ended) if code not in (None, 0, STOPPED)), None)
            if failed is not None:
                _report_failure(failed, ended[failed], len(children))
                _signal_all(running, signal.SIGTERM)
                deadline = time.monotonic() + FAILED_SECONDS
        if deadline is None and STOPPED in ended:
            deadline = time.monotonic() + STOPPED_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
    if failed is not None:
        return max(children[failed].exitcode, 1)
    if any(child.is_alive() for child in children):
        late = ", ".join(str(rank) for rank, child in enumerate(children) if child.is_alive())
        print(
            f"error: process {late} of {len(children)} did not stop within {STOPPED_SECONDS:g} s of the others and is ended.",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return STOPPED if any(child.exitcode == STOPPED for child in children) else 0


def _signal_all(children: list[Any], number: int) -> None:
    for child in children:
        if child.is_alive():  # not yet waited for, so the number is still its own
            os.kill(child.pid, number)


def _report_failure(rank: int, exitcode: int, world_size: int) -> None:
    if exitcode in (2, 3):  # bad input, diverged: the process has said so itself
        return
    how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
    if exitcode == -signal.SIGKILL:
        how += " (the system does that when memory runs out)"
    print(f"error: process {rank} of {world_size} {how}; the others are ended.", file=sys.stderr, flush=True)


@contextmanager
def _noted_signals() -> Iterator[list[tuple[int, float]]]:
    """The signals that ask for a stop, each with its time, as they come in."""
    noted: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append((number, time.monotonic()))

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process started in here meets signals only when it is ready for them: until then they wait."""
    resource_tracker.ensure_running()  # its start would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawned(
    main: Callable,
    config: Any,
    rank: int,
    world_size: int,
    rendezvous: tuple[str, int],
    listener: socket.socket | None,
    timeout: timedelta,
    reported: Any,
    start_method: str | None,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Otherwise it would be that of this process, spawn: loader workers would import everything anew, for seconds each.
    multiprocessing.set_start_method(start_method, force=True)
    if "OMP_NUM_THREADS" not in os.environ:
        # Each would take all cores, and as many threads on every core slow one another down tenfold and more.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    for number in SIGNALS:  # until `main` takes them over there is nothing to save
        signal.signal(number, lambda number, frame: os._exit(STOPPED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # all processes are on this machine
        os.environ.setdefault(name, loopback)
    try:
        with _joined(rank, world_size, _store(rendezvous, world_size, listener, timeout), timeout=timeout) as processes:
            main(config, processes)
    except UserError as error:
        with reported.get_lock():  # every process meets the same bad input: say it once
            if not reported.value:
                print(f"error: {error}", file=sys.stderr, flush=True)
            reported.value = True
        os._exit(2)  # without waiting for the others, which the parent ends
    finally:
        for number in SIGNALS:  # one that comes late must not change how this process ends
            signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _store(
    rendezvous: tuple[str, int], world_size: int, listener: socket.socket | None, timeout: timedelta
) -> dist.Store:
    """What the started processes share; the one that has the `listener` keeps it. (tcp:// would listen on every address.)"""
    keeper = {} if listener is None else {"is_master": True, "master_listen_fd": listener.detach()}
    return dist.TCPStore(*rendezvous, world_size, timeout=timeout, **keeper)


def _agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that only the processes started together know.

    torchrun keeps one store for all its restarts, in which processes would meet the addresses of those before them. Its own
    count of restarts differs from node to node. So the first process draws a name, and tells who has answered to it.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        answers = [f"{own}/{other}" for other in range(1, world_size)]
        store.set("start", own)
        store.wait(answers, timeout)
        store.set(f"{own}/all", b" ".join(store.get(answer) for answer in answers))
        return own
    answered = None
    while time.monotonic() < deadline:
        name = store.get("start").decode()  # perhaps of a start before this one
        if name != answered:
            store.set(f"{name}/{rank}", own)
            answered = name
        if store.check([f"{name}/all"]) and own in store.get(f"{name}/all").decode().split():
            return name
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"process {rank} of {world_size}: the first process has not answered for {timeout}")


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those of torchrun, without opening its GPU (gloo); alone where no launcher started it."""
    if not under_torchrun():
        yield Processes(rank=0, world_size=1, device=torch.device("cpu"))
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _joined(rank, world_size, device=torch.device("cpu")) as processes:
        yield processes


@contextmanager
def _joined(
    rank: int,
    world_size: int,
    store: dist.Store | None = None,
    *,
    device: torch.device | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[Processes]:
    """This process among the others, who meet at `store`, or else where torchrun says."""
    device = _device(int(os.environ.get("LOCAL_RANK", rank))) if device is None else device
    backend = "nccl" if device.type == "cuda" else "gloo"
    start = ""
    if store is None:
        shared, rank, world_size = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        start = _agree_on_start(shared, rank, world_size, timeout)
        store = dist.PrefixStore(start, shared)
    bound = {"device_id": device} if backend == "nccl" else {}  # else barriers guess it, with a warning
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **bound)
    try:
        yield Processes(rank=rank, world_size=world_size, device=device, store=store, start=start)
    except SystemExit:  # all processes leave alike
        dist.destroy_process_group()
        raise
    except BaseException:
        with suppress(Exception):  # after a failure this may fail as well, which must not take its place
            if backend == "nccl":
                # To destroy its communicators NCCL waits for all processes, and the others do not know of the failure.
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def local_rank() -> int:
    """This process's number among those that the launcher started on this machine; 0 where none did."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"] if under_torchrun() else 0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
