"""Rendezvous and collectives of a run's processes. The only module that uses torch.distributed.

`training.launch` starts several processes on one machine; otherwise a launcher such as torchrun does. GPUs use NCCL, CPUs gloo.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from common.errors import UserError, describe
from common.gpus import usable_gpus

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
ANSWER_SECONDS = 5.0  # time for the other processes to report why they failed
STORE_POLL_SECONDS = 0.2


class LostProcess(Exception):
    """Another process of the run failed, died, hangs or cannot be reached; the message is a sentence that says which and why.

    `failed`: that process raised the error itself, so a restart will most likely fail in the same way.
    """

    def __init__(self, sentence: str, *, failed: bool = False) -> None:
        super().__init__(sentence)
        self.failed = failed


@dataclass(frozen=True)
class Processes:
    """This process among all processes of the run. `store` holds small values that all of them read and write."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> Processes:
        """Return the only process of a run, on `device` or else on the first GPU, or on the CPU if there is none."""
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

    @property
    def rendezvous(self) -> str | None:
        """Address where the processes met, `address:port`; None if there is only this one."""
        store = self._bare_store()
        return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else None

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce `value` in place and return it; every process receives the sum."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every process, ordered by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the first process's `value` on every process.

        Args:
            value: nested dicts, lists and tuples of CPU tensors and picklable values. Only the first process's value is
                used; the others may pass anything.

        Returns:
            `value` itself on the first process, an equal one elsewhere; tensors keep dtype, shape and every bit.
        """
        if self.world_size == 1:
            return value
        plan = [tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value)] if self.is_first else [None]
        dist.broadcast_object_list(plan, src=0)
        return tree_map_only(Tensor, self._broadcast, value if self.is_first else plan[0])

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast a tensor as bytes, because no backend supports every dtype; one at a time, to limit device memory."""
        raw = tensor.contiguous() if self.is_first else torch.empty(tensor.shape, dtype=tensor.dtype)
        staged = raw.reshape(-1).view(torch.uint8).to(self.device)
        if staged.numel():
            dist.broadcast(staged, src=0)
        return tensor if self.is_first else staged.cpu().view(tensor.dtype).reshape(tensor.shape)

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Run `action` on the first process and return its result there, None on the others.

        Raises:
            UserError: `action` raised one; it is raised on all processes.
        """
        result, problems = _attempt(action) if self.is_first else (None, ())
        if problems := self.gather(problems)[0]:
            raise UserError(*problems)
        return result

    def once_here(self, name: str, action: Callable[[], str]) -> str:
        """Run `action` on one process of this machine and return its result on all of them, which wait as long as it takes.

        Raises:
            UserError: `action` raised one; it is raised on all of them.
        """
        if self.on_this_machine == 1:
            return action()
        place = local_rank() if under_torchrun() else self.rank
        key = f"once/{name}/{self.rank - place}"
        if place == 0:
            self.store.set(key, json.dumps(_attempt(action)))
        while not self.store.check([key]):
            time.sleep(STORE_POLL_SECONDS)
        result, problems = json.loads(self.store.get(key))
        if problems:
            raise UserError(*problems)
        return result

    def lost(self, error: Exception) -> LostProcess | None:
        """Return what the failure `error` of this process says about another one; None if it is this process's own failure.

        Reports this process's own failure to the other processes. Takes up to twice `ANSWER_SECONDS`.
        """
        if self.world_size == 1:
            return None
        if isinstance(error, LostProcess):
            return error
        own = not is_of_the_engine(error)
        text = f"process {self.rank} of {self.world_size} on {socket.gethostname()} failed: {describe(error)}"
        try:
            store = self._connect_again()
            store.set(f"failed/{self.rank}", json.dumps([own, text]))
            return None if own else self._find_lost(store, describe(error))
        except RuntimeError:  # the store's errors
            unreachable = f"the first process, or its machine, cannot be reached ({describe(error)})."
            return None if own else LostProcess(unreachable)

    def _find_lost(self, store: dist.Store, error: str) -> LostProcess:
        silent = [rank for rank in range(self.world_size) if rank != self.rank]
        end = time.monotonic() + ANSWER_SECONDS
        while silent and time.monotonic() < end:
            for rank in list(silent):
                if store.check([f"failed/{rank}"]):
                    own, text = json.loads(store.get(f"failed/{rank}"))
                    if own:
                        return LostProcess(f"{text}.", failed=True)
                    silent.remove(rank)
            time.sleep(STORE_POLL_SECONDS)
        if not silent:
            return LostProcess(f"the connection between the {self.world_size} processes broke ({error}).")
        ranks = ", ".join(map(str, silent))
        return LostProcess(
            f"process {ranks} of {self.world_size} does not answer: it died, hangs or is cut off ({error})."
        )

    def _connect_again(self) -> dist.Store:
        """Connect to the store again, because the first connection may be what hangs."""
        shared = self._bare_store()
        if isinstance(shared, dist.TCPStore):
            shared = connect_store(shared.host, shared.port, timedelta(seconds=ANSWER_SECONDS))
        # torchrun keeps one store for all its restarts.
        return dist.PrefixStore(f"lost/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)

    def _bare_store(self) -> dist.Store:
        store = self.store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        return store

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that gradients are averaged over all processes; returns the model itself if there is only one."""
        if self.world_size == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        with warnings.catch_warnings():  # newer versions of PyTorch have renamed the argument
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=devices,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # buffers are equal on all ranks: constants, and statistics that training averages
            )


