"""Processes of one training run: how they start, what they know of each other, how they add up. The only user of torch.distributed.

Two ways lead to several processes: `training.distributed=1 dist.world_size=N` starts them here, and under `torchrun` they
exist already. NCCL joins GPUs, gloo CPUs.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> Processes:
        """The only process, on `device` or else the first GPU, or the CPU where there is none."""
        return cls(rank=0, world_size=1, device=_device(0) if device is None else torch.device(device))

    @property
    def on_this_machine(self) -> int:
        """Number of the run's processes on this machine."""
        return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else self.world_size

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

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes; the model itself where there is only one."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


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
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and world_size > gpus:
        raise UserError(f"dist.world_size: {world_size} processes need as many GPUs on this machine, {gpus} visible.")
    return total


def launch(main: Callable[[Any, Processes], None], config: Any, *, world_size: int, address: str, port: int) -> int:
    """Run `main(config, processes)` in as many processes as asked for, and wait for all.

    Args:
        main: a module-level function; the started processes import it by name.
        config: picklable.
        world_size: number of processes, ignored under torchrun, which has started them.
        address, port: where the first process listens.

    Returns:
        Exit status: 0, or the status of the first process that failed (the others are then ended).
    """
    check_processes(world_size)
    if under_torchrun():
        with _joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://") as processes:
            main(config, processes)
        return 0
    if world_size == 1:
        main(config, Processes.alone())
        return 0
    check_rendezvous(address, port)
    return _spawn(main, config, world_size, f"tcp://{address}:{port}")


def check_rendezvous(address: str, port: int) -> None:
    """Refuse an address the first process cannot listen on, which would otherwise show as a time-out of all."""
    try:
        with socket.socket(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise UserError(
            f"dist.address, dist.port: the first process cannot listen on {address}:{port} ({error.strerror or error}); "
            "expected an address of this machine and a free port."
        ) from error


def _spawn(main: Callable, config: Any, world_size: int, rendezvous: str) -> int:
    context = mp.get_context("spawn")
    reported = context.Value("b", False)
    children = [
        context.Process(target=_spawned, args=(main, config, rank, world_size, rendezvous, reported))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    # A supervisor that signals only this process means all of them: leave by way of `finally`.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while running := [child for child in children if child.is_alive()]:
            multiprocessing.connection.wait([child.sentinel for child in running])
            failed = [child for child in children if child.exitcode not in (None, 0)]
            if failed:
                return abs(failed[0].exitcode)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        signal.signal(signal.SIGTERM, before)
    return 0


def _spawned(main: Callable, config: Any, rank: int, world_size: int, rendezvous: str, reported: Any) -> None:
    try:
        with _joined(rank, world_size, rendezvous) as processes:
            main(config, processes)
    except UserError as error:
        with reported.get_lock():  # every process meets the same bad input: say it once
            if not reported.value:
                print(f"error: {error}", file=sys.stderr, flush=True)
            reported.value = True
        os._exit(2)  # without waiting for the others, which the parent ends


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those of torchrun, without opening its GPU (gloo); alone where no launcher started it."""
    if not under_torchrun():
        yield Processes(rank=0, world_size=1, device=torch.device("cpu"))
        return
    with _joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", torch.device("cpu")) as processes:
        yield processes


@contextmanager
def _joined(rank: int, world_size: int, rendezvous: str, device: torch.device | None = None) -> Iterator[Processes]:
    device = _device(int(os.environ.get("LOCAL_RANK", rank))) if device is None else device
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = next(dist.rendezvous(rendezvous, rank, world_size, timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield Processes(rank=rank, world_size=world_size, device=device, store=store)
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number among those that the launcher started on this machine; 0 where none did."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