def _attempt(action: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """Run `action`; return its result, and the problems of the `UserError` that it raised instead."""
    try:
        return action(), ()
    except UserError as error:
        return None, error.args


def is_of_the_engine(error: Exception) -> bool:
    """Return whether a collective failed, which is another process's fault."""
    # When a gloo operation times out, the other waiting operations fail with a message that does not mention gloo.
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Application timeout")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def torchrun_can_wait() -> bool:
    """Return whether this version of torchrun has an option for how long it waits after SIGTERM."""
    from torch.distributed.launcher.api import LaunchConfig

    return "shutdown_timeout" in LaunchConfig.__annotations__


def under_torchrun() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted_after_failure() -> bool:
    """Return whether torchrun restarts processes that exit with a status other than 0 (its --max-restarts)."""
    return under_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def local_rank() -> int:
    """Return this process's index among those that the launcher started on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"] if under_torchrun() else 0))


def check_processes(world_size: int) -> int:
    """Return the number of processes of the run; rejects a number other than torchrun's, or above this machine's GPUs if any."""
    total = world_size
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if world_size not in (1, started):
            raise UserError(f"got {world_size}, but the launcher started {started} processes; omit this flag.")
        total, world_size = started, int(os.environ.get("LOCAL_WORLD_SIZE", started))
    gpus = usable_gpus()
    if gpus and world_size > gpus:
        raise UserError(f"{world_size} processes need as many GPUs on this machine, but {gpus} are visible.")
    return total


def check_rendezvous(address: str, port: int) -> None:
    """Check that the store can listen on this address. Otherwise all processes would time out."""
    with _listener(address, port):
        pass


@contextmanager
def _listener(address: str, port: int) -> Iterator[socket.socket]:
    """Open a socket bound to this address only; it is closed afterwards unless it was detached."""
    try:
        family, _, _, _, numeric = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(numeric)
            yield listener
    except OSError as error:
        raise UserError(
            f"the first process cannot listen on {address}:{port} ({error.strerror or error}); "
            "expected an address of this machine and a free port."
        ) from error


def open_store(address: str, port: int, timeout: timedelta) -> dist.Store:
    """Open the store of the processes that this one starts. It lives as long as this process and listens on this address only.

    Raises:
        UserError: it cannot listen there.
    """
    with _listener(address, port) as listener:
        host, port = listener.getsockname()[:2]
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )


def connect_store(host: str, port: int, timeout: timedelta) -> dist.Store:
    """Connect to the store that another process has opened there."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """Return the store without entries of earlier attempts, such as the addresses of processes that have ended.

    torchrun may keep one store for all its restarts. It counts them on each node, so with several nodes the counts may differ.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def joined(
    *,
    timeout: timedelta = TIMEOUT,
    device: torch.device | None = None,
    store: dist.Store | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Processes]:
    """Join this process with the others, which meet at `store` or else where torchrun says; alone if there is neither.

    Args:
        timeout: longest wait for the other processes, at the start and in each collective.
        device: of this process; by default its own GPU if there is one.
        store, rank, world_size: for a process that no launcher started.

    Raises:
        LostProcess: a collective failed.
    """
    if store is None:
        if not under_torchrun():
            yield Processes.alone(device)
            return
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = _of_this_attempt(store)
    device = device or _device(local_rank() if under_torchrun() else rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = {"device_id": device} if backend == "nccl" else {}  # otherwise barriers guess it, with a warning
    processes = Processes(rank=rank, world_size=world_size, device=device, store=store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **bound)
        yield processes
    except SystemExit:  # all processes exit alike
        dist.destroy_process_group()
        raise
    except BaseException as error:
        lost = processes.lost(error) if isinstance(error, Exception) else None
        with suppress(Exception):  # this may fail too, which must not hide the first failure
            if backend == "nccl":
                # NCCL waits for all processes to destroy its communicators, but the others do not know of the failure.
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
        if lost is not None:
            raise lost from error
        raise
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
